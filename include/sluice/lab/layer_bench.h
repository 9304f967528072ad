// layer_bench.h - a whole layer beside its parts: what `sluice bench layer` measures.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/lab/exchange_bench.h"
#include "sluice/lab/workload.h"
#include "sluice/recipe.h"
#include "sluice/tensor.h"

namespace sluice {

struct LayerBenchConfig {
  ModelGeometry geometry;                ///< Of the layer; experts over all ranks.
  DType scale_dtype = DType::kBFloat16;  ///< Of the weights, which are random.
  Device::Kind device = Device::Kind::kHost;
  int num_ranks = 2;
  int num_devices = 0;  ///< That the ranks spread over; 0 = all there are.
  Mode mode = Mode::kLowLatency;
  std::vector<int> tokens_per_rank = {1, 16, 128};  ///< One case each.
  RoutingKind routing = RoutingKind::kUniform;
  int calls = 4;    ///< Of one recording that count; one more comes first.
  int repeats = 7;  ///< Replays of each recording.
  /// Of the layer and of the experts, in memory of their own; calls in a row take them in turn.
  int copies = 1;
  std::uint64_t seed = 1;
};

/// Medians in microseconds; of each call the slowest rank.
struct LayerBenchCase {
  int tokens_per_rank = 0;
  std::int64_t checked_elements = 0;  ///< Of all ranks: the same bits in both ways.
  /// The parts by themselves: the exchange in pairs with nothing between, the experts on rows that
  /// lie there.
  double dispatch_us = 0, combine_us = 0, pair_us = 0, stage_us = 0;
  /// Whole layers in a row, in one recording: without and with send_from_experts.
  double apart_us = 0, overlapped_us = 0;
  /// The stages of each when the host waits after every one.
  struct Stages {
    double dispatch_us = 0, experts_us = 0, combine_us = 0;
  };
  Stages apart = {}, overlapped = {};
};

struct LayerBenchReport {
  std::string device;
  int num_devices = 1;             ///< Used.
  std::size_t exchange_bytes = 0;  ///< Of one rank and one group.
  std::vector<LayerBenchCase> cases = {};
};

/// The recipe is `direct`. Ranks, devices, processes and `run_ranks` are as in bench_exchange().
/// Throws: kInvalidArgument naming the field; kInternal if the two ways differ in a bit, or a
/// replay from a call: nothing is reported then.
[[nodiscard]] LayerBenchReport bench_layer(const LayerBenchConfig& config,
                                           const std::function<void(double)>& on_progress = {},
                                           const RunRanks& run_ranks = {});

}  // namespace sluice
