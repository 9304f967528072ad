// placement.h - which rank has an expert, and at which index there.
//
// This is the one place that knows it: host code and kernels ask, and compute nothing themselves.
// An expert's index on its rank is called its local expert.
#pragma once

#ifdef __CUDACC__
#define SLUICE_HOST_DEVICE __host__ __device__
#else
#define SLUICE_HOST_DEVICE
#endif

namespace sluice {

/// Placement of num_experts experts over num_ranks ranks. It is contiguous: rank 0 has the first
/// num_experts / num_ranks experts, rank 1 the next ones. All ranks hold the same value.
///
/// Trivially copyable, so kernels take it by value. The number of local experts is divided out
/// once, when the value is made.
///
/// Experts that move and repeat will be added here, as two tables in memory that the caller holds:
/// from a rank's local experts to experts, and from an expert to its replicas. A replica must then
/// be chosen by (source rank, token, top-k entry) alone, never by load or time, because the order
/// of an expert's rows, and so every bit that follows, must not differ between runs.
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

}  // namespace sluice

#undef SLUICE_HOST_DEVICE
