#include "checkpoint/formats/quantization_keys.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <string_view>

#include "checkpoint/config_keys.h"
#include "core/fail.h"

namespace sluice {
namespace {

template <std::size_t kCount>
using Names = std::array<std::string_view, kCount>;

template <std::size_t kCount>
bool is_in(const Names<kCount>& names, std::string_view key) {
  return std::ranges::find(names, key) != names.end();
}

/// How activations, the KV cache and the rest of the model are quantized; how a quantizer found the
/// codes; who wrote them; what a loader may make of them.
constexpr Names<36> kIrrelevant = {"fmt",
                                   "scale_fmt",
                                   "kv_cache_scheme",
                                   "kv_cache_quant_method",
                                   "kv_cache_quant_algo",
                                   "kv_cache_dtype",
                                   "quantization_status",
                                   "global_compression_ratio",
                                   "version",
                                   "producer",
                                   "provider",
                                   "ignored_quantization_config",
                                   "pre_quant_scale",
                                   "packed_modules_mapping",
                                   "modules_to_convert",
                                   "dequantize",
                                   "linear_activation_scheme",
                                   "moe_activation_scheme",
                                   "is_checkpoint_fp8_serialized",
                                   "is_checkpoint_w4afp8_serialized",
                                   "observer",
                                   "observer_kwargs",
                                   "block_structure",
                                   "zp_dtype",
                                   "a_bits",
                                   "act_bits",
                                   "activation_bits",
                                   "input_bits",
                                   "damp_percent",
                                   "static_groups",
                                   "true_sequential",
                                   "dataset",
                                   "calib_dataset",
                                   "nsamples",
                                   "iters",
                                   "seqlen"};

constexpr Names<12> kBits = {
    "bits",       "num_bits",    "nbits",           "w_bit",       "w_bits",
    "wbits",      "weight_bits", "weight_num_bits", "weights_bit", "weight_bit_width",
    "quant_bits", "bit"};
constexpr Names<9> kZeroPoint = {"zero_point", "zero_points",    "has_zero_point",
                                 "has_zp",     "use_zero_point", "with_zero_point",
                                 "asymmetric", "asym",           "is_asymmetric"};
constexpr Names<6> kSymmetric = {"sym",          "symmetric",        "is_sym",
                                 "is_symmetric", "weight_symmetric", "use_symmetric"};

/// Where it changes how codes are read, or what they are multiplied with, no format here knows it.
bool sounds_like_weights(std::string_view key) {
  std::string lower(key);
  std::ranges::transform(lower, lower.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  constexpr Names<32> kWords = {
      "zero",      "sym",      "rotat", "rotation", "hadamard", "smooth",  "transform", "quarot",
      "spin",      "desc_act", "order", "g_idx",    "perm",     "spars",   "prun",      "codebook",
      "lut",       "low_rank", "lora",  "svd",      "encoding", "nibble",  "offset",    "transpose",
      "interleav", "layout",   "pack",  "double",   "residual", "outlier", "group",     "block"};
  return is_suspicious(key) || std::ranges::any_of(kWords, [&](std::string_view word) {
           return lower.find(word) != std::string::npos;
         });
}

/// The bits that codes of the format have: a description of a whole model may also have the rest's.
bool are_bits_of(const Format& format, std::string_view value) {
  if (!format.weight_format()) return value == (format.name() == "bf16" ? "16" : "8");
  return value == "4" || (format.name() == "deepseek-fp4" && value == "8");
}

/// What quantized_layers may call experts that are the format's.
std::vector<std::string_view> algos_of(const Format& format) {
  if (format.weight_format() == WeightFormat::kInt4) return {"W4A8_AWQ"};
  if (format.weight_format() == WeightFormat::kMxfp4) {
    return {"MXFP4", "W4A16_MXFP4", "W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8"};
  }
  if (format.name() == "fp8-block") return {"FP8", "FP8_BLOCK_SCALES"};
  return {};
}

/// Looks at keys of one object of a file, which begin with `prefix`.
class KeyCheck {
 public:
  KeyCheck(const Format& format, std::vector<std::string>& unknown)
      : format_(format), unknown_(unknown) {}

  void look_at(const std::string& file, const std::string& prefix,
               const std::vector<OtherKey>& keys) const {
    for (const auto& [key, value] : keys) {
      if (is_in(kIrrelevant, key) || value == "null") continue;
      const std::string name = prefix + key;
      if (is_in(kBits, key)) {
        if (are_bits_of(format_, value)) continue;
        refuse(file, name, value, fmt::format("{} has 4-bit codes", format_.name()));
      } else if (is_in(kZeroPoint, key)) {
        if (is_off(value)) continue;
        refuse(file, name, value, "only symmetric INT4 is supported");
      } else if (is_in(kSymmetric, key)) {
        if (value == "true" || value == "1") continue;
        refuse(file, name, value, "only symmetric weights, without zero points, are supported");
      } else if (!sounds_like_weights(key)) {
        if (std::ranges::find(unknown_, name) == unknown_.end()) unknown_.push_back(name);
      } else if (!is_off(value)) {
        refuse(file, name, value,
               "the key is not known, and its name sounds as though it changes what weights mean; "
               "remove it if it does not");
      }
    }
  }

  /// What quantized_layers says of experts, and the keys of its entries.
  void look_at(const std::string& file, const std::string& prefix,
               const std::vector<QuantizedExperts>& entries) const {
    for (const QuantizedExperts& entry : entries) {
      const std::string at = fmt::format("{}quantized_layers.{}.", prefix, entry.module);
      const std::vector<std::string_view> algos = algos_of(format_);
      if (!entry.algo.empty() && std::ranges::find(algos, entry.algo) == algos.end()) {
        refuse(file, at + "quant_algo", entry.algo,
               fmt::format("the experts are {}, of which it would be {}", format_.name(),
                           algos.empty() ? "none" : fmt::format("{}", fmt::join(algos, " or "))));
      }
      if (entry.group_size && format_.weight_format() &&
          *entry.group_size != format_.group_size()) {
        refuse(file, at + "group_size", std::to_string(*entry.group_size),
               fmt::format("{} has {}", format_.name(), format_.group_size()));
      }
      look_at(file, at, entry.others);
    }
  }

 private:
  [[noreturn]] static void refuse(const std::string& file, const std::string& name,
                                  std::string_view value, const std::string& why) {
    fail(ErrorCode::kUnsupported, "{}: {} = {}; {}", file, name, shown_value(value), why);
  }

  const Format& format_;
  std::vector<std::string>& unknown_;
};

/// Members that are objects, of which compressed-tensors says that they change weights.
void check_objects(const QuantizationConfig& config) {
  const auto refuse = [&](bool is_there, std::string_view key, std::string_view why) {
    if (!is_there) return;
    fail(ErrorCode::kUnsupported, "{}: quantization_config.{} = {{...}}; {}", config.file, key,
         why);
  };
  refuse(config.has_sparsity, "sparsity_config", "only dense is supported");
  refuse(config.has_expert_sparsity, "moe_sparsity_config",
         "experts that are pruned or replaced layer by layer are not supported");
  refuse(config.has_transforms, "transform_config", "rotated or scaled weights are not supported");
}

}  // namespace

std::vector<std::string> check_quantization_keys(const QuantizationConfig& config,
                                                 const QuantizationGroup* experts,
                                                 const Format& format) {
  std::vector<std::string> unknown;
  check_objects(config);
  const KeyCheck check(format, unknown);
  check.look_at(config.file, "quantization_config.", config.others);
  check.look_at(config.algo_file, "quantization.", config.algo_others);
  check.look_at(config.file, "quantization_config.", config.experts);
  check.look_at(config.algo_file, "quantization.", config.algo_experts);
  if (experts) {
    const std::string at = fmt::format("quantization_config.config_groups.{}.", experts->name);
    check.look_at(config.file, at, experts->others);
    check.look_at(config.file, at + "weights.", experts->weights.others);
  }
  return unknown;
}

}  // namespace sluice
