// token_spread.h - over how many hosts and ranks the experts of one token lie.
//
// What an exchange sends follows from it: a token crosses the network once for each host that has
// one of its experts, and once for each such rank inside a host.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/placement.h"

namespace sluice {

/// What a router may choose. Experts lie in `num_groups` even parts, in their order. A token takes
/// `num_topk_groups` of these groups and then `num_topk` distinct experts out of them: DeepSeek-V3
/// and R1 have 8 and 4. One group is no limit.
struct RoutingRule {
  int num_experts = 0;
  int num_topk = 0;
  int num_groups = 1;
  int num_topk_groups = 1;
};

/// Expectations for one token, over all tokens alike.
struct TokenSpread {
  std::vector<double> hosts = {};  ///< [num_hosts] probability that it needs the host.
  /// [num_hosts] probability that exactly one of its entries goes there: such a row comes home as
  /// it is, where several entries come home as one sum.
  std::vector<double> one_entry = {};
  std::vector<double> ranks = {};  ///< [num_ranks] probability that it needs the rank.
  std::vector<double> slots = {};  ///< [num_slots] rows of it in the slot.
  /// Of hosts_per_token(): sigma / sqrt(n) of n sampled tokens; 0 where the spread is exact.
  double standard_error = 0;

  [[nodiscard]] double hosts_per_token() const;  ///< Expected distinct hosts.
  [[nodiscard]] double ranks_per_token() const;  ///< Expected distinct ranks.
};

/// Exact, for a router to which all groups and all experts of a group are alike. Host h has the
/// h-th even part of the ranks. Of an expert's replicas each is as likely. A gate that takes the
/// groups with the best scores spreads tokens wider, since it seldom leaves a group it took: 3.97
/// hosts instead of 3.63 with 4 of 8 groups and top-8. For that there is sample_routing().
///
/// With q_e the share of expert e's replicas that lie in a place, a token with the experts S misses
/// the place with probability prod over e in S of (1 - q_e). Summed over all S of num_topk experts
/// out of n, that is the elementary symmetric polynomial of degree num_topk in (1 - q_e), over
/// C(n, num_topk). Where no expert has replicas it is C(n - m, k) / C(n, k) for a place with m of
/// the experts. With groups it is the mean over the sets of num_topk_groups groups. For exactly one
/// entry, one factor of each product is q_e instead.
/// Throws: kInvalidArgument naming the field.
[[nodiscard]] TokenSpread even_spread(const RoutingRule& rule, const Placement& placement,
                                      int num_hosts);

/// Counts what `topk_idx` says: [num_tokens, num_topk] experts, -1 for none. The replica of a row
/// is Placement::slot_of_row() where the tokens come from one rank after another, `tokens_per_rank`
/// from each.
/// Throws: kInvalidArgument naming token, entry and value.
[[nodiscard]] TokenSpread count_spread(std::span<const std::int32_t> topk_idx, int num_topk,
                                       int tokens_per_rank, const Placement& placement,
                                       int num_hosts);

/// [num_tokens, num_topk] experts of tokens that choose expert e in a share num_topk * rows[e] /
/// sum(rows) of the cases. A function of its arguments alone.
///
/// Without groups the shares are exact (systematic sampling over a random order of the experts).
/// With groups each expert of a token arrives after an exponential time of rate -ln(1 - share). The
/// groups whose two earliest arrivals have the largest sum of -ln(time) are taken, as DeepSeek's
/// gate adds the two best scores of a group, and then the first num_topk experts of these. Shares
/// are then exact only where all are alike.
/// rows: [num_experts], as `sluice run --expert-rows` counts them.
/// Throws: kInvalidArgument naming the expert whose share would be more than one row for a token,
///   or if fewer than num_topk experts have rows.
[[nodiscard]] std::vector<std::int32_t> sample_routing(const RoutingRule& rule,
                                                       std::span<const std::int64_t> rows,
                                                       int num_tokens, std::uint64_t seed);

}  // namespace sluice
