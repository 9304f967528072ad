// route.cuh - which row each top-k entry gets: counts of all ranks, first rows of all experts, then
// one entry after another. What does not depend on counts is done before they are waited for.
#pragma once

#include <cuda_runtime.h>

#include "exchange/cuda/protocol.cuh"

namespace sluice::cuda {

/// Rows have been given; a capacity is exceeded; counts of a rank did not arrive.
enum class RouteResult { kPlaced, kRefused, kMissing };

/// Ranks of whose counts threads of a CTA did not see those that they waited for, a bit each. In
/// shared memory, where nothing is found at first.
struct LostCounts {
  unsigned long long missing, of_another_layer;  // The former has all of them.
  unsigned long long other;                      // A word for another layer.
};

/// A top-k entry of the chunk that a CTA sends.
struct alignas(16) ChunkEntry {
  int expert;  // Or -1: empty.
  int before;  // Entries of the chunk before it with the same expert.
  int peer;    // The expert's rank.
  int token;   // Of the chunk.
};

/// Counts one entry by expert: in `next` if it is before the CTA's own tokens, else in `total`. The
/// experts of the entries [begin, begin + kept) stay in `first_expert`.
__device__ inline void count_entry(int entry, int expert, int begin, int kept, int* total,
                                   int* next, int* first_expert) {
  const int mine = entry - begin;
  if (mine >= 0 && mine < kept) first_expert[mine] = expert;
  if (expert >= 0) atomicAdd(mine < 0 ? &next[expert] : &total[expert], 1);
}

/// The same for all entries from `first` on. Their loads are in flight together: nothing converts
/// or looks at a value before the last one has been asked for.
template <class Index>
__device__ void count_rest(const SlotParams& p, const DispatchParams& d, int first, int begin,
                           int kept, int* total, int* next, int* first_expert) {
  constexpr int kBatch = 16;
  const Index* const topk_idx = static_cast<const Index*>(d.topk_idx);
  const int num_entries = d.num_tokens * p.num_topk;
  for (int base = first + static_cast<int>(threadIdx.x); base < num_entries;
       base += kBatch * kDispatchThreads) {
    Index chosen[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kDispatchThreads;
      if (i < num_entries) chosen[j] = topk_idx[i];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kDispatchThreads;
      if (i >= num_entries) break;
      count_entry(i, expert_of_choice(p, chosen[j], i), begin, kept, total, next, first_expert);
    }
  }
}

/// A thread has waited long for the counts of expert `e`. True: it waits in vain, and `lost` says
/// for whom. Away from the loop that waits: few calls need it.
__device__ __noinline__ inline bool waits_in_vain(const SlotParams& p, int e, std::uint32_t stamp,
                                                  bool gives_up, LostCounts& lost) {
  unsigned long long here = 0;
  for (int r = 0; r < p.window.num_ranks; ++r) {
    const std::uint64_t word = p.window.word(p.counts, r * p.placement.num_experts() + e);
    const unsigned long long bit = 1ull << r;
    if (is_for_another_layer(word, stamp)) {
      here |= bit;
      atomicOr(&lost.of_another_layer, bit);
      atomicMax(&lost.other, static_cast<unsigned long long>(word));
    } else if (gives_up && static_cast<std::uint32_t>(word >> 32) != stamp) {
      here |= bit;
    }
  }
  if (here != 0) atomicOr(&lost.missing, here);
  return here != 0;
}

/// Thread i's share of experts: every rank's counts of them, waited for. Adds those of lower ranks
/// to next[e] and replaces total[e] by the sum over all. False: it did not see them (`lost`).
__device__ inline bool gather_counts(const SlotParams& p, std::uint32_t stamp, int* total,
                                     int* next, LostCounts& lost) {
  constexpr int kBatch = 4;
  const int ranks = p.window.num_ranks;
  Patience patience;
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < p.placement.num_experts();
       e += kDispatchThreads) {
    int below = 0, all = 0;
#pragma unroll 1
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
          if (r0 + i < ranks) fresh &= static_cast<std::uint32_t>(word[i] >> 32) == stamp;
        }
        if (fresh) break;
        const bool gives_up = patience.ends(p);
        if (patience.is_long() && waits_in_vain(p, e, stamp, gives_up, lost)) return false;
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
  return true;
}

/// Low-latency: expert e's rows begin at its own max_m, whatever the counts are. The thread that
/// calls gather_counts() for an expert does this for it, before.
__device__ inline void begin_masked(const SlotParams& p, int* next) {
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < p.placement.num_experts();
       e += kDispatchThreads) {
    const int local = p.placement.local_of(e), begin = local * p.max_m;
    next[e] += begin;
    if (blockIdx.x == 0 && p.placement.rank_of(e) == p.window.rank) p.row_begin[local] = begin;
  }
}

__device__ __noinline__ inline void record_over_capacity(const SlotParams& p, int e, int count) {
  const int slots = p.placement.num_experts();
  const int expert =
      p.slots == nullptr ? e : static_cast<int>(p.slots[p.num_experts + 1 + slots + e]);
  record_fault(p, kRefusal,
               {.kind = kOverCapacity, .where = expert, .count = count, .value = p.max_m});
}

/// True: one of the thread's experts exceeds its capacity.
__device__ inline bool exceeds_masked(const SlotParams& p, const int* total) {
  bool over = false;
#pragma unroll 1
  for (int e = static_cast<int>(threadIdx.x); e < p.placement.num_experts();
       e += kDispatchThreads) {
    if (total[e] <= p.max_m) continue;
    over = true;
    if (blockIdx.x == 0) record_over_capacity(p, e, total[e]);
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

/// Who did not send counts, or sent them for another layer: the exchange stops. By one thread.
__device__ __noinline__ inline void fail_counts(const SlotParams& p, std::uint64_t epoch, int layer,
                                                const LostCounts& lost) {
  const bool differs = lost.of_another_layer != 0;
  const std::uint64_t own = static_cast<std::uint64_t>(layer);
  fail_exchange(p, {.kind = differs ? kOtherLayer : kPeerMissing,
                    .operation = kDispatchCounts,
                    .epoch = epoch,
                    .missing = differs ? lost.of_another_layer : lost.missing,
                    .expected = differs ? own : epoch,
                    .seen = differs ? layer_of_count(lost.other) : 0});
}

/// With every rank's counts: total[e] becomes the sum over ranks, next[e] the row of this CTA's
/// first entry with expert e (low-latency: after begin_masked()). All threads get the same answer.
/// What any of them did before is seen by all after it. `lost`: shared, and zero before the last
/// barrier.
template <Mode Layout>
__device__ RouteResult place_experts(const SlotParams& p, std::uint64_t epoch, int layer,
                                     int* total, int* next, LostCounts& lost) {
  const bool failed = !gather_counts(p, count_stamp(epoch, layer), total, next, lost);
  const bool over = Layout == Mode::kLowLatency && !failed && exceeds_masked(p, total);
  if (__syncthreads_or(failed || over) != 0) {
    if (__syncthreads_or(failed) == 0) return RouteResult::kRefused;
    if (threadIdx.x == 0) fail_counts(p, epoch, layer, lost);
    return RouteResult::kMissing;
  }
  if (Layout == Mode::kNormal) {
    place_contiguous(p, total, next);
    __syncthreads();
  }
  return RouteResult::kPlaced;
}

/// One warp lists the entries [first, first + count), those of a chunk. `expert`: theirs, or null.
__device__ inline void list_entries(const SlotParams& p, const DispatchParams& d, int first,
                                    int count, const int* expert, ChunkEntry* list) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    const int e = i >= count ? -1 : expert != nullptr ? expert[i] : expert_of(p, d, first + i);
    const unsigned same = __match_any_sync(kAllLanes, e);
    int before = __popc(same & ((1u << lane) - 1));
#pragma unroll 1
    for (int j = 0; j < base; ++j) before += list[j].expert == e;
    __syncwarp();
    if (i < count) list[i] = {e, before, e < 0 ? -1 : p.placement.rank_of(e), i / p.num_topk};
    __syncwarp();
  }
}

/// The same warp, after the rows of that chunk have been sent: next[e] is for the next chunk.
__device__ inline void advance(int count, const ChunkEntry* list, int* next) {
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
    if (list[i].expert >= 0) atomicAdd(&next[list[i].expert], 1);
  }
  __syncwarp();
}

}  // namespace sluice::cuda
