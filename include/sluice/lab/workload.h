// workload.h - synthetic tokens and routing, for runs, benchmarks and tests.
//
// Token t of a workload depends on (seed, t) alone, so the same global tokens may be spread over
// any number of ranks. Values look like the input of a real MoE layer after its norm: Gaussian with
// log-normal channel gains, some outlier channels and, rarely, a token with massive activations.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "sluice/exchange.h"
#include "sluice/tensor.h"

namespace sluice {

enum class RoutingKind {
  kUniform,     ///< num_topk distinct experts, all equally likely.
  kZipf,        ///< Distinct experts, popularity ~ 1 / (rank + 1), in a seeded order.
  kOneExpert,   ///< Entry 0 of every token is expert 0, the others are empty.
  kDeadExpert,  ///< As kUniform, but the last expert is never chosen.
  kOneHot,      ///< Entry 0 is any expert, equally likely, with weight 1; the others are empty.
};

enum class InputKind {
  kGaussian,   ///< N(0, 1).
  kOutliers,   ///< N(0, 1), eight channels x 40.
  kRealistic,  ///< The statistics above; what `sluice run` uses.
  kStudentT,   ///< Student's t with 4 degrees of freedom, scaled to variance 1.
  kMassive,    ///< N(0, 1); every 16th token has two fixed channels of about 1000.
  /// kOutliers times a log-normal factor per token, e^N(0, 1), at most `max_token_scale`.
  kTokenSpread,
};

/// Throws: kInvalidArgument listing the names.
[[nodiscard]] RoutingKind parse_routing(std::string_view name);

struct WorkloadSpec {
  int num_experts = 0, num_topk = 0, hidden = 0;
  RoutingKind routing = RoutingKind::kUniform;
  InputKind input = InputKind::kRealistic;
  std::uint64_t seed = 1;
  /// kOutliers, kTokenSpread: the eight large channels form this many clusters, 1 to 8. Clusters
  /// are evenly apart; channels of one cluster are neighbours. It matters for scales per group of
  /// 128: only the largest channel of a group is exact, so fewer clusters mean a larger error.
  int num_outlier_places = 8;
  /// kTokenSpread: limit of a token's factor. 1 makes a calibration set without the large tokens.
  double max_token_scale = std::numeric_limits<double>::infinity();
  /// Channels behind the first so many are zeros: ModelGeometry::token_width(). 0: none are.
  int num_channels = 0;
};

/// Host memory for one rank's tokens.
struct Workload {
  std::vector<std::uint16_t> x;        ///< [num_tokens, hidden] bf16 bits
  std::vector<std::int32_t> topk_idx;  ///< [num_tokens, num_topk]
  std::vector<float> topk_weights;     ///< [num_tokens, num_topk] positive, sum 1 per token
  std::int64_t num_tokens = 0;
  int hidden = 0, num_topk = 0;

  [[nodiscard]] TensorView x_view() const;
  [[nodiscard]] Routing routing_view() const;
};

/// Global tokens [first_token, first_token + num_tokens).
[[nodiscard]] Workload make_workload(const WorkloadSpec& spec, std::int64_t first_token,
                                     std::int64_t num_tokens);

}  // namespace sluice
