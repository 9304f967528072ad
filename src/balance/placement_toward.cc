// A move between two placements in parts, each of which leaves every expert a slot.
#include <algorithm>
#include <vector>

#include "core/fail.h"
#include "sluice/balance.h"

namespace sluice {
namespace {

std::size_t at(int i) {
  return static_cast<std::size_t>(i);
}

class NextPart {
 public:
  NextPart(const Placement& from, const Placement& to, int max_received)
      : from_(from),
        to_(to),
        slots_(from.slot_experts().begin(), from.slot_experts().end()),
        replicas_(at(from.num_experts())),
        room_(at(from.num_ranks()), max_received) {
    for (int e = 0; e < from.num_experts(); ++e) replicas_[at(e)] = from.num_replicas(e);
  }

  [[nodiscard]] Placement make() {
    while (take_all()) {
    }
    for (int slot = 0; slot < to_.num_slots(); ++slot) turn_ring(slot);
    // A replica that ends may be what lets another slot's expert go, so it ends last.
    if (wanted_are_there()) slots_.assign(to_.slot_experts().begin(), to_.slot_experts().end());
    return Placement::create(from_.num_experts(), from_.num_ranks(), slots_);
  }

 private:
  [[nodiscard]] bool is_right(int slot) const { return slots_[at(slot)] == to_.expert_of(slot); }
  [[nodiscard]] bool wanted_are_there() const {
    for (int slot = 0; slot < to_.num_slots(); ++slot) {
      if (to_.expert_of(slot) != kEmptySlot && !is_right(slot)) return false;
    }
    return true;
  }

  /// Whether `rank` may get `expert` in this part; if so, it counts.
  bool receive(int rank, int expert) {
    const std::span<const int> here = from_.slot_experts(rank);
    if (std::ranges::find(here, expert) != here.end()) return true;
    if (room_[at(rank)] == 0) return false;
    --room_[at(rank)];
    return true;
  }
  void put(int slot, int expert) {
    const int old = slots_[at(slot)];
    if (old != kEmptySlot) --replicas_[at(old)];
    ++replicas_[at(expert)];
    slots_[at(slot)] = expert;
  }

  /// Every slot whose expert is wanted there and whose old one has another slot; true if any.
  bool take_all() {
    bool any = false;
    for (int slot = 0; slot < to_.num_slots(); ++slot) {
      const int wanted = to_.expert_of(slot), old = slots_[at(slot)];
      if (wanted == kEmptySlot || is_right(slot)) continue;
      if (old != kEmptySlot && replicas_[at(old)] == 1) continue;
      if (!receive(to_.rank_of(slot), wanted)) continue;
      put(slot, wanted);
      any = true;
    }
    return any;
  }

  /// Where `first` is in a ring of slots, each wanting the only replica that the one before holds:
  /// turns as much of it as there is room for. The expert that is left over goes into `first`.
  void turn_ring(int first) {
    if (to_.expert_of(first) == kEmptySlot || is_right(first)) return;
    std::vector<int> ring;  // No slot comes twice: each wants one expert, which is in one slot.
    for (int slot = first; ring.empty() || slot != first;) {
      ring.push_back(slot);
      const int expert = slots_[at(slot)];
      if (expert == kEmptySlot || replicas_[at(expert)] != 1) return;  // No ring: take_all() can.
      slot = *std::ranges::find_if(to_.slots_of(expert), [&](int s) { return !is_right(s); });
    }
    const auto expert_before = [&, before = slots_](std::size_t i) { return before[at(ring[i])]; };
    std::size_t turned = 0;
    for (std::size_t i = 1; i < ring.size(); ++i, ++turned) {
      const std::vector<int> room = room_;
      if (!receive(to_.rank_of(ring[i]), expert_before(i - 1))) break;
      const std::vector<int> room_with_it = room_;
      const bool fits = receive(to_.rank_of(first), expert_before(i));
      room_ = fits ? room_with_it : room;
      if (!fits) break;
      slots_[at(ring[i])] = expert_before(i - 1);
    }
    if (turned == 0) return;
    (void)receive(to_.rank_of(first), expert_before(turned));
    slots_[at(first)] = expert_before(turned);
  }

  const Placement &from_, &to_;
  std::vector<int> slots_;     // [num_slots] as they are at the end of this part.
  std::vector<int> replicas_;  // [num_experts] of slots_.
  std::vector<int> room_;      // [num_ranks] experts that the rank may still receive.
};

}  // namespace

Placement placement_toward(const Placement& from, const Placement& to, int max_received) {
  const auto check_same = [](const char* what, int before, int after) {
    check_argument(before == after, "placements with {} {} and with {}", before, what, after);
  };
  check_same("experts", from.num_experts(), to.num_experts());
  check_same("ranks", from.num_ranks(), to.num_ranks());
  check_same("slots", from.num_slots(), to.num_slots());
  check_argument(max_received >= 1, "max_received {} is less than 1", max_received);
  return NextPart(from, to, max_received).make();
}

}  // namespace sluice
