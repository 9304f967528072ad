#include "sluice/placement.h"

#include <utility>

#include "core/counter_rng.h"
#include "core/fail.h"
#include "exchange/slot_ranks.h"

namespace sluice {
namespace {

void check_sizes(int num_experts, int num_ranks, std::int64_t num_slots) {
  check_argument(num_experts > 0, "placement: num_experts {} is not positive", num_experts);
  check_argument(num_ranks > 0, "placement: num_ranks {} is not positive", num_ranks);
  check_argument(num_slots % num_ranks == 0, "placement: num_slots {} is no multiple of {} ranks",
                 num_slots, num_ranks);
  check_argument(num_slots >= num_experts, "placement: num_slots {} is less than {} experts",
                 num_slots, num_experts);
  check_argument(num_slots <= Placement::kMaxSlots, "placement: num_slots {} exceeds {}", num_slots,
                 int{Placement::kMaxSlots});
}

}  // namespace

Placement Placement::create(int num_experts, int num_ranks, std::vector<int> slot_experts) {
  check_sizes(num_experts, num_ranks, static_cast<std::int64_t>(slot_experts.size()));
  Placement p;
  p.num_experts_ = num_experts;
  p.num_ranks_ = num_ranks;
  p.begin_.assign(static_cast<std::size_t>(num_experts) + 1, 0);
  int num_filled = 0;
  for (std::size_t slot = 0; slot < slot_experts.size(); ++slot) {
    const int expert = slot_experts[slot];
    check_argument(expert >= kEmptySlot && expert < num_experts,
                   "placement: slot {} holds expert {}, which is not in [-1, {})", slot, expert,
                   num_experts);
    if (expert == kEmptySlot) continue;
    ++p.begin_[static_cast<std::size_t>(expert) + 1];
    ++num_filled;
  }
  for (int e = 0; e < num_experts; ++e) {
    const auto i = static_cast<std::size_t>(e);
    check_argument(p.begin_[i + 1] > 0, "placement: expert {} of {} has no slot", e, num_experts);
    p.begin_[i + 1] += p.begin_[i];
  }
  p.expert_slots_.resize(static_cast<std::size_t>(num_filled));
  std::vector<int> next(p.begin_.begin(), p.begin_.end() - 1);
  for (std::size_t slot = 0; slot < slot_experts.size(); ++slot) {
    if (slot_experts[slot] == kEmptySlot) continue;
    int& at = next[static_cast<std::size_t>(slot_experts[slot])];
    p.expert_slots_[static_cast<std::size_t>(at++)] = static_cast<int>(slot);
  }
  p.slot_experts_ = std::move(slot_experts);
  return p;
}

Placement Placement::identity(int num_experts, int num_ranks) {
  return even(num_experts, num_ranks, num_experts);
}

Placement Placement::even(int num_experts, int num_ranks, int num_slots) {
  check_sizes(num_experts, num_ranks, num_slots);
  std::vector<int> slot_experts(static_cast<std::size_t>(num_slots), int{kEmptySlot});
  for (int rank = 0; rank < num_ranks; ++rank) {
    const std::int64_t experts = num_experts;
    const auto begin = static_cast<int>(experts * rank / num_ranks);
    const auto end = static_cast<int>(experts * (rank + 1) / num_ranks);
    auto slot = static_cast<std::size_t>(num_slots / num_ranks) * static_cast<std::size_t>(rank);
    for (int e = begin; e < end; ++e) slot_experts[slot++] = e;
  }
  return create(num_experts, num_ranks, std::move(slot_experts));
}

int Placement::slot_of_row(int expert, int source_rank, int token, int k) const {
  const std::span<const int> slots = slots_of(expert);
  const int replica = replica_of_row(static_cast<int>(slots.size()), source_rank, token, k);
  return slots[static_cast<std::size_t>(replica)];
}

bool Placement::is_identity() const noexcept {
  if (num_slots() != num_experts_) return false;
  for (int slot = 0; slot < num_slots(); ++slot) {
    if (slot_experts_[static_cast<std::size_t>(slot)] != slot) return false;
  }
  return true;
}

std::uint64_t Placement::digest() const noexcept {
  std::uint64_t hash = mix64(static_cast<std::uint64_t>(num_experts_) << 32 |
                             static_cast<std::uint32_t>(num_ranks_));
  for (const int expert : slot_experts_) hash = mix64(hash ^ static_cast<std::uint32_t>(expert));
  return mix64(hash ^ slot_experts_.size());
}

}  // namespace sluice
