// compressed-tensors "pack-quantized" INT4: I32 [N, K / 8], q + 8 in nibble i % 8 counted from the
// lowest bits, along K; scales [N, K / group] for groups of 128 or 32; weight_shape = [N, K].
// Kimi-K2's own INT4 is this with groups of 32 and no activation scheme. Sources:
// docs/checkpoint-formats.md.
#include <algorithm>
#include <cstring>

#include "checkpoint/formats/format.h"
#include "checkpoint/formats/module_match.h"
#include "checkpoint/formats/mxfp4.h"
#include "checkpoint/formats/nibbles.h"
#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"

namespace sluice {
namespace {

class CompressedTensorsFormat final : public Format {
 public:
  /// How the codes lie in weight_packed.
  enum class Codes { kWords, kOffsetBytes, kSignedBytes };

  CompressedTensorsFormat(int group, bool has_static_inputs, Codes codes)
      : group_(group), has_static_inputs_(has_static_inputs), codes_(codes) {}

  [[nodiscard]] std::string_view name() const noexcept override { return "compressed-tensors"; }
  [[nodiscard]] int group_size() const noexcept override { return group_; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    const bool has_words = codes_ == Codes::kWords;
    return {{.name = matrix.part("weight_packed"),
             .dtypes = {has_words ? "I32" : "U8"},
             .shape = {n, has_words ? k / 8 : k / 2}},
            {.name = matrix.part("weight_scale"),
             .dtypes = {"BF16", "F16", "F32"},
             .shape = {n, k / static_cast<std::uint64_t>(group_)}},
            {.name = matrix.part("weight_shape"),
             .dtypes = {"I64", "I32"},
             .shape = {2},
             .is_optional = true}};
  }

  [[nodiscard]] std::string input_scale_part(const MatrixLayout& matrix) const override {
    return has_static_inputs_ ? matrix.part("input_scale") : "";
  }

  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight_scale");
  }

  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight_packed");
  }
  void make_canonical(std::span<std::byte> rows, const MatrixLayout&,
                      std::span<std::byte>) const override {
    if (codes_ != Codes::kSignedBytes) flip_high_bits(rows, rows.data());
  }

  [[nodiscard]] std::string refusal(const ExpertTensors::Part& extra) const override {
    const std::string& part = extra.name;
    if (part.ends_with("weight_zero_point")) {
      return "holds zero points; only symmetric INT4 is supported";
    }
    if (part.ends_with("weight_g_idx")) {
      return "reorders the groups along K (actorder); only groups in order are supported";
    }
    if (part.ends_with("input_scale")) {
      return "is an input scale, but quantization_config declares no static input_activations";
    }
    if (part.ends_with(".weight")) {
      const std::string& dtype = extra.tensor.entry.dtype;
      return dtype == "I32" || dtype == "U8" || dtype == "I8"
                 ? fmt::format("is {}; {}_packed is what compressed-tensors calls INT4 weights",
                               dtype, part)
                 : fmt::format("is {}, but quantization_config declares INT4 ({}_packed)", dtype,
                               part);
    }
    return Format::refusal(extra);
  }

  void check_values(const ExpertTensors& expert, const MatrixLayout& matrix) const override {
    const TensorRef* const optional = expert.find(matrix.part("weight_shape"));
    if (!optional) return;  // check_part() has held codes and scales against the config's sizes.
    const TensorRef& tensor = *optional;
    std::int64_t shape[2] = {};
    if (tensor.entry.dtype == "I64") {
      read_tensor(tensor, 0, std::as_writable_bytes(std::span(shape)));
    } else {
      std::int32_t narrow[2] = {};
      read_tensor(tensor, 0, std::as_writable_bytes(std::span(narrow)));
      shape[0] = narrow[0], shape[1] = narrow[1];
    }
    if (shape[0] == matrix.n && shape[1] == matrix.k) return;
    fail(ErrorCode::kCorruptFile, "{}: says [{}, {}], but the config's sizes need [{}, {}]",
         place(tensor), shape[0], shape[1], matrix.n, matrix.k);
  }

  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override {
    // Little-endian words: byte j of a row holds elements 2j and 2j + 1, low nibble first.
    const TensorRef& packed = part_of(expert, matrix.part("weight_packed"));
    return {.codes = codes_ == Codes::kSignedBytes ? view_codes(packed, matrix, storage)
                                                   : load_offset_codes(packed, matrix, storage),
            .scales = scales(expert, matrix, storage),
            .group_size = group_};
  }

 private:
  int group_;
  bool has_static_inputs_;
  Codes codes_;
};

/// Words hold q + 8 by definition. Bytes may hold either, so the first gate matrix decides.
CompressedTensorsFormat::Codes find_codes(const FormatClues& clues, std::string& evidence) {
  using Codes = CompressedTensorsFormat::Codes;
  const TensorRef* const gate = clues.first_gate("weight_packed");
  if (!gate || gate->entry.dtype != "U8") return Codes::kWords;
  gate->file->check_is_whole();
  const NibbleEvidence nibbles = nibble_evidence(gate->bytes());
  if (nibbles.verdict == NibbleEvidence::Verdict::kNone) {
    fail(ErrorCode::kUnsupported,
         "{}: dtype U8 does not say whether nibbles are signed or have an offset of 8, and neither "
         "do they: {}",
         place(*gate), nibbles.text());
  }
  evidence += "; U8 nibbles: " + nibbles.text();
  return nibbles.verdict == NibbleEvidence::Verdict::kOffset ? Codes::kOffsetBytes
                                                             : Codes::kSignedBytes;
}

/// A refusal that names the field, its value and what is supported.
[[noreturn]] void refuse(const QuantizationConfig& config, const std::string& field,
                         const std::string& value, const std::string& supported) {
  fail(ErrorCode::kUnsupported, "{}: quantization_config.{} = {}; {}", config.file, field, value,
       supported);
}

std::string text_of(const std::optional<std::int64_t>& value) {
  return value ? std::to_string(*value) : "null";
}

/// Of either kind of codes. The orders "weight" and "static", its older name, change how the
/// quantizer works, not what it writes.
void check_order(const QuantizationConfig& config, const std::string& at,
                 const QuantizationArgs& weights) {
  if (!weights.dynamic.empty() && weights.dynamic != "false") {
    refuse(config, at + ".dynamic", "'" + weights.dynamic + "'", "weights are static");
  }
  if (!weights.actorder.empty() && weights.actorder != "weight" && weights.actorder != "static") {
    refuse(config, at + ".actorder", "'" + weights.actorder + "'",
           "groups reordered along K (g_idx) are not supported");
  }
}

void check_weights(const QuantizationConfig& config, const std::string& at,
                   const QuantizationArgs& weights) {
  if (!weights.is_present) refuse(config, at, "null", "the experts' weights must be INT4");
  if (weights.num_bits != 4) {
    refuse(config, at + ".num_bits", text_of(weights.num_bits), "only 4 is supported");
  }
  if (weights.type != "int") {
    refuse(config, at + ".type", "'" + weights.type + "'", "only 'int' is supported");
  }
  if (weights.is_symmetric != true) {
    refuse(config, at + ".symmetric", weights.is_symmetric ? "false" : "null",
           "only symmetric INT4, without zero points, is supported");
  }
  if (weights.strategy != "group") {
    refuse(config, at + ".strategy", "'" + weights.strategy + "'", "only 'group' is supported");
  }
  if (weights.group_size != 32 && weights.group_size != 128) {
    refuse(config, at + ".group_size", text_of(weights.group_size),
           "only 32 and 128 are supported");
  }
  check_order(config, at, weights);
}

/// True if the inputs have static scales. What is said of dynamic ones changes nothing here: the
/// recipe says how activations are quantized.
bool check_inputs(const QuantizationConfig& config, const std::string& at,
                  const QuantizationArgs& inputs) {
  if (!inputs.is_present) return false;
  if (inputs.type != "float" || inputs.num_bits != 8) {
    refuse(config, at, fmt::format("{}-bit '{}'", text_of(inputs.num_bits), inputs.type),
           "only 8-bit float activations, or none declared, are supported");
  }
  if (inputs.is_symmetric == false) refuse(config, at + ".symmetric", "false", "only true is");
  if (inputs.dynamic == "true") return false;
  if (inputs.dynamic != "false" || inputs.strategy != "tensor") {
    refuse(config, at, fmt::format("dynamic '{}', strategy '{}'", inputs.dynamic, inputs.strategy),
           "static activations must be per tensor");
  }
  return true;
}

/// E2m1 codes with e8m0 scales for each 32, as Kimi-K3 has them.
Recognised recognise_mxfp4(const FormatClues& clues, const QuantizationGroup& group,
                           const std::string& name) {
  const QuantizationConfig& config = clues.config;
  const QuantizationArgs& weights = group.weights;
  const std::string at = name + ".weights";
  if (!weights.is_present) refuse(config, at, "null", "the experts' weights must be MXFP4");
  if (weights.num_bits != 4) {
    refuse(config, at + ".num_bits", text_of(weights.num_bits), "MXFP4 has 4");
  }
  if (weights.type != "float") {
    refuse(config, at + ".type", "'" + weights.type + "'", "MXFP4 is of type 'float'");
  }
  if (weights.group_size != 32) {
    refuse(config, at + ".group_size", text_of(weights.group_size), "MXFP4 has 32");
  }
  if (weights.strategy != "group") {
    refuse(config, at + ".strategy", "'" + weights.strategy + "'", "only 'group' is supported");
  }
  if (weights.is_symmetric == false) {
    refuse(config, at + ".symmetric", "false", "MXFP4 has no zero points");
  }
  // Nothing else says what the bytes of the scales mean.
  if (!weights.scale_dtype.empty() && weights.scale_dtype != "torch.uint8" &&
      weights.scale_dtype != "torch.float8_e8m0fnu") {
    refuse(config, at + ".scale_dtype", "'" + weights.scale_dtype + "'",
           "scales of MXFP4 are e8m0: 'torch.uint8' or 'torch.float8_e8m0fnu'");
  }
  check_order(config, at, weights);
  const QuantizationArgs& inputs = group.input_activations;
  if (check_inputs(config, name + ".input_activations", inputs)) {
    refuse(config, name + ".input_activations.dynamic", "'false'",
           "static activations are read beside INT4 alone");
  }
  return {.format = make_mxfp4_format({.format = "compressed-tensors",
                                       .codes = "weight_packed",
                                       .scales = "weight_scale",
                                       .code_dtypes = {"U8"},
                                       .scale_dtypes = {"U8", "F8_E8M0"},
                                       .bias = clues.first_gate("bias") ? "bias" : ""}),
          .evidence = fmt::format("config.json: quant_method = 'compressed-tensors', format "
                                  "'mxfp4-pack-quantized', {} activations",
                                  inputs.is_present ? "dynamic e4m3" : "no scheme for"),
          .group = &group};
}

/// The name of a module of the first expert, without the tensor's own: "...experts.0.gate_proj".
std::string module_of(const FormatClues& clues) {
  for (const char* const what : {"weight_packed", "weight_scale", "weight"}) {
    const TensorRef* const tensor = clues.first_gate(what);
    if (!tensor) continue;
    const std::string& name = tensor->entry.name;
    return name.substr(0, name.rfind('.'));
  }
  return {};
}

/// The most precise of a group's targets. A group without any may mean every module.
ModuleMatch match_of(const QuantizationConfig& config, const QuantizationGroup& group,
                     const std::string& module) {
  const std::string where =
      fmt::format("{}: quantization_config.config_groups.{}.targets", config.file, group.name);
  ModuleMatch best = group.targets.empty() ? ModuleMatch::kClass : ModuleMatch::kNone;
  for (const std::string& target : group.targets) {
    best = std::max(best, match_target(target, module, where));
  }
  return best;
}

bool is_same(const QuantizationGroup& a, const QuantizationGroup& b) {
  return a.weights == b.weights && a.input_activations == b.input_activations &&
         a.format == b.format;
}

/// The group whose targets name the routed experts most precisely. Groups that say the same, or one
/// alone, need no targets: the tensors bear it out.
const QuantizationGroup& group_of_experts(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  const QuantizationGroup& first = config.groups.front();
  if (std::ranges::all_of(config.groups, [&](const auto& g) { return is_same(g, first); })) {
    return first;
  }
  const std::string module = module_of(clues);
  const QuantizationGroup* best = nullptr;
  const QuantizationGroup* rival = nullptr;  // As precise as the best, and not the same.
  ModuleMatch precision = ModuleMatch::kNone;
  for (const QuantizationGroup& group : config.groups) {
    const ModuleMatch here = match_of(config, group, module);
    if (here > precision) {
      best = &group, rival = nullptr, precision = here;
    } else if (best && here == precision && !is_same(*best, group)) {
      rival = &group;
    }
  }
  if (rival) {
    refuse(config, "config_groups",
           fmt::format("'{}' and '{}', which differ and both target {}", best->name, rival->name,
                       module),
           "which of them the experts use cannot be told");
  }
  if (best) return *best;
  refuse(config, "config_groups",
         fmt::format("'{}' and others, which differ, and none targets {}", first.name, module),
         "which of them the experts use cannot be told");
}

}  // namespace

std::optional<Recognised> recognise_compressed_tensors(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  if (config.quant_method != "compressed-tensors") return std::nullopt;
  if (config.groups.empty()) refuse(config, "config_groups", "{}", "the experts need one");
  const QuantizationGroup& group = group_of_experts(clues);
  const std::string at = "config_groups." + group.name;
  const std::string& format = group.format.empty() ? config.format : group.format;
  const bool is_mxfp4 = format == "mxfp4-pack-quantized";
  if (!is_mxfp4 && format != "pack-quantized") {
    const std::string help = container_help(format);
    refuse(config, group.format.empty() ? "format" : at + ".format", "'" + format + "'",
           "only 'pack-quantized' and 'mxfp4-pack-quantized' are supported" +
               (help.empty() ? "" : ": " + help));
  }
  if (is_mxfp4) return recognise_mxfp4(clues, group, at);
  check_weights(config, at + ".weights", group.weights);
  const bool is_static = check_inputs(config, at + ".input_activations", group.input_activations);
  const int group_size = static_cast<int>(*group.weights.group_size);
  std::string how;
  const auto codes = find_codes(clues, how);
  return Recognised{
      .format = std::make_unique<CompressedTensorsFormat>(group_size, is_static, codes),
      .evidence = fmt::format("config.json: quant_method = 'compressed-tensors', format "
                              "'pack-quantized', symmetric "
                              "INT4 in groups of {}, {} activations{}",
                              group_size,
                              !group.input_activations.is_present ? "no scheme for"
                              : is_static                         ? "static e4m3"
                                                                  : "dynamic e4m3",
                              group_size == 32 && !group.input_activations.is_present
                                  ? " (as Kimi-K2's INT4)"
                                  : "") +
                  how,
      .group = &group};
}

}  // namespace sluice
