// verify.h - reads a result back and compares it with its source, weight by weight.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint_impl.h"
#include "convert/quantize_weights.h"
#include "core/threads.h"

namespace sluice {

struct Verification {
  std::int64_t weights_compared = 0;
  double relative_error = 0, worst_relative_error = 0;  ///< Of requantized weights.
  std::string worst_matrix;
};

struct VerifySpec {
  std::vector<int> layers = {};
  bool is_requantized = false;
  bool expects_input_scales = false;  ///< They must then be the source's, bit for bit.
};

/// Codes and scales that were kept: float32(code) * scale must have the same bits on both sides.
/// What was quantized: each weight must lie within half a step of its code, or beyond an outermost
/// code. `report` is called with the fraction done. Throws: kCorruptFile naming the layer, expert,
/// matrix and element.
[[nodiscard]] Verification verify_result(const CheckpointData& source, const CheckpointData& result,
                                         const VerifySpec& spec, ThreadPool& pool,
                                         const std::function<void(double)>& report);

}  // namespace sluice
