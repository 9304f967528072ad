#include "convert/resolve.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "checkpoint/expert_storage.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::array kRules = {std::pair{ScaleRule::kAmax7, "amax7"},
                               std::pair{ScaleRule::kAmax8, "amax8"},
                               std::pair{ScaleRule::kMse, "mse"}};

DType stored_scale_dtype(const CheckpointData& source, int layer) {
  ExpertStorage storage;
  return source.load_expert(layer, 0, storage).gate.scales.dtype;
}

void resolve_layers(const ConvertOptions& options, const CheckpointData& source,
                    ResolvedConversion& out) {
  out.layers = options.layers.empty() ? source.moe_layers : options.layers;
  std::ranges::sort(out.layers);
  const auto twice = std::ranges::adjacent_find(out.layers);
  check_argument(twice == out.layers.end(), "layer {} is asked for twice",
                 twice == out.layers.end() ? 0 : *twice);
  for (const int layer : out.layers) (void)source.layer_tensors(layer);
  const int total = source.geometry().num_experts;
  out.first_expert = options.first_expert;
  out.num_experts = options.num_experts != 0 ? options.num_experts : total - options.first_expert;
  source.check_range(out.first_expert, out.num_experts);
}

/// Why codes and scales cannot be kept as INT4 in groups of `group`; empty if they can.
std::string why_requantize(const CheckpointData& source, const std::vector<int>& layers,
                           int group) {
  if (source.geometry().weight_format != WeightFormat::kInt4) {
    return fmt::format("{} becomes INT4", to_string(source.geometry().weight_format));
  }
  if (group != source.geometry().group_size) {
    return fmt::format("groups of {} become groups of {}", source.geometry().group_size, group);
  }
  for (const int layer : layers) {
    for (const ExpertTensors& expert : source.layer_tensors(layer).experts) {
      for (const MatrixLayout& matrix : matrix_layouts(source.geometry())) {
        std::string why = source.format->inexact(expert, matrix);
        if (!why.empty()) return why;
      }
    }
  }
  return {};
}

void resolve_rule(const ConvertOptions& options, int group, ResolvedConversion& out) {
  TargetSpec& spec = out.spec;
  spec.geometry.group_size = group;
  spec.geometry.weight_format = WeightFormat::kInt4;
  check_argument(group == 128 || group == 32, "group size {} is neither 128 nor 32", group);
  for (const int width : {spec.geometry.token_width(), spec.geometry.inner_width()}) {
    check_argument(width % group == 0, "group size {}: the experts' width {} is no multiple of it",
                   group, width);
  }
  spec.scale_dtype =
      options.scale_dtype.value_or(options.format == "w4afp8" ? DType::kFloat32 : DType::kBFloat16);
  out.rule = QuantizeRule{
      .rule = *options.scale_rule, .group_size = group, .scale_dtype = spec.scale_dtype};
}

void resolve_numbers(const ConvertOptions& options, const CheckpointData& source,
                     ResolvedConversion& out) {
  TargetSpec& spec = out.spec;
  spec.geometry = source.geometry();
  const std::string_view format = source.format->name();
  if (options.scale_dtype) {
    check_argument(
        *options.scale_dtype == DType::kFloat32 || *options.scale_dtype == DType::kBFloat16,
        "scale_dtype {} is neither float32 nor bfloat16", to_string(*options.scale_dtype));
  }
  if (!source.format->weight_format()) {
    check_argument(options.scale_rule.has_value(),
                   "the source is {}: quantizing it needs a scale rule (amax7, amax8 or mse)",
                   format);
    return resolve_rule(options, options.group_size.value_or(128), out);
  }
  const int own = spec.geometry.group_size;
  if (options.scale_rule) {
    const int group = options.group_size.value_or(options.format == "w4afp8" ? 128 : own);
    out.requantized_because = why_requantize(source, out.layers, group);
    check_argument(!out.requantized_because.empty(),
                   "scale rule {}: the source is {}, whose INT4 codes and scales are kept; nothing "
                   "is quantized",
                   to_string(*options.scale_rule), format);
    return resolve_rule(options, group, out);
  }
  check_argument(!options.group_size || *options.group_size == own,
                 "group size {}: the source's {} has groups of {}, which are kept unless a scale "
                 "rule says how to quantize them anew",
                 options.group_size.value_or(0),
                 spec.geometry.weight_format == WeightFormat::kInt4 ? "INT4" : "MXFP4", own);
  check_argument(
      !options.scale_dtype || allows_scale_dtype(spec.geometry.weight_format, *options.scale_dtype),
      "scale_dtype {}: the source's MXFP4 has scales of e8m0, which are kept",
      to_string(options.scale_dtype.value_or(DType::kFloat32)));
  spec.scale_dtype = options.scale_dtype.value_or(stored_scale_dtype(source, out.layers.front()));
}

void resolve_input_scales(const ConvertOptions& options, const CheckpointData& source,
                          ResolvedConversion& out) {
  bool is_first = true;
  // What is left out need not be readable: a pre_quant_scale may be in its way.
  for (const int layer : options.drop_input_scales ? std::vector<int>{} : out.layers) {
    const bool has = !source.input_scales(layer).empty();
    if (!is_first && has != out.spec.has_input_scales) {
      fail(ErrorCode::kUnsupported,
           "{}: layer {} has {} input scales, unlike layer {}; one quantization_config cannot say "
           "so (leaving them all out is possible)",
           source.dir.string(), layer, has ? "static" : "no", out.layers.front());
    }
    out.spec.has_input_scales = has;
    is_first = false;
  }
  // Of compressed-tensors sources, keep what they say of their activations.
  const QuantizationConfig& config = source.config.quantization;
  out.spec.has_activation_scheme = config.groups.empty()
                                       ? source.geometry().weight_format == WeightFormat::kInt4
                                       : config.groups.front().input_activations.is_present;
  if (config.quant_method == "fp8") out.spec.rest_blocks = config.weight_block_size;
}

/// The other tensors of a model keep their dtypes, which the target's config must not contradict.
void check_others(const ConvertOptions& options, const CheckpointData& source) {
  if (options.experts_only || options.format == "w4afp8") return;
  if (options.format == "deepseek-fp4") {
    if (source.index.others.empty() || source.config.quantization.quant_method == "fp8") return;
    fail(ErrorCode::kUnsupported,
         "{}: deepseek-fp4 says that the rest of the model is FP8 in blocks, which it is not; "
         "experts alone can be converted",
         source.dir.string());
  }
  for (const TensorRef& tensor : source.index.others) {
    if (!tensor.entry.dtype.starts_with("F8_")) continue;
    fail(ErrorCode::kUnsupported,
         "{}: is {}, which {} in groups of 4-bit weights does not describe; experts alone can be "
         "converted",
         place(tensor), tensor.entry.dtype, options.format);
  }
}

}  // namespace

ResolvedConversion resolve_conversion(const ConvertOptions& options, const CheckpointData& source,
                                      const TargetFormat& target) {
  check_argument(options.max_shard_bytes >= 1, "max_shard_bytes is 0");
  ResolvedConversion out;
  resolve_layers(options, source, out);
  for (const int layer : out.layers) source.check_layer(layer);
  if (!source.format->weight_format() && !options.scale_rule) {
    // No rule helps where the target has no place for what it makes.
    TargetSpec quantized = out.spec;
    quantized.geometry = source.geometry();
    quantized.geometry.weight_format = WeightFormat::kInt4;
    quantized.geometry.group_size = options.group_size.value_or(128);
    target.check(quantized, source.dir.string());
  }
  resolve_numbers(options, source, out);
  resolve_input_scales(options, source, out);
  target.check(out.spec, source.dir.string());
  check_others(options, source);
  return out;
}

const char* to_string(ScaleRule rule) noexcept {
  for (const auto& [value, name] : kRules) {
    if (value == rule) return name;
  }
  return "unknown";
}

ScaleRule parse_scale_rule(const std::string& name) {
  std::string known;
  for (const auto& [value, text] : kRules) {
    if (name == text) return value;
    known += std::string(known.empty() ? "" : ", ") + text;
  }
  fail(ErrorCode::kInvalidArgument, "scale rule '{}' is none of: {}", name, known);
}

}  // namespace sluice
