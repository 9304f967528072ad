// network_model.h - predicts dispatch, experts, combine and a whole layer over one or many hosts.
//
//   RoutingRule, Placement --even_spread()--> TokenSpread      hosts and ranks that a token needs
//   MachineModel, ClusterLayer, TokenSpread --predict_layer()--> LayerPrediction
//
// A machine is a few numbers: rates, latencies and a measured table of the experts' stage. Bytes
// follow from the exchange's own formulas. No time is fitted to a cluster; docs/clusters.md has the
// formulas, where they come from, and how far they are from every figure that was measured.
//
// Times are microseconds, rates 1e9 bytes per second and direction. Everything here is plain host
// code: no rank, no device, no clock.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/lab/token_spread.h"
#include "sluice/recipe.h"

namespace sluice {

/// Which scales the experts' GEMMs meet, since that decides their kernel.
enum class StageScales {
  kGroup,   ///< One per 128 channels: direct, direct-bf16.
  kStatic,  ///< The layer's: static, bf16-static, requant-static, pow2-static.
  kToken,   ///< GEMM1's is one for each row: direct-token.
};

[[nodiscard]] StageScales stage_scales(const Recipe& recipe) noexcept;

/// Times of the experts' stage, measured with as many rows for each of `num_experts` experts.
/// Between the sizes that were measured, time is linear.
struct StageTable {
  WeightFormat weight_format = WeightFormat::kInt4;
  int group_size = 128;
  StageScales scales = StageScales::kGroup;
  int num_experts = 0, hidden = 0, intermediate = 0;
  /// What a stage takes besides its experts: where the line over the number of experts meets zero.
  double fixed_us = 0;
  std::vector<int> rows = {};  ///< Of each expert, ascending.
  std::vector<double> us = {};
  /// One expert alone cannot use the whole device: a stage takes no less than its fullest expert.
  std::vector<int> one_expert_rows = {};
  std::vector<double> one_expert_us = {};
};

/// Who sends what to whom.
enum class ExchangeRules {
  kSluice,            ///< A row once to each host; low-latency mode in fixed pieces. exchange.md.
  kDeepEpLowLatency,  ///< DeepEP's low-latency kernels: a row for each entry, straight to its rank.
  kDeepEpNormal,      ///< DeepEP's normal kernels: a row once to each host, once to each rank.
};

/// Parameters of a machine. A rate or latency that is 0 is one that the machine does not have;
/// set_parameter() takes no rate below 0.001.
struct MachineModel {
  std::string name;
  std::string about;  ///< One line.
  ExchangeRules rules = ExchangeRules::kSluice;
  int ranks_per_device = 1;  ///< That share its memory and its SMs; no link lies between them.
  double network_gbytes_per_s = 0;
  double network_latency_us = 0;
  double network_peer_us = 0;
  double host_sync_us = 0;
  double push_gbytes_per_s = 0;
  double pull_gbytes_per_s = 0;
  double dispatch_fixed_us = 0;
  double combine_fixed_us = 0;
  double normal_fixed_us = 0;
  double place_gbytes_per_s = 0;
  double memory_gbytes_per_s = 0;
  double overlap = 0;
  double stage_factor = 1;
  std::vector<StageTable> stages = {};
};

/// One number of MachineModel: what `plan --set NAME=VALUE` and "parameters" of a file may give.
struct MachineParameter {
  const char* name;
  const char* unit;
  const char* meaning;
  double MachineModel::*value;
  double low, high;  ///< Limits, both included.
};
[[nodiscard]] std::span<const MachineParameter> machine_parameters() noexcept;

/// Throws: kInvalidArgument naming the parameter, the value and its limits, or listing the names.
void set_parameter(MachineModel& machine, std::string_view name, double value);

/// Built-in machines; machine_source() says where each number of theirs comes from.
[[nodiscard]] std::vector<std::string> machine_names();
/// Throws: kInvalidArgument listing the names.
[[nodiscard]] MachineModel machine_preset(std::string_view name);
/// Empty for a number that the preset leaves at 0.   Throws: kInvalidArgument.
[[nodiscard]] std::string machine_source(std::string_view machine, std::string_view parameter);

/// A JSON object with "parameters" {name: number}, and "base", a preset for all others; other keys
/// are left alone, so that what `bench exchange --calibrate --json` writes is such a file.
/// Throws: kIo; kCorruptFile naming file and key; kInvalidArgument as set_parameter().
[[nodiscard]] MachineModel read_machine(const std::filesystem::path& path);

/// The layer, the ranks, and what they bring.
struct ClusterLayer {
  ModelGeometry geometry;
  Recipe recipe = {};
  Mode mode = Mode::kLowLatency;
  int num_hosts = 1, num_ranks = 8;
  int tokens_per_rank = 128;
  /// Order of the sum, as in ExchangeConfig: 1 sends every row home, all others one sum for each
  /// token and host.
  int sum_parts = 0;
  /// Low-latency mode over several hosts: records that a piece has room for, at least the mean
  /// number of the fullest host's, at most tokens_per_rank; 0: tokens_per_rank.
  int piece_tokens = 0;
};

/// Dispatch or combine. Each part is what it takes alone; `total_us` is less where parts overlap.
struct StepPrediction {
  double latency_us = 0;  ///< Fixed parts: kernels, flags, network latency, waits for the CPU.
  double network_us = 0, link_us = 0, memory_us = 0;
  double total_us = 0;
  double network_bytes = 0;  ///< Sent by one rank to other hosts, mean over the ranks.
  double link_bytes = 0;     ///< Sent by one rank to others of its host, mean over the ranks.
};

/// Parts of a layer's time that nothing hides; they add up to layer_us.
struct TimeShares {
  double latency_us = 0, network_us = 0, link_us = 0, memory_us = 0, weights_us = 0,
         products_us = 0;
};

struct LayerPrediction {
  StepPrediction dispatch, combine;
  double stage_us = 0;  ///< Of the slowest rank, with the receiver's cast where a recipe has one.
  double layer_us = 0;
  double rows_per_expert = 0;  ///< Mean over the slots.
  double hosts_per_token = 0;  ///< Other hosts than the token's own.
  double bytes_per_host = 0;   ///< That a host sends over the network in a layer; receives as much.
  TimeShares shares;
  /// The largest of latency, network, link + memory, and weights + products. The last two are
  /// "inside a host (link)" or "(memory)", "experts (weights)" or "(products)", by the larger one.
  std::string bound;
};

/// By the machine's rules. Throws: kInvalidArgument naming the field; for a machine without what
/// the prediction needs, the parameter.
[[nodiscard]] StepPrediction predict_dispatch(const MachineModel& machine,
                                              const ClusterLayer& layer, const TokenSpread& spread);
[[nodiscard]] StepPrediction predict_combine(const MachineModel& machine, const ClusterLayer& layer,
                                             const TokenSpread& spread);

/// The experts of the slowest rank. Rows of a slot are a Poisson number, since each token chooses
/// by itself. Throws: as above; kUnsupported naming weights and recipe without a table.
[[nodiscard]] double predict_stage(const MachineModel& machine, const ClusterLayer& layer,
                                   const TokenSpread& spread);
/// The stage of experts with `rows` rows each, as they are.
[[nodiscard]] double stage_time(const StageTable& table, const ModelGeometry& geometry,
                                std::span<const double> rows);

[[nodiscard]] LayerPrediction predict_layer(const MachineModel& machine, const ClusterLayer& layer,
                                            const TokenSpread& spread);

/// What a layer would take if one parameter were 30 % less, or more.
struct Sensitivity {
  const MachineParameter* parameter;
  double less_us = 0, more_us = 0;  ///< Change of layer_us.
};
/// Parameters that change nothing are left out; the largest change comes first.
[[nodiscard]] std::vector<Sensitivity> sensitivities(const MachineModel& machine,
                                                     const ClusterLayer& layer,
                                                     const TokenSpread& spread);

/// Times over bytes as a line, us = fixed_us + bytes / (1e3 gbytes_per_s).
struct LineFit {
  double fixed_us = 0, gbytes_per_s = 0;
  double rms_error = 0;    ///< Root of the mean square of (line - us) / us.
  double worst_error = 0;  ///< The largest of these, by magnitude.
};
struct SizeTime {
  double bytes = 0, us = 0;
};
/// The line with the smallest sum of squares of relative errors, so that small sizes count as much
/// as large ones. Where the line would meet zero below 0, the one through 0.
/// Throws: kInvalidArgument for fewer than two different sizes, for what is not positive, and where
///   times do not grow with bytes.
[[nodiscard]] LineFit fit_line(std::span<const SizeTime> points);

/// network_latency_us of a machine whose dispatch and combine over `num_hosts` hosts of one rank
/// take `fixed_us` on average without their bytes: what its other fixed times leave of that, or 0
/// where they are more.
[[nodiscard]] double network_latency_of(const MachineModel& machine, Mode mode, int num_hosts,
                                        double fixed_us);

}  // namespace sluice
