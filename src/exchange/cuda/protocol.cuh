// protocol.cuh - flags, epochs, bounded waits and fault records of the CUDA exchange.
//
// Every flag has one writer and only grows. A wait is for an exact epoch: an earlier value is not
// there yet, a later one means that ranks are out of step, which is recorded, never ignored.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/check.h"
#include "backend/cuda/ptx/system.cuh"
#include "exchange/cuda/exchange_kernels.h"

/// Set by tests/exchange/CMakeLists.txt alone, for builds that its rounds must refuse. 1: a rank's
/// `dispatched` flag does not wait until its rows have arrived. 2: it is raised before the first
/// row is sent. 3: combine does not wait for the other ranks' rows. 4: the first CTA of a
/// dispatch signs for all others, as soon as it knows where its rows go.
#ifndef SLUICE_PLANTED_FAULT
#define SLUICE_PLANTED_FAULT 0
#endif

namespace sluice::cuda {

// A call of few tokens runs its code once, and then takes as long as it takes to fetch it. So what
// is seldom needed is not inlined, and loops over experts, of one step there, are not unrolled.

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kDispatchThreads = 512;
/// What a dispatch adds to this rank's `dispatched` flag at every rank. Each CTA adds a share when
/// its rows are there, so no CTA waits for another: CTA 0 what the others leave, the others 1 each.
inline constexpr std::uint64_t kDispatchShares = 1 << 16;

/// Reads a kernel's parameters, each line of which else stops the step that first needs it.
__device__ inline void read_ahead(const SlotParams& p, const DispatchParams& d) {
  asm volatile("" ::"l"(p.window.base[0]), "r"(p.window.rank), "l"(p.counts), "l"(p.expert_y));
  asm volatile("" ::"l"(p.state), "l"(p.slots), "l"(d.x), "l"(d.row_totals));
}

/// The first fault of its record wins; the host clears a refusal's `claimed` when it has read it.
__device__ inline void record_fault(const SlotParams& p, FaultRecord record,
                                    const DeviceFault& fault) {
  if (atomicCAS(&p.state->claimed[record], 0, 1) != 0) return;
  volatile DeviceFault* to = p.faults + record;
  to->operation = fault.operation;
  to->epoch = fault.epoch;
  to->missing = fault.missing, to->expected = fault.expected, to->seen = fault.seen;
  to->where = fault.where, to->count = fault.count, to->value = fault.value;
  __threadfence_system();
  to->kind = fault.kind;
}

__device__ inline bool has_failed(const SlotParams& p) {
  return *static_cast<volatile int*>(&p.state->failed) != 0;
}

/// A fault after which ranks may be out of step: the exchange stops for good.
__device__ inline void fail_exchange(const SlotParams& p, const DeviceFault& fault) {
  record_fault(p, kFailure, fault);
  __threadfence();
  *static_cast<volatile int*>(&p.state->failed) = 1;
}

/// How long a thread has waited for other ranks. Most waits are short, and until they are long
/// nothing but the clock is asked: whether the exchange has failed is one word for all CTAs, and
/// asking for it takes as long as another look at what is waited for.
struct Patience {
  static constexpr std::uint64_t kLongNs = 20'000;
  std::uint64_t begin = 0, waited = 0;

  /// To be asked after each look in vain.
  __device__ bool ends(const SlotParams& p) {
    const std::uint64_t now = ptx::global_timer();
    if (begin == 0) begin = now;
    waited = now - begin;
    return is_long() && (waited > p.timeout_ns || has_failed(p));
  }
  [[nodiscard]] __device__ bool is_long() const { return waited > kLongNs; }
};

/// What a flag of operation `op` must hold. A `dispatched` flag grows by kDispatchShares in every
/// epoch. A `returned` flag is 2 * epoch when expert_y may be
/// read, and 2 * epoch + 1 when the rank dropped that dispatch instead (device_layout.h). Combine
/// waits for this epoch's value; a new dispatch waits until the last epoch was returned either way.
__device__ inline std::uint64_t wanted(Operation op, std::uint64_t epoch) {
  if (op == kCombineRows) return 2 * epoch;
  if (op == kReuse) return 2 * (epoch - 1);
  return epoch * kDispatchShares;
}

/// The flags of ranks that a CTA has waited for are not as they must be: the exchange stops, and
/// says whose. `value`: what the thread saw of its own rank, or `want`. All threads call it.
__device__ __noinline__ inline void fail_wait(const SlotParams& p, Operation op,
                                              std::uint64_t epoch, std::uint64_t want,
                                              std::uint64_t value) {
  __shared__ unsigned long long missing, later, dropped;
  __shared__ std::uint64_t seen[kMaxDeviceRanks];
  const int r = static_cast<int>(threadIdx.x);
  if (r == 0) missing = later = dropped = 0;
  __syncthreads();
  if (r < p.window.num_ranks) {
    seen[r] = value;
    if (value < want) atomicOr(&missing, 1ull << r);
    if (value > want + (op == kDispatchRows ? 0 : 1)) atomicOr(&later, 1ull << r);
    if (op == kCombineRows && value == want + 1) atomicOr(&dropped, 1ull << r);
  }
  __syncthreads();
  if (r == 0) {
    const unsigned long long who = missing != 0 ? missing : later != 0 ? later : dropped;
    const std::uint64_t unit = op == kDispatchRows ? kDispatchShares : 1;
    fail_exchange(p, {.kind = missing != 0 ? kPeerMissing
                              : later != 0 ? kOutOfStep
                                           : kDropped,
                      .operation = op,
                      .epoch = epoch,
                      .missing = who,
                      .expected = want / unit,
                      .seen = seen[__ffsll(static_cast<long long>(who)) - 1] / unit});
  }
  __syncthreads();
}

/// Waits until the own flags of ranks [first, end), at byte `flags` of the window, say `epoch`. All
/// threads of the CTA call it, meet in it, and get the same answer; false means that the exchange
/// has failed.
__device__ inline bool wait_for_ranks(const SlotParams& p, std::size_t flags, Operation op,
                                      std::uint64_t epoch, int first, int end) {
  const int r = static_cast<int>(threadIdx.x);
  const std::uint64_t want = wanted(op, epoch);
  std::uint64_t value = want;
  if (r >= first && r < end) {
    Patience patience;
    value = p.window.wait(flags, r, want, [&] { return patience.ends(p); });
    if (blockIdx.x == 0 && patience.waited != 0) {
      atomicAdd(&p.state->stats.wait_ns[r], patience.waited);
    }
  }
  // A dispatch waits for the last one to have been combined or dropped.
  const bool wrong = value < want || value > want + (op == kReuse ? 1 : 0);
  if (__syncthreads_or(wrong) == 0) return true;
  fail_wait(p, op, epoch, want, value);
  return false;
}

__device__ inline bool wait_for_all(const SlotParams& p, std::size_t flags, Operation op,
                                    std::uint64_t epoch) {
  return wait_for_ranks(p, flags, op, epoch, 0, p.window.num_ranks);
}

/// Threads r < num_ranks set this rank's flag, at byte `flags` of every rank's window, after
/// everything that this CTA's threads did before their last barrier.
__device__ inline void signal_all(const SlotParams& p, std::size_t flags, std::uint64_t value) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= p.window.num_ranks) return;
  p.window.signal(r, flags, value);
}

/// The same with this CTA's share of the rank's `dispatched` flag.
__device__ inline void signal_share(const SlotParams& p) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= p.window.num_ranks) return;
  const bool for_all = SLUICE_PLANTED_FAULT == 4;
  if (for_all && blockIdx.x != 0) return;
  const std::uint64_t others = for_all ? 0 : gridDim.x - 1;
  p.window.add_to_signal(r, p.dispatched, blockIdx.x == 0 ? kDispatchShares - others : 1);
}

/// The slot to which the row of a top-k entry goes that chose expert `e`: Placement::slot_of_row().
__device__ __noinline__ inline int slot_of_entry(const SlotParams& p, int e, int entry) {
  const int begin = static_cast<int>(p.slots[e]);
  const int num_replicas = static_cast<int>(p.slots[e + 1]) - begin;
  const int token = entry / p.num_topk;
  const int replica = num_replicas == 1 ? 0
                                        : replica_of_row(num_replicas, p.window.rank, token,
                                                         entry - token * p.num_topk);
  return static_cast<int>(p.slots[p.num_experts + 1 + begin + replica]);
}

/// What the caller chose for a top-k entry.
__device__ inline long long chosen_by(const DispatchParams& d, int entry) {
  return d.wide_idx ? static_cast<const std::int64_t*>(d.topk_idx)[entry]
                    : static_cast<const std::int32_t*>(d.topk_idx)[entry];
}

__device__ __noinline__ inline void record_bad_index(const SlotParams& p, int entry,
                                                     long long value) {
  record_fault(p, kRefusal, {.kind = kBadIndex, .where = entry, .value = value});
}

/// Expert of an entry for which the caller chose `e`, or -1 if it is empty. One out of range is
/// recorded and taken as empty.
__device__ inline int expert_of_choice(const SlotParams& p, long long e, int entry) {
  if (e >= -1 && e < p.num_experts) {
    if (p.slots == nullptr || e < 0) return static_cast<int>(e);
    return slot_of_entry(p, static_cast<int>(e), entry);
  }
  record_bad_index(p, entry, e);
  return -1;
}

__device__ inline int expert_of(const SlotParams& p, const DispatchParams& d, int entry) {
  return expert_of_choice(p, chosen_by(d, entry), entry);
}

}  // namespace sluice::cuda
