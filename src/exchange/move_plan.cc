#include "exchange/move_plan.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

/// One plan in the making.
class Planner {
 public:
  Planner(const Placement& from, const Placement& to, int max_per_round)
      : max_per_round_(max_per_round), readers_(static_cast<std::size_t>(to.num_slots())) {
    plan_.num_slots = to.num_slots();
    plan_.slots_per_rank = to.slots_per_rank();
    aside_used_.resize(static_cast<std::size_t>(to.num_ranks()));
    sends_.resize(static_cast<std::size_t>(to.num_ranks()));
    receives_.resize(static_cast<std::size_t>(to.num_ranks()));
    choose_sources(from, to);
  }

  [[nodiscard]] MovePlan plan() {
    while (!left_.empty()) {
      round_.clear();
      std::ranges::fill(sends_, 0);
      std::ranges::fill(receives_, 0);
      if (!pick_all()) {
        break_rings();
        (void)pick_all();
        SLUICE_ASSERT(!round_.empty());
      }
      plan_.rounds.push_back(round_);
    }
    return std::move(plan_);
  }

 private:
  static std::size_t at(int i) { return static_cast<std::size_t>(i); }

  void choose_sources(const Placement& from, const Placement& to) {
    std::vector<int> total(sends_.size());
    for (int slot = 0; slot < to.num_slots(); ++slot) {
      const int expert = to.expert_of(slot);
      if (expert == kEmptySlot || from.expert_of(slot) == expert) continue;
      const auto cost = [&](int source) {
        const int rank = to.rank_of(source);
        return std::tuple(rank != to.rank_of(slot), to.expert_of(source) != expert, total[at(rank)],
                          source);
      };
      const std::span<const int> sources = from.slots_of(expert);
      const int source = *std::ranges::min_element(sources, {}, cost);
      if (to.rank_of(source) != to.rank_of(slot)) ++total[at(to.rank_of(source))];
      left_.push_back({.expert = expert, .from = source, .to = slot});
      ++readers_[at(source)];
    }
  }

  /// Adds every move that the round has room for; true if there was one.
  bool pick_all() {
    bool any = false;
    for (bool more = true; more;) {
      more = false;
      std::erase_if(left_, [&](const ExpertMove& move) {
        if (!pick(move)) return false;
        return more = any = true;
      });
    }
    return any;
  }

  bool pick(const ExpertMove& move) {
    if (readers_[at(move.to)] > 0) return false;
    const int source = plan_.rank_of(move.from), target = plan_.rank_of(move.to);
    if (source != target) {
      if (sends_[at(source)] == max_per_round_ || receives_[at(target)] == max_per_round_) {
        return false;
      }
      ++sends_[at(source)];
      ++receives_[at(target)];
    }
    if (!plan_.is_aside(move.from)) {
      --readers_[at(move.from)];
    } else if (std::ranges::find(round_, move.from, &ExpertMove::to) != round_.end()) {
      return false;  // It arrives at the end of this round.
    } else {
      aside_used_[at(source)] = 0;
    }
    round_.push_back(move);
    return true;
  }

  /// Every move waits for another one: what is left are rings, each slot read once. A ring that the
  /// round has room for is turned at once. Of the others, as many as there are ranks for them, one
  /// expert is kept aside on the rank that wants it.
  void break_rings() {
    std::vector<bool> visited(readers_.size());
    const std::vector<ExpertMove> moves = left_;
    for (const ExpertMove& move : moves) {
      if (visited[at(move.from)]) continue;
      std::vector<ExpertMove> ring;
      for (ExpertMove next = move; !visited[at(next.from)];) {
        visited[at(next.from)] = true;
        ring.push_back(next);
        next = *std::ranges::find(moves, next.to, &ExpertMove::from);
      }
      if (!turn(ring)) keep_aside(ring.front());
    }
  }

  [[nodiscard]] bool is_local(const ExpertMove& move) const {
    return plan_.rank_of(move.from) == plan_.rank_of(move.to);
  }

  /// All moves of a ring in this round: true if it has room for them. What a slot of the ring held
  /// is read first, since sends come before copies, copies before what arrives, and of two copies
  /// the one comes first that reads what the other writes.
  bool turn(std::vector<ExpertMove> ring) {
    const auto remote =
        std::ranges::find_if_not(ring, [&](const ExpertMove& move) { return is_local(move); });
    if (remote == ring.end()) return false;
    std::vector<int> sends = sends_, receives = receives_;
    for (const ExpertMove& move : ring) {
      if (is_local(move)) continue;
      if (++sends[at(plan_.rank_of(move.from))] > max_per_round_) return false;
      if (++receives[at(plan_.rank_of(move.to))] > max_per_round_) return false;
    }
    sends_ = std::move(sends), receives_ = std::move(receives);
    std::ranges::rotate(ring, remote);
    std::ranges::reverse(ring);
    for (const ExpertMove& move : ring) {
      --readers_[at(move.from)];
      std::erase(left_, move);
      round_.push_back(move);
    }
    return true;
  }

  void keep_aside(const ExpertMove& move) {
    const int source = plan_.rank_of(move.from), target = plan_.rank_of(move.to);
    if (aside_used_[at(target)] != 0) return;
    if (source != target) {
      if (sends_[at(source)] == max_per_round_) return;
      ++sends_[at(source)];
    }
    aside_used_[at(target)] = 1;
    const int aside = plan_.num_slots + target;
    round_.push_back({.expert = move.expert, .from = move.from, .to = aside});
    --readers_[at(move.from)];
    std::ranges::find(left_, move)->from = aside;
  }

  MovePlan plan_;
  int max_per_round_;
  std::vector<ExpertMove> left_;       // By slot.
  std::vector<int> readers_;           // [num_slots] moves left that read the slot.
  std::vector<char> aside_used_;       // [num_ranks]
  std::vector<int> sends_, receives_;  // [num_ranks] of the round.
  std::vector<ExpertMove> round_;
};

}  // namespace

MovePlan plan_moves(const Placement& from, const Placement& to, int max_per_round) {
  return Planner(from, to, max_per_round).plan();
}

}  // namespace sluice
