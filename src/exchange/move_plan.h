// move_plan.h - in which order experts travel from one placement to another, within little memory.
//
//   slot 0 [A] --------> slot 5          a round: every rank sends, copies within itself, receives,
//   slot 5 [B] --------> slot 0          in this order; so two slots of two ranks change places in
//                                        one round
//
// A slot is written in the round in which its old expert leaves for the last time, or later.
// Experts that change places in a ring go in one round if it has room for all of them; else one of
// the ring is kept aside first. Every rank makes the same plan.
#pragma once

#include <vector>

#include "sluice/placement.h"

namespace sluice {

/// The contents of `from` go to `to`. Both are slots; or num_slots + r, which is the memory of rank
/// r for the one expert that it may keep aside.
struct ExpertMove {
  int expert = 0, from = 0, to = 0;
  [[nodiscard]] friend bool operator==(const ExpertMove&, const ExpertMove&) noexcept = default;
};

struct MovePlan {
  int num_slots = 0, slots_per_rank = 0;
  /// A round's moves, in the order in which copies within a rank are made.
  std::vector<std::vector<ExpertMove>> rounds;
  [[nodiscard]] bool is_aside(int place) const noexcept { return place >= num_slots; }
  [[nodiscard]] int rank_of(int place) const noexcept {
    return is_aside(place) ? place - num_slots : place / slots_per_rank;
  }
};

/// A rank sends, and receives into slots, at most `max_per_round` experts in a round. Of an
/// expert's replicas the one on the same rank is the source; else one that stays; else that of the
/// rank that sends least.
/// Requires: placements of the same experts, ranks and slots; max_per_round >= 1.
[[nodiscard]] MovePlan plan_moves(const Placement& from, const Placement& to, int max_per_round);

}  // namespace sluice
