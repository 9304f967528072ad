// layer_run.h - one MoE layer over R ranks: the work behind `sluice run`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/config.h"
#include "sluice/engine.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"

namespace sluice::cli {

class Launch;

struct LayerRunConfig {
  int layer = 0;
  int num_ranks = 1;
  std::vector<std::int64_t> tokens;  ///< [num_ranks]
  Mode mode = Mode::kLowLatency;
  Recipe recipe = {};  ///< direct
  Device::Kind backend = Device::Kind::kHost;
  int num_devices = 0;  ///< That the ranks of a host spread over; 0 = all there are.
  RoutingKind routing = RoutingKind::kUniform;
  std::uint64_t seed = 1;
  int repeats = 1;
  float routed_scaling_factor = 1.0f;
  bool with_digest = false;  ///< Digest the bytes GEMM1 consumes.
  Environment environment;
};

/// What one rank has to tell.
struct RankResult {
  ForwardStats stats;                          ///< Of the median repeat.
  ExchangeCounters counters;                   ///< Of one forward().
  ExchangeCounters totals;                     ///< Of all repeats.
  std::vector<std::uint64_t> transport_bytes;  ///< [num_ranks] that the transport put in one.
  std::vector<std::uint16_t> y;
  Workload load;
  LayerGroupMemory memory;  ///< That its engine took.
  std::uint64_t digest = 0;
  double peak_resident_bytes = 0;  ///< Of its process, experts included.
  int num_ranks_on_device = 1;     ///< That share its device, itself included.
};

struct LayerRunResult {
  LayerRecipe recipe;
  std::string backend;           ///< Backend::description() of rank 0.
  double read_bytes_per_s = 0;   ///< Of rank 0's device; see measure_ceiling().
  std::vector<double> total_us;  ///< [repeats] slowest rank of each.
  std::vector<RankResult> ranks;
};

/// Runs the layer on every rank. All ranks fail or none; the first cause is thrown. The result is
/// the reporter's; other processes get an empty one.
[[nodiscard]] LayerRunResult run_layer(const LayerRunConfig& config, const Checkpoint& checkpoint,
                                       Launch& launch);

/// What the device of rank 0 can read, measured while no rank runs.
[[nodiscard]] double measure_ceiling(const LayerRunConfig& config);

/// Of this process so far.
[[nodiscard]] double peak_resident_bytes();

/// Compares `num_rows` tokens, spread evenly over all, with the float64 reference.
[[nodiscard]] VerifyReport verify_run(const LayerRunConfig& config, const Checkpoint& checkpoint,
                                      const LayerRunResult& result, std::int64_t num_rows);

}  // namespace sluice::cli
