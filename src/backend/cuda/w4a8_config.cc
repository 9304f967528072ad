// w4a8_config.cc - the host-side choices that need no GPU: kernel size class and buffer sizes.
#include <algorithm>

#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/w4a8.h"
#include "core/fail.h"

namespace sluice::cuda {

namespace {
// Up to here weight bytes decide; beyond, how well products and promotion overlap.
constexpr int kDecodeTokens = 32;
// Up to here tiles of 128 rows would be half empty.
constexpr int kNarrowTokens = 64;
// R1's gate_up of 8 experts is 128 tiles for 132 SMs. At 64 rows each, prefill takes 62 us instead
// of 67; at 64 by Zipf, 98 instead of 79 (docs/performance-kernels.md).
constexpr int kFewExperts = 8;
constexpr int kFewExpertsTokens = 64;
// 32 experts of 64 rows with one scale per row: 227 us in decode's kernel, 242 in prefill's two.
constexpr int kOneKernelTokens = 64;
}  // namespace

ConfigChoice choose_config(const ConfigProblem& problem, const ConfigDevice& device) {
  ConfigChoice choice;
  choice.num_ctas = std::max(1, device.num_sms);
  if (problem.max_rows > 0 && problem.max_rows <= kDecodeTokens) {
    choice.config = KernelConfig::kDecode;
    choice.reason =
        "no expert can have more than 32 rows: weight bytes decide, four warpgroups widen fastest";
  } else if (problem.expected_m <= kDecodeTokens) {
    choice.config = KernelConfig::kDecode;
    choice.reason = "at most 32 rows expected: weight bytes decide, four warpgroups widen fastest";
  } else if (problem.num_experts <= kFewExperts && problem.expected_m <= kFewExpertsTokens) {
    choice.config = KernelConfig::kDecode;
    choice.reason =
        "few experts: tiles of 64 rows spread uneven ones over more SMs than tiles of 128";
  } else if (problem.has_row_scales && problem.expected_m <= kOneKernelTokens) {
    choice.config = KernelConfig::kDecode;
    choice.reason =
        "one scale per row: up to 64 rows one decode kernel is faster than prefill's two";
  } else if (problem.expected_m <= kNarrowTokens) {
    choice.config = KernelConfig::kPrefill64;
    choice.reason = "33 to 64 rows expected: finished tiles of 64 rows leave beside the next one";
  } else {
    choice.config = KernelConfig::kPrefill;
    choice.reason = "more than 64 rows expected: weights are widened once for 128 of them";
  }
  return choice;
}

ScaleType scale_type(DType dtype) {
  SLUICE_ASSERT(dtype == DType::kFloat32 || dtype == DType::kBFloat16 ||
                dtype == DType::kFloat8E8M0);
  return dtype == DType::kFloat32    ? ScaleType::kF32
         : dtype == DType::kBFloat16 ? ScaleType::kBf16
                                     : ScaleType::kE8M0;
}

void check_weight_format(WeightFormat format) {
  switch (format) {
    case WeightFormat::kInt4:
    case WeightFormat::kMxfp4:
      return;
  }
  fail(ErrorCode::kUnsupported, "weight format {} has no CUDA kernel", static_cast<int>(format));
}

std::size_t packed_expert_bytes(const WeightShape& shape) {
  check_weight_format(shape.format);
  const std::size_t slabs = static_cast<std::size_t>(shape.n) / kSlabRows;
  const std::size_t steps = static_cast<std::size_t>(shape.k) / kStepK;
  return slabs * steps * static_cast<std::size_t>(slab_bytes(shape.scale_type, shape.group));
}

std::size_t sync_bytes(int num_experts) {
  return sizeof(std::int32_t) * static_cast<std::size_t>(kSyncHeader + num_experts);
}

}  // namespace sluice::cuda
