#include "convert/target_format.h"

#include <array>
#include <cstring>
#include <tuple>

#include "core/fail.h"

namespace sluice {
namespace {

using Json = nlohmann::ordered_json;

const char* scale_dtype_name(const TargetSpec& spec) {
  return spec.scale_dtype == DType::kBFloat16 ? "BF16" : "F32";
}

bool is_mxfp4(const TargetSpec& spec) {
  return spec.geometry.weight_format == WeightFormat::kMxfp4;
}

const QuantMatrix& matrix_of(const Expert& expert, std::size_t index) {
  return index == 0 ? expert.gate : index == 1 ? expert.up : expert.down;
}

std::vector<std::byte> copy_of(const TensorView& view) {
  const auto* data = view.as<std::byte>();
  return {data, data + view.bytes()};
}

template <class T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  std::vector<std::byte> out(values.size() * sizeof(T));
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

/// Of the input of gate, up or down.
float input_scale_of(const InputScales& inputs, std::size_t matrix) {
  return matrix == 0 ? inputs.w1 : matrix == 1 ? inputs.w3 : inputs.w2;
}

std::array<std::uint64_t, 2> shape_of(const MatrixLayout& matrix) {
  return {static_cast<std::uint64_t>(matrix.n), static_cast<std::uint64_t>(matrix.k)};
}

/// Throws: kUnsupported for biases, which a layout has no place for.
void refuse_bias(const TargetSpec& spec, const std::string& source, std::string_view format) {
  if (!spec.geometry.has_bias) return;
  fail(ErrorCode::kUnsupported,
       "{}: its experts have biases (gate_up_proj_bias and down_proj_bias, or gate_proj.bias), "
       "which {} has no place for; gpt-oss and mxfp4 in compressed-tensors have",
       source, format);
}

/// Exact: what was bf16 is bf16.   Throws: kUnsupported.
std::vector<std::byte> bf16_bytes(const TensorView& bias) {
  std::vector<std::uint16_t> out;
  for (std::int64_t i = 0; i < bias.dim(0); ++i) {
    const float value = bias.as<float>()[i];
    out.push_back(bf16_from_float(value));
    if (bf16_to_float(out.back()) == value) continue;
    fail(ErrorCode::kUnsupported, "bias [{}] = {} is not a bfloat16", i, value);
  }
  return bytes_of(out);
}

/// docs/checkpoint-formats.md#w4afp8
class W4afp8Target final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "w4afp8"; }

  void check(const TargetSpec& spec, const std::string& source) const override {
    refuse_bias(spec, source, name());
    if (is_mxfp4(spec)) {
      fail(ErrorCode::kUnsupported,
           "{}: weights of mxfp4, which w4afp8 does not have; a scale rule (--scale amax7, amax8 "
           "or mse) "
           "quantizes them anew, as INT4",
           source);
    }
    if (spec.geometry.group_size == 128) return;
    fail(ErrorCode::kUnsupported,
         "{}: weights in groups of {}; w4afp8 has groups of 128 (a scale rule, --scale amax7, "
         "amax8 or "
         "mse, quantizes them anew)",
         source, spec.geometry.group_size);
  }

  [[nodiscard]] std::vector<SafetensorsEntry> tensors(const TargetSpec& spec) const override {
    std::vector<SafetensorsEntry> out;
    for (const MatrixLayout& matrix : matrix_layouts(spec.geometry)) {
      const auto [n, k] = shape_of(matrix);
      out.push_back({.name = matrix.part("weight"), .dtype = "I8", .shape = {n, k / 2}});
      out.push_back({.name = matrix.part("weight_scale_inv"),
                     .dtype = scale_dtype_name(spec),
                     .shape = {n, k / 128}});
    }
    if (!spec.has_input_scales) return out;
    for (const char* name : {"w1.input_scale", "w3.input_scale", "w2.input_scale"}) {
      out.push_back({.name = name, .dtype = "F32", .shape = {1}});
    }
    return out;
  }

  [[nodiscard]] std::vector<std::byte> bytes(std::size_t index, const TargetSpec&,
                                             const Expert& expert,
                                             const InputScales& inputs) const override {
    if (index >= 6) return bytes_of(std::vector<float>{input_scale_of(inputs, index - 6)});
    const QuantMatrix& matrix = matrix_of(expert, index / 2);
    return copy_of(index % 2 == 0 ? matrix.codes : matrix.scales);
  }

  [[nodiscard]] Json quantization_config(const TargetSpec& spec) const override {
    return {{"quant_method", "w4afp8"},
            {"group_size", 128},
            {"activation_scheme", spec.has_input_scales ? "static" : "dynamic"}};
  }
};

/// Codes and e8m0 scales of MXFP4, which are canonical as they are, under names of a layout's own.
struct Mxfp4Names {
  const char *codes, *code_dtype, *scales, *scale_dtype;
};

std::size_t num_mxfp4_tensors(const TargetSpec& spec) {
  return spec.geometry.has_bias ? 3 : 2;
}

std::vector<SafetensorsEntry> mxfp4_tensors(const TargetSpec& spec, const Mxfp4Names& names) {
  std::vector<SafetensorsEntry> out;
  for (const MatrixLayout& matrix : matrix_layouts(spec.geometry)) {
    const auto [n, k] = shape_of(matrix);
    out.push_back(
        {.name = matrix.part(names.codes), .dtype = names.code_dtype, .shape = {n, k / 2}});
    out.push_back(
        {.name = matrix.part(names.scales), .dtype = names.scale_dtype, .shape = {n, k / 32}});
    if (spec.geometry.has_bias) {
      out.push_back({.name = matrix.part("bias"), .dtype = "BF16", .shape = {n}});
    }
  }
  return out;
}

std::vector<std::byte> mxfp4_bytes_of(std::size_t index, const TargetSpec& spec,
                                      const Expert& expert) {
  const std::size_t count = num_mxfp4_tensors(spec);
  const QuantMatrix& matrix = matrix_of(expert, index / count);
  if (index % count == 2) return bf16_bytes(matrix.bias);
  return copy_of(index % count == 0 ? matrix.codes : matrix.scales);
}

/// docs/checkpoint-formats.md#gpt-oss
class GptOssTarget final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "gpt-oss"; }
  [[nodiscard]] bool is_fused() const noexcept override { return true; }

  void check(const TargetSpec& spec, const std::string& source) const override {
    if (is_mxfp4(spec) && spec.geometry.has_bias) return;
    fail(ErrorCode::kUnsupported,
         "{}: gpt-oss holds MXFP4 with biases, and these weights would be {}", source,
         is_mxfp4(spec) ? "MXFP4 without biases" : "INT4");
  }
  [[nodiscard]] std::vector<SafetensorsEntry> tensors(const TargetSpec& spec) const override {
    const auto hidden = static_cast<std::uint64_t>(spec.geometry.token_width());
    const auto inner = static_cast<std::uint64_t>(spec.geometry.inner_width());
    std::vector<SafetensorsEntry> out;
    for (const auto& [stem, n, k] : {std::tuple{std::string("gate_up_proj_"), 2 * inner, hidden},
                                     {"down_proj_", hidden, inner}}) {
      out.push_back({.name = stem + "blocks", .dtype = "U8", .shape = {n, k / 32, 16}});
      out.push_back({.name = stem + "scales", .dtype = "U8", .shape = {n, k / 32}});
      out.push_back({.name = stem + "bias", .dtype = "BF16", .shape = {n}});
    }
    return out;
  }
  [[nodiscard]] std::vector<std::byte> bytes(std::size_t index, const TargetSpec&,
                                             const Expert& expert,
                                             const InputScales&) const override {
    const auto of = [&](const QuantMatrix& m) {
      return index % 3 == 0   ? copy_of(m.codes)
             : index % 3 == 1 ? copy_of(m.scales)
                              : bf16_bytes(m.bias);
    };
    if (index >= 3) return of(expert.down);
    const std::vector<std::byte> gate = of(expert.gate), up = of(expert.up);
    const auto rows = static_cast<std::size_t>(expert.gate.n());
    const std::size_t width = gate.size() / rows;
    std::vector<std::byte> out(2 * gate.size());
    for (std::size_t row = 0; row < rows; ++row) {
      std::memcpy(&out[2 * row * width], &gate[row * width], width);
      std::memcpy(&out[(2 * row + 1) * width], &up[row * width], width);
    }
    return out;
  }
  [[nodiscard]] Json quantization_config(const TargetSpec&) const override {
    return {{"quant_method", "mxfp4"},
            {"modules_to_not_convert",
             {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
              "lm_head"}}};
  }
};

/// docs/checkpoint-formats.md#deepseek-v4
class DeepseekFp4Target final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "deepseek-fp4"; }

  void check(const TargetSpec& spec, const std::string& source) const override {
    refuse_bias(spec, source, name());
    if (is_mxfp4(spec)) return;
    fail(ErrorCode::kUnsupported, "{}: deepseek-fp4 holds MXFP4, and these weights would be INT4",
         source);
  }
  [[nodiscard]] std::vector<SafetensorsEntry> tensors(const TargetSpec& spec) const override {
    return mxfp4_tensors(spec, {"weight", "I8", "scale", "F8_E8M0"});
  }
  [[nodiscard]] std::vector<std::byte> bytes(std::size_t index, const TargetSpec& spec,
                                             const Expert& expert,
                                             const InputScales&) const override {
    return mxfp4_bytes_of(index, spec, expert);
  }
  [[nodiscard]] Json quantization_config(const TargetSpec& spec) const override {
    const Json blocks = spec.rest_blocks.empty() ? Json{128, 128} : Json(spec.rest_blocks);
    return {{"quant_method", "fp8"},
            {"fmt", "e4m3"},
            {"scale_fmt", "ue8m0"},
            {"weight_block_size", blocks},
            {"activation_scheme", "dynamic"}};
  }
  [[nodiscard]] std::string expert_type() const override { return "fp4"; }
};

/// docs/checkpoint-formats.md#compressed-tensors
class CompressedTensorsTarget final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "compressed-tensors"; }

  void check(const TargetSpec& spec, const std::string& source) const override {
    if (!is_mxfp4(spec)) refuse_bias(spec, source, "INT4 in compressed-tensors");
  }

  [[nodiscard]] std::vector<SafetensorsEntry> tensors(const TargetSpec& spec) const override {
    if (is_mxfp4(spec)) return mxfp4_tensors(spec, {"weight_packed", "U8", "weight_scale", "U8"});
    const auto group = static_cast<std::uint64_t>(spec.geometry.group_size);
    std::vector<SafetensorsEntry> out;
    for (const MatrixLayout& matrix : matrix_layouts(spec.geometry)) {
      const auto [n, k] = shape_of(matrix);
      out.push_back({.name = matrix.part("weight_packed"), .dtype = "I32", .shape = {n, k / 8}});
      out.push_back({.name = matrix.part("weight_scale"),
                     .dtype = scale_dtype_name(spec),
                     .shape = {n, k / group}});
      out.push_back({.name = matrix.part("weight_shape"), .dtype = "I64", .shape = {2}});
    }
    if (!spec.has_input_scales) return out;
    for (const MatrixLayout& matrix : matrix_layouts(spec.geometry)) {
      out.push_back({.name = matrix.part("input_scale"), .dtype = "F32", .shape = {1}});
    }
    return out;
  }

  [[nodiscard]] std::vector<std::byte> bytes(std::size_t index, const TargetSpec& spec,
                                             const Expert& expert,
                                             const InputScales& inputs) const override {
    if (is_mxfp4(spec)) return mxfp4_bytes_of(index, spec, expert);
    if (index >= 9) return bytes_of(std::vector<float>{input_scale_of(inputs, index - 9)});
    const QuantMatrix& matrix = matrix_of(expert, index / 3);
    switch (index % 3) {
      case 0:
        return words(matrix);
      case 1:
        return copy_of(matrix.scales);
      default:
        return bytes_of(std::vector<std::int64_t>{matrix.n(), matrix.k()});
    }
  }

  [[nodiscard]] Json quantization_config(const TargetSpec& spec) const override {
    Json inputs = nullptr;
    if (spec.has_activation_scheme) {
      inputs = {{"num_bits", 8},
                {"type", "float"},
                {"symmetric", true},
                {"strategy", spec.has_input_scales ? "tensor" : "token"},
                {"dynamic", !spec.has_input_scales}};
    }
    const Json weights = {
        {"num_bits", 4},       {"type", is_mxfp4(spec) ? "float" : "int"}, {"symmetric", true},
        {"strategy", "group"}, {"group_size", spec.geometry.group_size},   {"dynamic", false},
        {"actorder", nullptr}};
    // Everything but the routed experts keeps the numbers it had.
    const Json ignore = {"lm_head", "re:.*self_attn.*", "re:.*shared_expert.*", "re:.*mlp\\.gate$",
                         "re:.*mlp\\.(gate|up|gate_up|down)_proj$"};
    return {{"quant_method", "compressed-tensors"},
            {"format", is_mxfp4(spec) ? "mxfp4-pack-quantized" : "pack-quantized"},
            {"quantization_status", "compressed"},
            {"config_groups",
             {{"group_0",
               {{"targets", {"Linear"}},
                {"weights", weights},
                {"input_activations", inputs},
                {"output_activations", nullptr}}}}},
            {"kv_cache_scheme", nullptr},
            {"ignore", ignore}};
  }

 private:
  /// Eight codes of a row to a word: q + 8 at bits 4 i.
  static std::vector<std::byte> words(const QuantMatrix& matrix) {
    const auto* codes = matrix.codes.as<std::uint8_t>();
    std::vector<std::uint32_t> out(matrix.codes.bytes() / 4);
    for (std::size_t w = 0; w < out.size(); ++w) {
      std::uint32_t word = 0;
      for (std::size_t i = 0; i < 8; ++i) {
        const std::uint32_t nibble = (codes[4 * w + i / 2] >> (i % 2 * 4)) & 0xfU;
        word |= ((nibble + 8) & 0xfU) << (4 * i);
      }
      out[w] = word;
    }
    return bytes_of(out);
  }
};

}  // namespace

std::unique_ptr<const TargetFormat> make_target_format(const std::string& name) {
  if (name == "w4afp8") return std::make_unique<W4afp8Target>();
  if (name == "compressed-tensors") return std::make_unique<CompressedTensorsTarget>();
  if (name == "deepseek-fp4") return std::make_unique<DeepseekFp4Target>();
  if (name == "gpt-oss") return std::make_unique<GptOssTarget>();
  fail(ErrorCode::kInvalidArgument,
       "format '{}' is none of: w4afp8, compressed-tensors, deepseek-fp4, gpt-oss", name);
}

}  // namespace sluice
