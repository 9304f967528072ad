// keep_places.h - numbers ranks and slots so that as many experts as possible stay where they are.
#pragma once

#include <span>
#include <vector>

namespace sluice {

/// Reorders `experts` [num_ranks], the experts of each rank: hosts first, then the ranks of each
/// host, each time the pair that has the most experts in common. Rows do not change, since ranks
/// are alike. previous: [num_slots], -1 for an empty slot.
void keep_ranks(std::vector<std::vector<int>>& experts, std::span<const int> previous,
                int num_hosts);

/// The expert of each slot, -1 for an empty one. An expert that its rank has in `previous` keeps
/// its slot; the others take the free slots in ascending order. `previous` may be empty.
[[nodiscard]] std::vector<int> fill_slots(const std::vector<std::vector<int>>& experts,
                                          int num_slots, std::span<const int> previous);

}  // namespace sluice
