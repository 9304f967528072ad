#include "convert/target_format.h"

#include <array>
#include <cstring>

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

/// docs/formats.md#w4afp8
class W4afp8Target final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "w4afp8"; }

  void check(const TargetSpec& spec, const std::string& source) const override {
    if (is_mxfp4(spec)) {
      fail(ErrorCode::kUnsupported,
           "{}: weights of mxfp4, which w4afp8 does not have; a scale rule (--scale amax7, amax8 "
           "or mse) "
           "quantizes them anew, as INT4",
           source);
    }
    if (spec.geometry.group_size == 128) return;
    fail(
        ErrorCode::kUnsupported,
        "{}: weights in groups of {}; w4afp8 has groups of 128 (without a group size, a scale rule "
        "quantizes them anew)",
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

std::vector<SafetensorsEntry> mxfp4_tensors(const TargetSpec& spec, const Mxfp4Names& names) {
  std::vector<SafetensorsEntry> out;
  for (const MatrixLayout& matrix : matrix_layouts(spec.geometry)) {
    const auto [n, k] = shape_of(matrix);
    out.push_back(
        {.name = matrix.part(names.codes), .dtype = names.code_dtype, .shape = {n, k / 2}});
    out.push_back(
        {.name = matrix.part(names.scales), .dtype = names.scale_dtype, .shape = {n, k / 32}});
  }
  return out;
}

std::vector<std::byte> mxfp4_bytes_of(std::size_t index, const Expert& expert) {
  const QuantMatrix& matrix = matrix_of(expert, index / 2);
  return copy_of(index % 2 == 0 ? matrix.codes : matrix.scales);
}

/// docs/formats.md#deepseek-v4
class DeepseekFp4Target final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "deepseek-fp4"; }

  void check(const TargetSpec& spec, const std::string& source) const override {
    if (is_mxfp4(spec)) return;
    fail(ErrorCode::kUnsupported, "{}: deepseek-fp4 holds MXFP4, and these weights would be INT4",
         source);
  }
  [[nodiscard]] std::vector<SafetensorsEntry> tensors(const TargetSpec& spec) const override {
    return mxfp4_tensors(spec, {"weight", "I8", "scale", "F8_E8M0"});
  }
  [[nodiscard]] std::vector<std::byte> bytes(std::size_t index, const TargetSpec&,
                                             const Expert& expert,
                                             const InputScales&) const override {
    return mxfp4_bytes_of(index, expert);
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

/// docs/formats.md#compressed-tensors
class CompressedTensorsTarget final : public TargetFormat {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "compressed-tensors"; }

  void check(const TargetSpec&, const std::string&) const override {}

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
    if (is_mxfp4(spec)) return mxfp4_bytes_of(index, expert);
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
  fail(ErrorCode::kInvalidArgument,
       "format '{}' is none of: w4afp8, compressed-tensors, deepseek-fp4", name);
}

}  // namespace sluice
