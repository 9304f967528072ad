// What loads but deserves a look. Input scales are read for all experts, weights for a few only.
#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <span>

#include "checkpoint/checkpoint_impl.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Scales this many times above or below the median of their kind are worth a word.
constexpr float kFarFactor = 1000.0f;
/// Weights with scales below this contribute nothing; experts that were never routed to in training
/// look like this, and other engines turn them into NaN.
constexpr float kDeadScale = 1e-12f;
constexpr int kNumSampledExperts = 4;
/// Codes looked at per matrix.
constexpr std::size_t kMaxSampledBytes = std::size_t{1} << 18;

using Warnings = std::vector<CheckpointWarning>;

float median_of(std::vector<float> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

/// Names of a layer's tensors in the checkpoint's own format.
struct Names {
  const Format& format;
  std::array<MatrixLayout, 3> layouts;  // gate, up, down
  int layer;

  [[nodiscard]] std::string input_scale(int expert, std::size_t matrix) const {
    return tensor_name(layer, expert, format.input_scale_part(layouts[matrix]));
  }
  [[nodiscard]] std::string weight(int expert, std::size_t matrix) const {
    return tensor_name(layer, expert, format.parts(layouts[matrix])[0].name);
  }
  [[nodiscard]] std::string scale(int expert, std::size_t matrix) const {
    return tensor_name(layer, expert, format.parts(layouts[matrix])[1].name);
  }
};

void check_input_scales(const Names& names, const std::vector<InputScales>& scales, Warnings& out) {
  if (scales.empty()) return;
  const bool is_uncalibrated = std::ranges::all_of(
      scales, [](const InputScales& s) { return s.w1 == 1 && s.w2 == 1 && s.w3 == 1; });
  if (is_uncalibrated) {
    out.push_back({.tensor = names.input_scale(0, 0),
                   .text = "every input scale of the layer is exactly 1.0: uncalibrated"});
    return;
  }
  const std::array members = {&InputScales::w1, &InputScales::w3, &InputScales::w2};
  for (std::size_t m = 0; m < members.size(); ++m) {
    std::vector<float> values;
    for (const InputScales& s : scales) values.push_back(s.*members[m]);
    const float median = median_of(values);
    for (std::size_t e = 0; e < values.size(); ++e) {
      if (values[e] <= median * kFarFactor && values[e] >= median / kFarFactor) continue;
      out.push_back(
          {.tensor = names.input_scale(static_cast<int>(e), m),
           .text = fmt::format("{:.4g} is far from the layer's median {:.4g}", values[e], median)});
    }
  }
}

void check_codes(const std::string& tensor, const TensorView& codes, bool expects_minus_eight,
                 Warnings& out) {
  std::array<std::int64_t, 256> bytes{};
  const std::size_t count = std::min(codes.bytes(), kMaxSampledBytes);
  for (const std::uint8_t byte : std::span(codes.as<std::uint8_t>(), count)) ++bytes[byte];
  std::array<std::int64_t, 16> nibbles{};
  for (std::size_t b = 0; b < bytes.size(); ++b) {
    nibbles[b & 0xf] += bytes[b];
    nibbles[b >> 4] += bytes[b];
  }
  const auto total = static_cast<std::int64_t>(2 * count);
  if (nibbles[0] == total) {
    out.push_back({.tensor = tensor, .text = "every weight looked at is 0"});
  } else if (nibbles[8] > nibbles[0]) {
    // Around zero lie most weights: code 0 if signed, code 8 if stored with an offset of 8.
    out.push_back({.tensor = tensor,
                   .text = fmt::format("-8 occurs {} times and 0 only {} times: codes with an "
                                       "offset of 8 instead of signed ones?",
                                       nibbles[8], nibbles[0])});
  } else if (nibbles[8] > 0 && !expects_minus_eight) {
    out.push_back({.tensor = tensor,
                   .text = fmt::format("-8 occurs {} times in {} weights; amax / 7 rounding makes "
                                       "none",
                                       nibbles[8], total)});
  }
}

void check_scales(const std::string& tensor, const TensorView& scales, Warnings& out) {
  std::vector<float> values(static_cast<std::size_t>(scales.shape.num_elements()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = scales.dtype == DType::kFloat32 ? scales.as<float>()[i]
                                                : bf16_to_float(scales.as<std::uint16_t>()[i]);
  }
  const float largest = std::ranges::max(values);
  const float median = median_of(std::move(values));
  if (largest < kDeadScale) {
    out.push_back(
        {.tensor = tensor, .text = fmt::format("largest scale is {:.4g}: a dead expert", largest)});
  } else if (largest > median * kFarFactor) {
    out.push_back({.tensor = tensor,
                   .text = fmt::format("largest scale {:.4g} is far from the median {:.4g}",
                                       largest, median)});
  }
}

void check_weights(const Names& names, int index, const Expert& expert, Warnings& out) {
  const std::array matrices = {&expert.gate, &expert.up, &expert.down};
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    check_codes(names.weight(index, i), matrices[i]->codes, names.format.makes_minus_eight(), out);
    check_scales(names.scale(index, i), matrices[i]->scales, out);
  }
}

}  // namespace

std::vector<CheckpointWarning> Checkpoint::warnings(int layer) const {
  Warnings result;
  const Names names{
      .format = *impl_->format, .layouts = matrix_layouts(impl_->config.geometry), .layer = layer};
  check_input_scales(names, input_scales(layer), result);
  const ModelConfig& config = impl_->config;
  const bool is_dense = layer < config.first_k_dense_replace;
  if (is_dense || (config.num_layers > 0 && layer >= config.num_layers)) {
    result.push_back({.tensor = names.weight(0, 0),
                      .text = is_dense ? fmt::format("layer {} has routed experts, though "
                                                     "first_k_dense_replace = {}",
                                                     layer, config.first_k_dense_replace)
                                       : fmt::format("layer {} is past the model's {} layers "
                                                     "(a prediction layer?)",
                                                     layer, config.num_layers)});
  }
  if (!weight_format()) return result;
  const int num_experts = config.geometry.num_experts;
  std::set<int> sampled;
  for (int i = 0; i < kNumSampledExperts; ++i) {
    sampled.insert((num_experts - 1) * i / (kNumSampledExperts - 1));
  }
  for (const int e : sampled) {
    const ExpertWeights weights = load_experts(layer, e, 1);
    check_weights(names, e, weights.experts.front(), result);
    weights.release_pages(0);  // Looking must not make the layer resident.
  }
  return result;
}

}  // namespace sluice
