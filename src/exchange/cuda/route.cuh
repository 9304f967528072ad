// route.cuh - which row each top-k entry gets: counts of all ranks, first rows of all experts, then
// one entry after another.
#pragma once

#include <cuda_runtime.h>

#include "exchange/cuda/protocol.cuh"

namespace sluice::cuda {

/// Rows have been given; a capacity is exceeded; counts of a rank did not arrive.
enum class RouteResult { kPlaced, kRefused, kMissing };

/// Thread i's share of experts: every rank's counts of them, waited for. Adds those of lower ranks
/// to next[e] and replaces total[e] by the sum over all. Returns the ranks whose counts did not
/// arrive, a bit each.
__device__ inline unsigned long long gather_counts(const SlotParams& p, std::uint64_t epoch,
                                                   int* total, int* next) {
  constexpr int kBatch = 8;
  const int ranks = p.window.num_ranks;
  const auto tag = static_cast<std::uint32_t>(epoch);
  unsigned long long missing = 0;
  const std::uint64_t begin = ptx::global_timer();
  for (int e = static_cast<int>(threadIdx.x); e < p.placement.num_experts();
       e += kDispatchThreads) {
    int below = 0, all = 0;
    for (int r0 = 0; r0 < ranks; r0 += kBatch) {
      std::uint64_t word[kBatch];
      for (;;) {
        bool fresh = true;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (r0 + i < ranks) {
            word[i] = p.window.word(p.counts, (r0 + i) * p.placement.num_experts() + e);
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (r0 + i < ranks) fresh &= static_cast<std::uint32_t>(word[i] >> 32) == tag;
        }
        if (fresh) break;
        if (ptx::global_timer() - begin > p.timeout_ns || has_failed(p)) {
          for (int i = 0; i < kBatch && r0 + i < ranks; ++i) {
            if (static_cast<std::uint32_t>(word[i] >> 32) != tag) missing |= 1ull << (r0 + i);
          }
          break;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (r0 + i >= ranks) break;
        const int count = static_cast<int>(word[i] & 0xffffffffu);
        all += count;
        if (r0 + i < p.window.rank) below += count;
      }
    }
    total[e] = all;
    next[e] += below;
  }
  return missing;
}

/// Low-latency: expert e's rows begin at its own max_m; the experts are those of gather_counts(),
/// so no barrier lies between. True: a capacity is exceeded.
__device__ inline bool place_masked(const SlotParams& p, const int* total, int* next) {
  bool over = false;
  for (int e = static_cast<int>(threadIdx.x); e < p.placement.num_experts();
       e += kDispatchThreads) {
    const int local = p.placement.local_of(e), begin = local * p.max_m;
    next[e] += begin;
    if (blockIdx.x == 0 && p.placement.rank_of(e) == p.window.rank) p.row_begin[local] = begin;
    if (total[e] <= p.max_m) continue;
    over = true;
    if (blockIdx.x == 0) {
      const int slots = p.placement.num_experts();
      const int expert =
          p.slots == nullptr ? e : static_cast<int>(p.slots[p.num_experts + 1 + slots + e]);
      record_fault(p, kRefusal,
                   {.kind = kOverCapacity, .where = expert, .count = total[e], .value = p.max_m});
    }
  }
  return over;
}

/// Normal mode: the experts of a rank one after another, by a scan of one warp for each rank.
__device__ inline void place_contiguous(const SlotParams& p, const int* total, int* next) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_local = p.placement.num_local();
  for (int r = tid / 32; r < p.window.num_ranks; r += kDispatchThreads / 32) {
    int carry = 0;
    for (int base = 0; base < num_local; base += 32) {
      const int local = base + lane, e = p.placement.expert_of(r, local);
      const int mine = local < num_local ? total[e] : 0;
      int sum = mine;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, d);
        if (lane >= d) sum += other;
      }
      if (local < num_local) {
        next[e] += carry + sum - mine;
        if (blockIdx.x == 0 && r == p.window.rank) p.row_begin[local] = carry + sum - mine;
      }
      carry += __shfl_sync(kAllLanes, sum, 31);
    }
  }
}

/// With every rank's counts: total[e] becomes the sum over ranks, next[e] the row of this CTA's
/// first entry with expert e. All threads get the same answer.
__device__ inline RouteResult place_experts(const SlotParams& p, std::uint64_t epoch, int* total,
                                            int* next) {
  const unsigned long long missing = gather_counts(p, epoch, total, next);
  const bool over = missing == 0 && p.max_m > 0 && place_masked(p, total, next);
  if (__syncthreads_or(missing != 0) != 0) {
    __shared__ unsigned long long all_missing;
    if (threadIdx.x == 0) all_missing = 0;
    __syncthreads();
    if (missing != 0) atomicOr(&all_missing, missing);
    __syncthreads();
    if (threadIdx.x == 0) {
      fail_exchange(p, {.kind = kPeerMissing,
                        .operation = kDispatchCounts,
                        .epoch = epoch,
                        .missing = all_missing,
                        .expected = epoch,
                        .seen = 0});
    }
    return RouteResult::kMissing;
  }
  if (p.max_m > 0)
    return __syncthreads_or(over) != 0 ? RouteResult::kRefused : RouteResult::kPlaced;
  place_contiguous(p, total, next);
  __syncthreads();
  return RouteResult::kPlaced;
}

/// One warp gives the entries [first, first + count) their rows, in order. `expert`: theirs, or
/// null.
__device__ inline void assign_rows(const SlotParams& p, const DispatchParams& d, int first,
                                   int count, const int* expert, int* next, std::int64_t* place) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    const int e = i >= count ? -1 : expert != nullptr ? expert[i] : expert_of(p, d, first + i);
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int before = __popc(same & ((1u << lane) - 1));
    std::int64_t at = -1;
    if (e >= 0) at = std::int64_t{p.placement.rank_of(e)} << 32 | (next[e] + before);
    __syncwarp();
    if (e >= 0 && before == 0) next[e] += __popc(same);
    __syncwarp();
    if (i < count) place[i] = at;
  }
}

}  // namespace sluice::cuda
