// slot_ranks.h - which rank has a slot, and at which index there; which replica a row goes to.
//
// This is the one place that knows it: host code and kernels ask, and compute nothing themselves.
// To an exchange, "experts" are the physical slots of sluice/placement.h. Where a group has no
// slots of its own, they are the logical experts too. A slot's index on its rank is called its
// local expert.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace sluice {

/// Placement of num_experts experts over num_ranks ranks. It is contiguous: rank 0 has the first
/// num_experts / num_ranks experts, rank 1 the next ones. All ranks hold the same value.
///
/// Trivially copyable, so kernels take it by value. The number of local experts is divided out
/// once, when the value is made.
class ExpertPlacement {
 public:
  ExpertPlacement() = default;
  /// num_ranks >= 1 divides num_experts >= 1; ExchangeConfig's checks have seen to it.
  SLUICE_HOST_DEVICE constexpr ExpertPlacement(int num_experts, int num_ranks)
      : num_experts_(num_experts), num_ranks_(num_ranks), num_local_(num_experts / num_ranks) {}

  [[nodiscard]] SLUICE_HOST_DEVICE constexpr int num_experts() const { return num_experts_; }
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr int num_ranks() const { return num_ranks_; }
  /// Experts of each rank.
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr int num_local() const { return num_local_; }

  /// The rank that has `expert`, which is in [0, num_experts).
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr int rank_of(int expert) const {
    return expert / num_local_;
  }
  /// Its index on that rank, in [0, num_local).
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr int local_of(int expert) const {
    return expert - rank_of(expert) * num_local_;
  }
  /// The expert that rank `rank` has at index `local`.
  [[nodiscard]] SLUICE_HOST_DEVICE constexpr int expert_of(int rank, int local) const {
    return rank * num_local_ + local;
  }

 private:
  int num_experts_ = 1, num_ranks_ = 1, num_local_ = 1;
};

/// Which of an expert's `num_replicas` the row of top-k entry `k` of token `token` of `source_rank`
/// goes to: Placement::slot_of_row() says why so.
[[nodiscard]] SLUICE_HOST_DEVICE constexpr int replica_of_row(int num_replicas, int source_rank,
                                                              int token, int k) {
  const std::uint32_t u = static_cast<std::uint32_t>(token) * 0x9e3779b9u +
                          static_cast<std::uint32_t>(source_rank) * 0xd1b54a33u +
                          static_cast<std::uint32_t>(k) * 0x8cb92ba7u;
  return static_cast<int>(std::uint64_t{u} * static_cast<std::uint32_t>(num_replicas) >> 32);
}

}  // namespace sluice
