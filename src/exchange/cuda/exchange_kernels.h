// exchange_kernels.h - host side of the kernels of the CUDA exchange: what they are given.
//
// Plain C++. Every launcher is asynchronous on the stream, allocates nothing, waits for nothing on
// the host and may be captured in a CUDA graph: what changes from replay to replay (the epoch)
// lives in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"
#include "exchange/slot_ranks.h"
#include "sluice/recipe.h"
#include "transport/device.cuh"

namespace sluice::cuda {

/// Most experts, or slots for them, over all ranks: two counters of each live in shared memory.
inline constexpr int kMaxExchangeExperts = 4096;
/// Most bytes of one row without scales: two of them must fit in shared memory.
inline constexpr int kMaxPayloadBytes = 80 * 1024;

enum FaultKind : int {
  kNoFault = 0,
  kBadIndex,      // where = top-k entry, value = topk_idx
  kOverCapacity,  // where = expert, count = rows, value = max_m
  kPeerMissing,   // missing, expected, seen
  kOutOfStep,     // missing = the ranks whose flag is of a later epoch, expected, seen
  kDropped,       // missing = the ranks that dropped the dispatch this combine waits for
  kGaveUp,        // where = the lost rank, value = the relay on another host that says so
  kOtherLayer,    // missing, or over hosts where = who dispatches for layer `seen` (expected: own)
};
enum Operation : int { kDispatchCounts, kDispatchRows, kCombineRows, kReuse };

/// The upper half of a word of counts: of which epoch they are, and for which layer the dispatch
/// is. What a new word replaces is of the slot's use before: fewer bits of the epoch would do.
[[nodiscard]] SLUICE_HOST_DEVICE constexpr std::uint32_t count_stamp(std::uint64_t epoch,
                                                                     int layer) {
  return static_cast<std::uint32_t>(layer) << 16 | (static_cast<std::uint32_t>(epoch) & 0xffffu);
}
/// A word of this epoch's counts for another layer: no other one will come.
[[nodiscard]] SLUICE_HOST_DEVICE constexpr bool is_for_another_layer(std::uint64_t word,
                                                                     std::uint32_t stamp) {
  const std::uint32_t differs = static_cast<std::uint32_t>(word >> 32) ^ stamp;
  return differs != 0 && (differs & 0xffffu) == 0;
}
[[nodiscard]] SLUICE_HOST_DEVICE constexpr std::uint64_t layer_of_count(std::uint64_t word) {
  return word >> 48;
}

/// What went wrong on the device, in host-mapped memory; `kind` is written last. There is one
/// record for refusals, after which the exchange works on, and one for failures, which stop it: the
/// first of each kind is kept, and neither hides the other.
enum FaultRecord : int { kRefusal = 0, kFailure = 1 };
struct DeviceFault {
  int kind, operation;
  std::uint64_t epoch, missing, expected, seen;
  int where, count;
  long long value;
};

/// Monotonic counters of one rank. wait_ns is the longest of a call's CTAs.
struct DeviceStats {
  unsigned long long rows[kMaxDeviceRanks];      // Rows (or token copies) sent to each rank.
  unsigned long long repeats[kMaxDeviceRanks];   // Rows that a copy sent already stands for.
  unsigned long long returned[kMaxDeviceRanks];  // Rows read from each rank's expert_y.
  unsigned long long wait_ns[kMaxDeviceRanks];   // For the flag of each rank.
  unsigned long long saturated;
};

/// One rank's state that outlives a kernel, in device memory; zero at creation.
struct SlotState {
  std::uint64_t epoch;  // Of the slot's last dispatch.
  int refused;          // The slot's dispatch exceeded a capacity: no rows, NaN for every token.
};
struct ExchangeState {
  int failed;      // A wait timed out: every later kernel of this exchange returns at once. Over
                   // hosts a *stop word*: 0, or 1 + the rank for which the exchange has stopped.
  int claimed[2];  // Somebody owns the record of a refusal, of a failure.
  DeviceStats stats;
};

/// What every kernel of one slot needs.
struct SlotParams {
  DeviceWindow window;
  // Offsets in a window.
  std::size_t dispatched, returned, counts, x, scale, copies, origin, expert_y;
  ExpertPlacement placement;
  int num_topk, hidden, max_tokens;
  int max_m;      // Masked layout; 0: contiguous rows, token copies cross once per rank.
  bool is_alone;  // No other rank shares this device.
  std::uint64_t timeout_ns;
  SlotState* slot;
  ExchangeState* state;
  DeviceFault* faults;      // [2] by FaultRecord, host-mapped.
  std::int64_t* slot_row;   // [T, k] rank << 32 | row, or -1
  std::int64_t* row_begin;  // [num_local_experts]
  std::int32_t* num_rows;   // [num_local_experts]
  // Where num_experts of Routing::topk_idx are: ExpertSlots::device_table(); null: expert e is in
  // slot e. To the kernels, every other "expert" is a slot.
  const std::uint32_t* slots;
  int num_experts;
};

struct DispatchParams {
  const std::uint16_t* x = nullptr;  // [num_tokens, hidden] bf16
  const void* topk_idx = nullptr;    // [num_tokens, num_topk] int32 or int64
  bool wide_idx = false;
  int num_tokens = 0;
  float static_inverse = 0;  // 1 / s1
  bool receive = false;      // Also wait for every rank's rows.
  int chunk_tokens = 1;      // Staged together; fewer if they do not fit.
  int parts = 1;             // CTAs that share a token; more than one: each has one token.
  int layer = 0;             // Routing::layer
  std::int64_t* row_totals = nullptr;  // [num_local_experts] += num_rows; null: nobody counts.
};

/// Sends rows; with `receive`, also waits for everybody's. Masked layout, or contiguous without
/// `receive`.
void launch_dispatch(const SlotParams& slot, const DispatchParams& dispatch, WireFormat wire,
                     int num_ctas, void* stream);

/// Waits for every rank's rows; contiguous layout: then copies tokens that crossed once for several
/// experts.
void launch_receive(const SlotParams& slot, WireFormat wire, int num_ctas, void* stream);

struct CombineParams {
  const float* weights = nullptr;  // [num_tokens, num_topk]
  int num_tokens = 0;
  float factor = 1;
  std::uint16_t* y = nullptr;  // [num_tokens, hidden] bf16
  bool send = false;           // First tell every rank that this one's expert_y is complete.
  bool at_home = false;        // Rows lie in the own expert_y, by entry: their experts sent them.
};

/// y[t] = factor * sum_k weight[t, k] * expert_y(row of entry k), rows read where they were made,
/// or at home.
void launch_combine(const SlotParams& slot, const CombineParams& combine, int num_ctas,
                    void* stream);

/// Tells every rank that this one's expert_y is complete, or that it dropped the dispatch.
void launch_return(const SlotParams& slot, bool dropped, void* stream);

/// Copies the valid rows of the caller's expert_y into the window.
void launch_copy_rows(const SlotParams& slot, const std::uint16_t* expert_y, int num_ctas,
                      void* stream);

/// Sets what the kernels' launches rely on; once per process and device.
void prepare_exchange_kernels();

}  // namespace sluice::cuda
