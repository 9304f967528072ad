// quantize_weights.h - float weights to INT4 codes and scales, by a stated rule.
//
//   s = rule(group)    stored as float32, or as bf16: rounded to even, or by kMse chosen among bf16
//   q = round(w / s)   ties to even, then into [-8, 7]; s as stored, the quotient in float32
//
// A group whose scale would be 0 (all zeros, or too small for a scale) has codes 0 and s = 2^-24.
#pragma once

#include <cstdint>
#include <span>

#include "core/threads.h"
#include "sluice/lab/convert.h"

namespace sluice {

struct QuantizeRule {
  ScaleRule rule = ScaleRule::kAmax7;
  int group_size = 128;
  DType scale_dtype = DType::kFloat32;
};

/// The scale of one group, as it is stored; 0 if it would be that. kMse: exact among the numbers of
/// `scale_dtype` in [amax / 16, amax / 6], by visiting every scale at which a code changes.
/// Requires: finite weights; kFloat32 or kBFloat16.
[[nodiscard]] float group_scale(std::span<const float> weights, ScaleRule rule,
                                DType scale_dtype = DType::kFloat32);

/// weights [n, k] -> codes [n, k / 2] (two's complement, even k low) and scales [n, k / group],
/// as float32 whatever the dtype they were rounded to. Rows are shared out over `pool`.
void quantize_weights(std::span<const float> weights, std::int64_t n, std::int64_t k,
                      const QuantizeRule& rule, ThreadPool& pool, std::span<std::uint8_t> codes,
                      std::span<float> scales);

}  // namespace sluice
