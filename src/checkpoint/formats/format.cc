#include "checkpoint/formats/format.h"

#include <utility>

#include "checkpoint/formats/part_readers.h"
#include "checkpoint/formats/quantization_keys.h"
#include "core/fail.h"

namespace sluice {

std::string_view MatrixLayout::stem() const noexcept {
  return role == Role::kGate ? "gate_proj" : role == Role::kUp ? "up_proj" : "down_proj";
}

std::string MatrixLayout::part(std::string_view what) const {
  return fmt::format("{}.{}", stem(), what);
}

std::array<MatrixLayout, 3> matrix_layouts(const ModelGeometry& g) {
  using Role = MatrixLayout::Role;
  const MatrixLayout gate{.role = Role::kGate,
                          .n = g.inner_width(),
                          .k = g.token_width(),
                          .padded_n = g.intermediate,
                          .padded_k = g.hidden};
  MatrixLayout up = gate;
  up.role = Role::kUp;
  return {gate, up,
          MatrixLayout{.role = Role::kDown,
                       .n = gate.k,
                       .k = gate.n,
                       .padded_n = gate.padded_k,
                       .padded_k = gate.padded_n}};
}

std::string Format::input_scale_part(const MatrixLayout& matrix) const {
  return matrix.part("input_scale");
}

std::string Format::refusal(const ExpertTensors::Part& part) const {
  if (part.name.starts_with("gate_up_proj_") || part.name.starts_with("down_proj_")) {  // FusedName
    return fmt::format(
        "holds all experts in one tensor, as gpt-oss has it under quant_method 'mxfp4', and the "
        "config says {}",
        name());
  }
  if (part.name.ends_with("bias")) return "is a bias; experts with biases are not supported";
  return fmt::format("is not part of {}; ignoring it could change results", name());
}

void Format::check_values(const ExpertTensors&, const MatrixLayout&) const {}

float Format::input_scale(const ExpertTensors& expert, const MatrixLayout& matrix) const {
  return read_positive(part_of(expert, input_scale_part(matrix)), "input scale");
}

QuantMatrix Format::load(const ExpertTensors&, const MatrixLayout&, ExpertStorage&) const {
  fail(ErrorCode::kInternal, "{} has no codes", name());
}

std::vector<float> Format::input_factors(const ExpertTensors&, const MatrixLayout&) const {
  return {};
}

std::string Format::scale_part(const MatrixLayout&) const {
  return {};
}

DType Format::scale_dtype(const ExpertTensors& expert, const MatrixLayout& matrix) const {
  return part_of(expert, scale_part(matrix)).entry.dtype == "BF16" ? DType::kBFloat16
                                                                   : DType::kFloat32;
}

std::vector<float> Format::bias(const ExpertTensors& expert, const MatrixLayout& matrix) const {
  const std::string part = bias_part(matrix);
  if (part.empty()) return {};
  return read_bias(part_of(expert, part), rows(matrix), matrix.n);
}

std::string Format::codes_part(const MatrixLayout&) const {
  return {};
}

void Format::make_canonical(std::span<std::byte>, const MatrixLayout&, std::span<std::byte>) const {
}

TensorView Format::scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                          ExpertStorage& storage) const {
  return load_scales(part_of(expert, scale_part(matrix)), matrix.n, matrix.k / group_size(),
                     storage);
}

/// Scales of F16, as float32.
std::size_t Format::copied_bytes(const MatrixLayout& matrix) const {
  return aligned_in_room(static_cast<std::size_t>(matrix.n * (matrix.k / group_size())) *
                         sizeof(float));
}

std::string Format::inexact(const ExpertTensors&, const MatrixLayout&) const {
  return {};
}

QuantMatrix Format::load_unscaled(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const {
  return load(expert, matrix, storage);
}

void Format::load_floats(const ExpertTensors&, const MatrixLayout&, std::span<float>) const {
  fail(ErrorCode::kInternal, "{} has codes", name());
}

const TensorRef* FormatClues::first_gate(std::string_view what) const noexcept {
  const MatrixLayout gate{};
  for (const ExpertTensors& expert : index.layers.begin()->second.experts) {
    if (const TensorRef* const tensor = expert.find(gate.part(what))) return tensor;
  }
  return nullptr;
}

namespace {

constexpr const char* kSupported =
    "w4afp8, compressed-tensors (pack-quantized INT4, mxfp4-pack-quantized), w4a8_awq (AngelSlim), "
    "modelopt (W4A8_AWQ), mxfp4 (gpt-oss), fp8 (with experts of fp4, or 128x128 blocks), or no "
    "quantization with BF16 weights";

/// A container that is known, but not read.
struct Container {
  std::string_view name;  ///< quant_method, quant_algo or format; lower case.
  const char* help;
};

constexpr const char* kFromFloats =
    "`sluice convert` makes INT4 of the model's BF16 or FP8 weights instead";
constexpr const char* kInt4Only = "the experts' weights must be symmetric INT4";

constexpr Container kContainers[] = {
    {"gptq", "export the experts as compressed-tensors pack-quantized INT4, without desc_act"},
    {"awq", "export the experts as compressed-tensors pack-quantized INT4, without zero points"},
    {"auto-round", "export with AutoRound's compressed-tensors (llm_compressor) format"},
    {"bitsandbytes", kFromFloats},
    {"fbgemm_fp8", "it has FP8 scales by row; fp8 in 128x128 blocks can be converted"},
    {"quark", kFromFloats},
    {"hqq", kFromFloats},
    {"eetq", kFromFloats},
    {"aqlm", kFromFloats},
    {"torchao", kFromFloats},
    {"mxfp8", "it has scales by 32; fp8 in 128x128 blocks can be converted"},
    {"nvfp4", "NVFP4 experts (E2M1 with E4M3 scales) are not supported; convert BF16 weights"},
    {"modelopt_fp4", "NVFP4 experts are not supported; convert BF16 weights"},
    {"w4a16_awq", "ModelOpt's W4A8_AWQ is read; export with that"},
    {"int4_awq", "ModelOpt's W4A8_AWQ is read; export with that"},
    {"w8a8_int8", kInt4Only},
    {"w4a8_mxfp4_fp8", kFromFloats},
    {"w4a8_nvfp4_fp8", kFromFloats},
    {"int-quantized", kInt4Only},
    {"float-quantized", "FP8 experts in 128x128 blocks can be converted, others cannot"},
    {"naive-quantized", kInt4Only},
    {"nvfp4-pack-quantized", "NVFP4 experts are not supported; convert BF16 weights"},
    {"marlin-24", "sparse weights are not supported"},
};

std::string lower(std::string text) {
  for (char& c : text) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return text;
}

/// I8 or U8 codes with weight_scale_inv are what w4afp8 looks like.
std::string undeclared_hint(const FormatClues& clues, const TensorRef* gate) {
  if (!gate) return {};
  const std::string seen = fmt::format(", and {} is {}", gate->entry.name, gate->entry.dtype);
  const bool is_bytes = gate->entry.dtype == "I8" || gate->entry.dtype == "U8";
  if (!is_bytes || !clues.first_gate("weight_scale_inv")) return seen;
  return seen +
         ", which with weight_scale_inv looks like w4afp8: if it is, add \"quantization_config\": "
         "{\"quant_method\": \"w4afp8\"} to config.json";
}

[[noreturn]] void refuse_unknown(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  const std::string algo = config.algo_file.empty() ? ""
                                                    : fmt::format(" ({} says quant_algo = '{}')",
                                                                  config.algo_file, config.algo);
  if (!config.quant_method.empty()) {
    std::string help = container_help(config.quant_algo);
    if (help.empty()) help = container_help(config.algo);
    if (help.empty()) help = container_help(config.quant_method);
    const std::string own =
        config.quant_algo.empty() ? "" : fmt::format(", quant_algo = '{}'", config.quant_algo);
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = '{}'{}{}{}; supported are {}", config.file,
         config.quant_method, own, algo, help.empty() ? "" : ": " + help, kSupported);
  }
  if (!config.algo_file.empty()) {
    const std::string help = container_help(config.algo);
    fail(ErrorCode::kUnsupported, "{}: quantization.quant_algo = '{}'{}; supported are {}",
         config.algo_file, config.algo, help.empty() ? "" : ": " + help, kSupported);
  }
  fail(ErrorCode::kUnsupported,
       "{}: no quantization_config.quant_method, and no quantization.quant_algo in "
       "hf_quant_config.json{}; supported are {}",
       config.file, undeclared_hint(clues, clues.first_gate("weight")), kSupported);
}

/// What hf_quant_config.json says beside expert_dtype, if it says anything: FP8, of which the rest
/// of the model is, or that not all is the same.
void check_algo_of_experts(const QuantizationConfig& config) {
  const std::string algo = lower(config.algo);
  const bool agrees = algo.empty() || algo == "fp8" || algo == "fp8_block_scales" ||
                      algo == "mixed_precision" ||
                      (config.expert_type == "fp4" && algo.find("mxfp4") != std::string::npos);
  if (agrees) return;
  fail(
      ErrorCode::kUnsupported,
      "{}: {} = '{}', but quantization.quant_algo = '{}' in {}; leave out the key that is not true",
      config.file, config.expert_key, config.expert_type, config.algo, config.algo_file);
}

/// expert_dtype says what the experts are, whatever the rest of the model is.
/// Throws: kUnsupported naming both keys.
void check_expert_type(const FormatClues& clues, const Format& format) {
  const QuantizationConfig& config = clues.config;
  const std::string& type = config.expert_type;
  if (type.empty()) return;
  if (type != "fp4" && type != "fp8") {
    fail(ErrorCode::kUnsupported, "{}: {} = '{}' is not known; experts are 'fp4' or 'fp8'",
         config.file, config.expert_key, type);
  }
  check_algo_of_experts(config);
  const bool agrees =
      type == "fp4" ? format.weight_format() == WeightFormat::kMxfp4 : format.name() == "fp8-block";
  if (agrees) return;
  const auto [key, value] =
      !config.quant_method.empty() ? std::pair("quant_method", config.quant_method)
      : !config.quant_algo.empty() ? std::pair("quant_algo", config.quant_algo)
                                   : std::pair("quant_algo", config.algo);
  const std::string other =
      value.empty() ? "there is no quantization_config.quant_method"
      : config.quant_method.empty() && config.quant_algo.empty()
          ? fmt::format("quantization.quant_algo = '{}' in {}", value, config.algo_file)
          : fmt::format("quantization_config.{} = '{}'", key, value);
  fail(ErrorCode::kUnsupported,
       "{}: {} = '{}', which makes the experts {}, contradicts {}, which makes them {}; leave out "
       "the key that is not true",
       config.file, config.expert_key, type, type == "fp4" ? "MXFP4" : "FP8", other,
       format.weight_format()
           ? fmt::format("{} of {}", to_string(*format.weight_format()), format.name())
           : std::string(format.name()));
}

}  // namespace

std::string container_help(const std::string& name) {
  const std::string wanted = lower(name);
  for (const Container& container : kContainers) {
    if (container.name == wanted) return container.help;
  }
  return {};
}

Recognised recognise(const FormatClues& clues) {
  // What the checkpoint declares decides; bf16 is what declares nothing.
  for (const auto& recogniser :
       {recognise_w4afp8, recognise_compressed_tensors, recognise_angelslim, recognise_modelopt,
        recognise_deepseek_fp4, recognise_gpt_oss, recognise_fp8_block, recognise_bf16}) {
    if (std::optional<Recognised> found = recogniser(clues)) {
      check_expert_type(clues, *found->format);
      found->unknown_keys = check_quantization_keys(clues.config, found->group, *found->format);
      return std::move(*found);
    }
  }
  refuse_unknown(clues);
}

}  // namespace sluice
