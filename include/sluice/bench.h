// bench.h - measurements behind `sluice bench`: each checks its result before it times anything.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/workload.h"

namespace sluice {

class Backend;

struct ExpertsBenchConfig {
  ModelGeometry geometry;                ///< num_experts = local experts of this one rank.
  DType scale_dtype = DType::kBFloat16;  ///< Of the weights.
  std::vector<int> rows_per_expert = {1, 4, 16, 64};  ///< Mean rows; one case each.
  RoutingKind routing = RoutingKind::kUniform;        ///< How mean * num_experts rows are spread.
  int repeats = 7;
  int num_threads = 1;  ///< Of the arithmetic ceiling; as many as the backend has. CPU only.
  std::uint64_t seed = 1;
};

/// One case: GEMM1 + SwiGLU + quantize + GEMM2 over all local experts, group-scaled e4m3 rows.
struct ExpertsBenchCase {
  int rows_per_expert = 0;
  std::int64_t total_rows = 0;
  double worst_error_ratio = 0;  ///< Against float64, |error| / bound, checked before timing.
  double median_us = 0, min_us = 0, max_us = 0;
  double gemm1_us = 0, activation_us = 0, gemm2_us = 0;  ///< Thread shares; zero on CUDA.
  double quantize_us = 0, requantize_us = 0;  ///< The same rows, bf16 -> group -> static.
  double gbytes_per_s = 0;  ///< Weights of experts with rows, and rows in and out, over the median.
  double tflops = 0;
};

/// Ceilings measured in the same run.
struct ExpertsBenchReport {
  std::string device;
  double read_gbytes_per_s = 0;
  double peak_tflops = 0;  ///< float32 multiply-adds of all threads; 0 on CUDA: not measured here.
  std::vector<ExpertsBenchCase> cases = {};
};

/// Throws: kInternal naming row and element if a result is wrong; nothing is timed then.
[[nodiscard]] ExpertsBenchReport bench_experts(const ExpertsBenchConfig& config, Backend& backend);

}  // namespace sluice
