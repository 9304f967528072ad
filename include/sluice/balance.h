// balance.h - which experts to repeat and where to put them, given how many rows each one gets.
//
//   rows of each expert              Placement
//   [num_experts]                       ^
//      |                                |
//      | replicate: spare slots go to the experts with the most rows per replica
//      | pack:      the heaviest first, each to the rank with the fewest rows
//      | improve:   the fullest rank exchanges, ends or repeats experts while it gets less full
//      +--------------------------------+
//
// Replicas of an expert share its rows evenly (Placement::slot_of_row()), so a rank's expected rows
// are a sum over its slots. No rank gets two replicas of one expert.
//
// Host code alone. The same arguments give the same result on every machine, so ranks that have the
// same counts need not agree on a placement. docs/placement.md compares it with the published EPLB.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/placement.h"

namespace sluice {

/// What there is to place experts into.
struct BalanceConfig {
  static constexpr int kMaxRanks = 4096;  ///< Time and memory grow with the square of the ranks.
  int num_ranks = 0;                      ///< At most kMaxRanks.
  int num_slots = 0;  ///< Of all ranks: a multiple of num_ranks, at least num_experts.
  /// Hosts that the ranks are on, as many on each: host h has the h-th part of the ranks. With more
  /// than one, all replicas of an expert are on one host.
  int num_hosts = 1;
  /// Groups of consecutive experts that stay together on one host, for routers that choose groups
  /// before experts. Divides num_experts. 0: every expert by itself.
  int num_groups = 0;
};

/// A placement that makes the fullest rank's expected rows small.
///
/// Slots stay empty where a replica more would not help: experts without rows are not repeated.
/// rows_per_expert: [num_experts], none negative.
/// previous: where the experts are now, with the same numbers. Ranks are then numbered so that many
///   experts stay on theirs, and an expert that stays keeps its slot. Empty: nowhere.
/// Throws: kInvalidArgument naming field, value and limit.
/// Cost:   0.1 ms for 256 experts in 288 slots of 8 ranks, 3 ms in 288 slots of 72.
[[nodiscard]] Placement balance(std::span<const std::int64_t> rows_per_expert,
                                const BalanceConfig& config, const Placement& previous = {});

/// Rows that each rank is to expect: [num_ranks].
/// rows_per_expert: [placement.num_experts()].   Throws: kInvalidArgument.
[[nodiscard]] std::vector<double> expected_rows(std::span<const std::int64_t> rows_per_expert,
                                                const Placement& placement);

/// The largest over the mean: 1 if all are alike, as many as there are if one has everything; 0 if
/// none has anything.   Throws: kInvalidArgument for a value that is not finite or is below 0.
[[nodiscard]] double max_over_mean(std::span<const double> values);

/// Slots of `to` with an expert that their rank does not have in `from`: how many experts' weights
/// a rebalance sends.   Throws: kInvalidArgument if experts or ranks are not as many.
[[nodiscard]] int count_moves(const Placement& from, const Placement& to);

/// A placement on the way from one to another, so that experts can move a few at a time between the
/// steps of a server. Each call with the result of the one before comes closer, and the last one
/// gives `to`. On the way no rank receives more than `max_received` experts from others at a time,
/// and every expert has a slot.
/// Where experts change places in a ring of more ranks than that allows, a part of the ring turns;
/// one expert of it then travels once more for each part.
/// Throws: kInvalidArgument if experts, ranks or slots are not as many, or max_received is less
///   than 1.
[[nodiscard]] Placement placement_toward(const Placement& from, const Placement& to,
                                         int max_received);

}  // namespace sluice
