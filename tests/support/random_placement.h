// random_placement.h - placements of every kind: permuted, with replicas, with empty slots.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "sluice/placement.h"

namespace sluice::testing {

/// Every expert between once and `max_replicas` times, in slots in any order; the others empty.
inline Placement random_placement(int num_experts, int num_ranks, int num_slots, int max_replicas,
                                  std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  std::vector<int> slots, replicas(static_cast<std::size_t>(num_experts), 1), left;
  for (int e = 0; e < num_experts; ++e) slots.push_back(e), left.push_back(e);
  while (static_cast<int>(slots.size()) < num_slots && max_replicas > 1 && !left.empty()) {
    const std::size_t at = below(left.size());
    slots.push_back(left[at]);
    if (++replicas[static_cast<std::size_t>(left[at])] == max_replicas) {
      left.erase(left.begin() + static_cast<std::ptrdiff_t>(at));
    }
  }
  slots.resize(static_cast<std::size_t>(num_slots), int{kEmptySlot});
  for (std::size_t i = slots.size(); i > 1; --i) std::swap(slots[i - 1], slots[below(i)]);
  return Placement::create(num_experts, num_ranks, slots);
}

}  // namespace sluice::testing
