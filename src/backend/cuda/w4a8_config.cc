// w4a8_config.cc - the host-side choices that need no GPU: kernel size class and buffer sizes.
#include <algorithm>

#include "backend/cuda/sm90_w4a8_layout.cuh"
#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

namespace {
constexpr int kDecodeTokens = 64;  // widest token tile of the decode kernels
}

ConfigChoice choose_config(const ConfigProblem& problem, const ConfigDevice& device) {
  ConfigChoice choice;
  choice.num_ctas = std::max(1, device.num_sms);
  if (problem.max_rows > 0 && problem.max_rows <= kDecodeTokens) {
    choice.config = KernelConfig::kDecode;
    choice.reason = "no expert can have more than 64 rows: every weight is read and widened once";
  } else if (problem.expected_m <= kDecodeTokens) {
    choice.config = KernelConfig::kDecode;
    choice.reason = "at most 64 rows expected: weight bytes decide, four warpgroups widen fastest";
  } else {
    choice.config = KernelConfig::kPrefill;
    choice.reason = "more than 64 rows expected: 128-row tiles halve the widening per product";
  }
  return choice;
}

std::size_t packed_expert_bytes(const WeightShape& shape) {
  const std::size_t slabs = static_cast<std::size_t>(shape.n) / kSlabRows;
  const std::size_t steps = static_cast<std::size_t>(shape.k) / kStepK;
  return slabs * steps * static_cast<std::size_t>(slab_bytes(shape.scale_type, shape.group));
}

std::size_t sync_bytes(int num_experts) {
  return sizeof(std::int32_t) * static_cast<std::size_t>(num_experts + 2);
}

}  // namespace sluice::cuda
