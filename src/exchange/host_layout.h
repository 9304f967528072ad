// host_layout.h - where everything lies in the window of a host exchange.
//
// A window holds num_in_flight slots of equal size; a dispatch uses one slot from its beginning
// until its Dispatched is gone. Offsets depend on the configuration alone, never on a call's token
// count.
//
//   slot, low-latency
//     counts   [R, E] i32                    rows that source rank r sends to expert e
//     x        [L, max_m, payload]           rows in the wire format
//     scale    [L, max_m, hidden / 128] f32  their scales, if the wire format has them
//     origin   [L, max_m] i32                where a row came from: token * k + its place in top-k
//     home     [T, k, hidden] bf16           rows that came back, for combine
//
//   slot, normal
//     counts   [R] i32                       token copies from each source rank
//     x        [R, T, payload]               token copies in the wire format
//     scale    [R, T, hidden / 128] f32      their scales, if the wire format has them
//     experts  [R, T, k] i32                 local expert of each top-k entry, or -1
//     token    [R, T] i32                    the token's index at its source
//     home     [T, k, hidden] bf16           rows that came back, for combine
//
//   R ranks, E experts (or slots for them), L local experts, T max_tokens_per_rank, k num_topk.
//
// Normal mode expands its token copies into rows by expert in memory of its own, behind the window.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exchange/slot_ranks.h"
#include "exchange/slot_rules.h"
#include "sluice/exchange.h"

namespace sluice {

/// Slots of a window, and the flags of each.
struct SlotLayout {
  int num_ranks = 1, num_slots = 1, num_flag_kinds = kFlagKinds;
  std::size_t slot_bytes = 0;

  [[nodiscard]] std::size_t window_bytes() const noexcept {
    return slot_bytes * static_cast<std::size_t>(num_slots);
  }
  [[nodiscard]] int num_flags() const noexcept { return num_slots * num_flag_kinds * num_ranks; }
  [[nodiscard]] int flag(int slot, Flag kind, int source) const noexcept {
    return (slot * num_flag_kinds + static_cast<int>(kind)) * num_ranks + source;
  }
};

/// Lays parts of a slot behind each other, each at a multiple of 128 bytes.
class SlotParts {
 public:
  void place(std::size_t& offset, std::size_t bytes) {
    offset = at_;
    at_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return at_; }

 private:
  static constexpr std::size_t kAlignment = 128;
  std::size_t at_ = 0;
};

/// What arrives at the experts' ranks, on one host or several: counts to token of the pictures.
struct ReceiveLayout : SlotLayout {
  // Byte offsets within a slot.
  std::size_t counts = 0, x = 0, scale = 0, origin = 0, experts = 0, token = 0;
  // Memory outside the window, in bytes for one slot.
  std::size_t rows_x_bytes = 0, rows_scale_bytes = 0;  ///< Normal mode's expanded rows.
  std::size_t staging_bytes = 0;                       ///< Once: own tokens in the wire format.

  std::size_t payload_bytes = 0;  ///< One row without scales.
  std::size_t scale_bytes = 0;    ///< One row's scales.
  std::size_t row_bytes = 0;      ///< One row of bf16 on its way home.

  ExpertPlacement placement;
  std::int64_t window_rows = 0;  ///< Rows of x in the window.
  std::int64_t expanded_rows = 0;

  [[nodiscard]] std::int64_t max_rows() const noexcept {
    return expanded_rows ? expanded_rows : window_rows;
  }
  /// Everything that the exchange reserves on one rank.
  [[nodiscard]] std::size_t total_bytes() const noexcept {
    return window_bytes() + staging_bytes +
           static_cast<std::size_t>(num_slots) * (rows_x_bytes + rows_scale_bytes);
  }

 protected:
  ReceiveLayout(const ExchangeConfig& config, int num_ranks, int num_flag_kinds);
  void place_received(SlotParts& parts, const ExchangeConfig& config);
};

struct HostLayout : ReceiveLayout {
  HostLayout(const ExchangeConfig& config, int num_ranks);

  std::size_t home = 0;  ///< Byte offset within a slot.
};

}  // namespace sluice
