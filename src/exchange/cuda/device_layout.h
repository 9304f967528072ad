// device_layout.h - where everything lies in the window of a CUDA exchange.
//
// A window holds num_in_flight slots of equal size; a dispatch uses one slot from its beginning
// until its Dispatched is gone. Offsets depend on the configuration alone, never on a call's token
// count.
//
//   slot
//     dispatched [R] u64      flag of each source: 65536 * epoch of its last dispatch when all rows
//                             of that are here (kDispatchShares)
//     returned   [R] u64      flag of each rank: 2 * epoch when its expert_y may be read,
//                             2 * epoch + 1 when it dropped the dispatch instead
//     counts     [R, E] u64   count_stamp() << 32 | rows that rank r sends to expert e
//     copies     [R, T, k] u64  normal mode: epoch << 32 | row that token t of rank r has here for
//                             its k-th expert, from other ranks
//     x          [rows, payload]
//     scale      [rows, hidden / 128] f32
//     origin     [rows] u64   rank << 32 | entry that each row belongs to
//     expert_y   [rows, hidden] bf16          one of two things, by dispatch:
//                             rows of this rank's experts, read by the tokens' home ranks; or
//                             [T, k, hidden] rows of this rank's entries, written by the experts'
//                             ranks, if T * k <= rows
//
// rows = num_local * max_m (low-latency), or R * T * k (normal).
//
// Plain C++, part of every build: plans for a GPU are made on machines without one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exchange/cuda/exchange_kernels.h"
#include "exchange/slot_ranks.h"
#include "sluice/exchange.h"

namespace sluice {

struct DeviceLayout {
  DeviceLayout(const ExchangeConfig& config, int num_ranks);

  /// Throws: kInvalidArgument naming what the kernels cannot take, and the limit.
  void check(const ExchangeConfig& config, int num_ranks) const;

  // Byte offsets within a slot.
  std::size_t dispatched = 0, returned = 0, counts = 0, x = 0, scale = 0, copies = 0, origin = 0,
              expert_y = 0;
  std::size_t slot_bytes = 0;
  std::size_t flags_and_counts_bytes = 0;  ///< The slot's first bytes: zero at creation.

  std::size_t payload_bytes = 0;  ///< One row without scales.
  std::size_t scale_bytes = 0;    ///< One row's scales.
  // Memory of one slot that only its own rank uses.
  std::size_t slot_row_bytes = 0;  ///< [T, k] i64: where each entry's row went.
  std::size_t rows_bytes = 0;      ///< row_begin [L] i64, num_rows [L] i32.
  std::size_t home_bytes = 0;      ///< [R] pointers: every rank's expert_y.

  int num_slots = 1;
  bool fits_home_rows = false;  ///< expert_y has room for the rows of a rank's own entries.
  ExpertPlacement placement;
  std::int64_t max_rows = 0;

  [[nodiscard]] std::size_t window_bytes() const noexcept {
    return slot_bytes * static_cast<std::size_t>(num_slots);
  }
  [[nodiscard]] std::size_t private_bytes() const noexcept {
    return static_cast<std::size_t>(num_slots) * (slot_row_bytes + rows_bytes + home_bytes);
  }
  /// Epochs, counters and what a failure leaves behind, of the exchange and of each slot.
  [[nodiscard]] std::size_t state_bytes() const noexcept {
    return sizeof(cuda::ExchangeState) +
           static_cast<std::size_t>(num_slots) * sizeof(cuda::SlotState);
  }
  /// Everything a CUDA exchange reserves on one rank.
  [[nodiscard]] std::size_t total_bytes() const noexcept {
    return window_bytes() + private_bytes() + state_bytes();
  }
};

}  // namespace sluice
