// placement.h - which physical slot holds which logical expert.
//
//   logical experts      0    1    2    3    4    5         what routers, checkpoints, statistics
//                        |    |   / \   |    |    |         and messages speak of
//   physical slots     [ 0 |  1 | 2 ]  [2 | 3 | 4 | 5 ...   what ranks hold and rows go to
//                        rank 0          rank 1
//
// A rank holds num_slots / num_ranks slots: rank r those from r * slots_per_rank() on. A slot holds
// one expert or is empty; an expert is in one slot or in several, which are its replicas. Replicas
// share the rows of a hot expert. Empty slots let any number of experts live on any number of
// ranks: 384 experts on 5 ranks take 385 slots.
//
// Outputs do not depend on the placement, bit for bit: a replica has the same weights, a row's bits
// do not depend on the rows beside it, and combine() adds in the order of the top-k entries.
//
// A plain value without a device. Its vectors are what a file would hold: slot_experts() is the
// "physical to logical map" of other engines, slots_of() their "logical to physical map".
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace sluice {

/// What slot_experts() says of an empty slot.
inline constexpr int kEmptySlot = -1;

class Placement {
 public:
  static constexpr int kMaxSlots = 1 << 16;

  /// No experts and no slots: what a configuration holds before somebody sets it.
  Placement() = default;

  /// `slot_experts` [num_slots]: the expert in each slot, or kEmptySlot.
  /// Throws: kInvalidArgument naming field, value and limit: num_experts or num_ranks that is not
  ///   positive; a number of slots that is no multiple of num_ranks or exceeds kMaxSlots; a slot
  ///   whose expert is not in [0, num_experts); an expert without a slot.
  [[nodiscard]] static Placement create(int num_experts, int num_ranks,
                                        std::vector<int> slot_experts);

  /// Expert e in slot e.   Throws: kInvalidArgument unless num_ranks divides num_experts.
  [[nodiscard]] static Placement identity(int num_experts, int num_ranks);

  /// Each expert once, in order, and as many on each rank as on the others, give or take one: rank
  /// r has experts [E r / R, E (r + 1) / R), and its last slots are empty. With as many slots as
  /// experts this is identity().
  /// Throws: kInvalidArgument if num_slots is no multiple of num_ranks, or too few or too many.
  [[nodiscard]] static Placement even(int num_experts, int num_ranks, int num_slots);

  [[nodiscard]] int num_experts() const noexcept { return num_experts_; }
  [[nodiscard]] int num_ranks() const noexcept { return num_ranks_; }
  [[nodiscard]] int num_slots() const noexcept { return static_cast<int>(slot_experts_.size()); }
  /// The same on every rank; 0 without ranks.
  [[nodiscard]] int slots_per_rank() const noexcept {
    return num_ranks_ == 0 ? 0 : num_slots() / num_ranks_;
  }
  [[nodiscard]] int rank_of(int slot) const noexcept { return slot / slots_per_rank(); }

  /// [num_slots] expert of each slot, or kEmptySlot.
  [[nodiscard]] std::span<const int> slot_experts() const noexcept { return slot_experts_; }
  [[nodiscard]] int expert_of(int slot) const {
    return slot_experts_[static_cast<std::size_t>(slot)];
  }
  /// Slots of rank `rank` alone: [slots_per_rank].
  [[nodiscard]] std::span<const int> slot_experts(int rank) const {
    return slot_experts().subspan(
        static_cast<std::size_t>(rank) * static_cast<std::size_t>(slots_per_rank()),
        static_cast<std::size_t>(slots_per_rank()));
  }
  /// The slots that hold `expert`, ascending; at least one.
  [[nodiscard]] std::span<const int> slots_of(int expert) const {
    const auto e = static_cast<std::size_t>(expert);
    const auto begin = static_cast<std::size_t>(begin_[e]);
    return std::span(expert_slots_).subspan(begin, static_cast<std::size_t>(begin_[e + 1]) - begin);
  }
  [[nodiscard]] int num_replicas(int expert) const {
    return begin_[static_cast<std::size_t>(expert) + 1] - begin_[static_cast<std::size_t>(expert)];
  }

  /// The slot to which the row of top-k entry `k` of token `token` of rank `source_rank` goes, if
  /// the entry chose `expert`. It depends on these numbers alone, never on load or time:
  ///
  ///   u    = token * 0x9e3779b9 + source_rank * 0xd1b54a33 + k * 0x8cb92ba7     (mod 2^32)
  ///   slot = slots_of(expert)[u * num_replicas / 2^32]
  ///
  /// The factors are multiples of golden-ratio kind: among tokens in sequence, and among every
  /// second or fourth of them, each replica gets its share to within a few rows.
  [[nodiscard]] int slot_of_row(int expert, int source_rank, int token, int k) const;

  /// Expert e is in slot e, and there are no other slots.
  [[nodiscard]] bool is_identity() const noexcept;
  /// Of everything above: equal values have equal digests. Ranks compare it.
  [[nodiscard]] std::uint64_t digest() const noexcept;

  [[nodiscard]] friend bool operator==(const Placement& a, const Placement& b) noexcept {
    return a.num_experts_ == b.num_experts_ && a.num_ranks_ == b.num_ranks_ &&
           a.slot_experts_ == b.slot_experts_;
  }

 private:
  int num_experts_ = 0, num_ranks_ = 0;
  std::vector<int> slot_experts_;
  std::vector<int> begin_, expert_slots_;  // Slots by expert, one after the other.
};

}  // namespace sluice
