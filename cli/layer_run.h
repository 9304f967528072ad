// layer_run.h - MoE layers of one checkpoint over R ranks: the work behind `sluice run`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rank_results.h"
#include "sluice/checkpoint.h"
#include "sluice/config.h"
#include "sluice/lab/reference.h"
#include "sluice/lab/workload.h"
#include "sluice/layer.h"
#include "sluice/loading.h"

namespace sluice::cli {

class Launch;

struct LayerRunConfig {
  std::vector<int> layers = {};  ///< Share one LayerGroup; run one after the other.
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
  /// Of each layer; empty: Placement::even() in num_slots, and without them expert e in slot e.
  std::vector<Placement> placements = {};
  int num_slots = 0;  ///< Over all ranks; as `placements` have, if there are any.
  Hosts hosts = {};   ///< Of `num_ranks` ranks, or one.
  int sum_parts = 0;  ///< ExchangeConfig::sum_parts
  /// After the repeats of a layer: balance its experts by the rows that were counted, move them,
  /// and repeat.
  bool rebalances = false;
  Environment environment;
};

/// One layer of the run.
struct LayerRunResult {
  int layer = 0;
  LayerRecipe recipe = {};
  std::string backend = {};           ///< Backend::description() of rank 0.
  double read_bytes_per_s = 0;        ///< Of rank 0's device; see measure_ceiling().
  std::vector<double> total_us = {};  ///< [repeats] slowest rank of each.
  Placement placement = {};
  std::vector<RankResult> ranks = {};
};

struct RunResult {
  std::vector<LayerRunResult> layers;  ///< In the order of LayerRunConfig::layers.
  std::vector<Workload> loads;         ///< [num_ranks] tokens and routing, of every layer alike.
  /// Reading and repacking all layers' experts: bytes of all ranks together, time and threads of
  /// the rank that had most.
  LoadStats load = {};
  /// [repeats] all layers once, queued without a wait between them; the slowest rank of each.
  std::vector<double> pass_us;
};

/// Runs the layers on every rank: each by itself, `repeats` times, and as often again where its
/// experts move; then all of them in a row. All
/// ranks fail or none; the first cause is thrown. The result is the reporter's; other processes
/// get an empty one.
/// Throws: kInvalidArgument for more outputs than kMaxOutputBytes; they are kept to be verified.
[[nodiscard]] RunResult run_layers(const LayerRunConfig& config, const Checkpoint& checkpoint,
                                   Launch& launch);
inline constexpr std::int64_t kMaxOutputBytes = std::int64_t{8} << 30;

/// What the device of rank 0 can read, measured while no rank runs.
[[nodiscard]] double measure_ceiling(const LayerRunConfig& config);

/// Of this process so far.
[[nodiscard]] double peak_resident_bytes();

/// Compares `num_rows` tokens, spread evenly over all, with the float64 reference.
[[nodiscard]] VerifyReport verify_layer(const LayerRunConfig& config, const Checkpoint& checkpoint,
                                        const LayerRunResult& result,
                                        const std::vector<Workload>& loads, std::int64_t num_rows);

}  // namespace sluice::cli
