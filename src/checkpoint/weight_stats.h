// weight_stats.h - what a look at some weights of a matrix says of their scales.
//
//   size = rms(w) * sqrt(K)
//
// A matrix that keeps its input's magnitude has weights of about 1 / sqrt(K), so `size` is near 1
// whatever the width. It is what layers, experts and matrices are compared by.
#pragma once

#include <array>
#include <cstdint>

#include "sluice/checkpoint.h"

namespace sluice {

struct WeightStats {
  WeightFormat format = WeightFormat::kInt4;
  std::array<std::int64_t, 16> codes{};  ///< Of the rows looked at, by nibble ^ 8: int4 + 8.
  std::int64_t num_codes = 0;
  double code_rms = 0, rms = 0;  ///< Of the codes; of the weights, code * scale.
  double size = 0;               ///< rms * sqrt(K)
  float median_scale = 0;        ///< Of all scales.
  float largest_scale = 0;       ///< Of all scales.
  /// largest_scale without groups whose weights are all 0: a scale says nothing there, and
  /// quantizers write 1. Such groups are looked for only among scales far above the median.
  float largest_used_scale = 0;

  [[nodiscard]] bool are_all_zero() const noexcept {
    const std::int64_t minus_zeros = format == WeightFormat::kMxfp4 ? codes[0] : 0;
    return codes[8] + minus_zeros == num_codes;
  }
};

/// Scales this many times above or below the median of their kind are worth a word.
constexpr float kFarScale = 1000.0f;

/// Reads all scales, and the codes of rows that are spread evenly, at most 256 KiB of them.
[[nodiscard]] WeightStats weight_stats(const QuantMatrix& matrix);

}  // namespace sluice
