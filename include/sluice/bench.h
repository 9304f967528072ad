// bench.h - measurements behind `sluice bench`: each checks its result before it times anything.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"

namespace sluice {

class Backend;

enum class BenchRouting { kUniform, kZipf, kOneExpert };

struct ExpertsBenchConfig {
  ModelGeometry geometry;  ///< num_experts = local experts of this one rank.
  std::vector<int> rows_per_expert = {1, 4, 16, 64};  ///< Mean rows; one case each.
  BenchRouting routing = BenchRouting::kUniform;
  int repeats = 7;
  std::uint64_t seed = 1;
};

/// One case: GEMM1 + SwiGLU + quantize + GEMM2 over all local experts, group-scaled e4m3 rows.
struct ExpertsBenchCase {
  int rows_per_expert = 0;
  std::int64_t total_rows = 0;
  double worst_error_ratio = 0;  ///< Against float64, |error| / bound, checked before timing.
  double median_us = 0, min_us = 0, max_us = 0;
  double gemm1_us = 0, activation_us = 0, gemm2_us = 0;  ///< Of the median run.
  double gbytes_per_s = 0;                               ///< Weights + activations over the median.
  double tflops = 0;
};

/// Ceilings measured in the same run.
struct ExpertsBenchReport {
  std::string device;
  double read_gbytes_per_s = 0;
  double peak_tflops = 0;
  std::string peak_unit;  ///< "bf16 dot", "f32 fma", "fp8 tensor core"
  std::vector<ExpertsBenchCase> cases;
};

/// Throws: kInternal naming row and element if a result is wrong; nothing is timed then.
[[nodiscard]] ExpertsBenchReport bench_experts(const ExpertsBenchConfig& config, Backend& backend);

}  // namespace sluice
