// bench.h - measurements behind `sluice bench`: each checks its result before it times anything.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/lab/workload.h"
#include "sluice/recipe.h"

namespace sluice {

class Backend;

/// One case for every combination of `num_experts`, `activations`, `recipes`, `routing` and
/// `rows_per_expert`.
struct ExpertsBenchConfig {
  ModelGeometry geometry;                ///< Sizes; its num_experts is used if the list is empty.
  DType scale_dtype = DType::kBFloat16;  ///< Of the weights.
  bool has_minus8 = false;               ///< Weights use all 16 int4 values, not -7..7 only.
  /// A list of recipes whose GEMMs are unlike: `direct`, activation scales per 128 channels;
  /// `bf16-static`, static scales s1 and s2, as every static recipe has them in its GEMMs, taken
  /// from the rows so that nothing saturates; `direct-token`, one scale for each row of x.
  std::vector<Recipe> recipes = {Recipe{}};
  bool stage_only = false;                     ///< Only the kernel "stage".
  std::vector<int> num_experts = {};           ///< A list: local experts of this one rank.
  std::vector<ActivationFn> activations = {};  ///< A list; empty: the geometry's.
  std::vector<RoutingKind> routing = {RoutingKind::kUniform};  ///< kUniform, kZipf or kOneExpert.
  std::vector<int> rows_per_expert = {1, 4, 16, 64};  ///< Mean; rows * num_experts rows in all.
  int repeats = 7;
  double rest_ms = 0;  ///< Before each GEMM measurement: GPUs run slower for a while after work.
  std::uint64_t seed = 1;
};

/// One operation of a case. The bytes are the minimum: weights of experts with rows, rows in, rows
/// out.
struct ExpertsBenchKernel {
  std::string name;
  double median_us = 0, min_us = 0, max_us = 0;
  /// On the CPU: the least processor time of a call, of one thread on average. Where other programs
  /// want the cores, too, less of it is theirs than of the times above. 0: not measured.
  double cpu_us = 0;
  double gbytes_per_s = 0;
  double tflops = 0;  ///< 0 where nothing is multiplied.
};

struct ExpertsBenchCase {
  int num_experts = 0;
  ActivationFn activation = {};
  Recipe recipe = {};
  RoutingKind routing = RoutingKind::kUniform;
  int rows_per_expert = 0;
  std::int64_t total_rows = 0;
  double worst_error_ratio = 0;  ///< Against float64, |error| / bound, checked before timing.
  /// "stage" (GEMM1, activation, quantization, GEMM2 on e4m3 rows); its parts "gate_up" (with
  /// activation and quantization), "down" and, on the CPU, "activation", there as shares of the
  /// threads' time; "quantize" (bf16 -> e4m3) and, for `direct`, "requantize" (group -> static) of
  /// its input; for `direct` also "local", LocalExperts on bf16 tokens with these rows (its
  /// num_topk for each token), and on a GPU "local_host", the host's time for one such call.
  std::vector<ExpertsBenchKernel> kernels = {};
};

/// A kind of arithmetic that kernels use, and what the device does of it alone.
struct ExpertsBenchCeiling {
  std::string kind;  ///< "FP8", "byte dot products", "int16 dot products"
  double tflops = 0;
};

/// Ceilings measured in the same run.
struct ExpertsBenchReport {
  std::string device;
  double read_gbytes_per_s = 0;  ///< On the CPU the most of all cases, measured after each.
  double peak_tflops = 0;  ///< Of Backend::measure_arithmetic_rate(): what no kernel can pass.
  std::vector<ExpertsBenchCeiling> arithmetic = {};  ///< One at least; peak_tflops is the largest.
  std::vector<ExpertsBenchCase> cases = {};
};

/// `on_progress`, if any, is told the fraction of the cases that is done.
/// Throws: kInternal naming row and element if a result is wrong; nothing is timed then.
[[nodiscard]] ExpertsBenchReport bench_experts(const ExpertsBenchConfig& config, Backend& backend,
                                               const std::function<void(double)>& on_progress = {});

/// Throws: kInternal naming the first kernel that computes more than 105 % of `report.peak_tflops`.
/// No kernel does, so that ceiling is wrong, and every share of it. The two are measured one after
/// the other, and the clock may differ by some percent in between.
void check_ceiling(const ExpertsBenchReport& report);

}  // namespace sluice
