// model_bench.h - the MoE layers of a model, one after the other as a decode step runs them, on one
// device that has all their experts: what `sluice bench model` measures.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/layer.h"

namespace sluice {

class Backend;

struct ModelBenchConfig {
  ModelGeometry geometry;                ///< Of every layer.
  DType scale_dtype = DType::kBFloat16;  ///< Of the weights, which are random for each layer.
  int num_layers = 4;
  std::vector<int> num_tokens = {1, 16, 64};  ///< Batch sizes; each is captured in a graph.
  int repeats = 7;
  std::uint64_t seed = 1;
};

/// Median microseconds of all layers together, replayed as one graph (CPU: called one by one).
struct ModelBenchCase {
  int num_tokens = 0;
  double exchange_us = 0;  ///< Layers of a LayerGroup of one rank, in low-latency mode.
  double local_us = 0;     ///< LocalExperts of a LocalGroup.
  /// The expert stages alone, on rows that lie there quantized and sorted as these calls have them:
  /// the least that the other two can take.
  double stages_us = 0;
};

struct ModelBenchReport {
  std::string device;
  /// Of the LayerGroup; plan_memory() says the same.
  LayerGroupMemory memory;
  double worst_error_ratio = 0;  ///< Against float64, |error| / bound, checked before timing.
  std::vector<ModelBenchCase> cases = {};
};

/// Captures a graph for each batch size, all before the first is replayed, and replays them in
/// turn. The recipe is `direct`. `on_progress`, if any, is told the fraction that is done.
/// Throws: kInvalidArgument naming the field; kInternal if a row is wrong, if the two ways differ
///   in a bit or a replay from a call, or if the memory taken is not what plan_memory() said.
[[nodiscard]] ModelBenchReport bench_model(const ModelBenchConfig& config, Backend& backend,
                                           const std::function<void(double)>& on_progress = {});

}  // namespace sluice
