// rail_layout.h - where everything lies in the memory of a CUDA exchange over several hosts.
//
//   window, of which a dispatch uses one slot (all ranks of the host address it):
//     dispatched [M] u64, returned [M] u64    flags of each mate, as in device_layout.h
//     counts     [R, W] u64                   of rank r for each slot, as in device_layout.h
//     x          [rows, payload], scale [rows, hidden / 128] f32
//     expert_y   [rows, hidden] bf16
//   own memory, a slot of it: pieces out and in, home rows out and in, and where each row went
//     (rail_params.h has the list)
//
// R ranks, M mates, H hosts, W expert slots whose counts travel inside the host: all in low-latency
// mode, where a capacity is refused on all hosts alike, and in normal mode those of the host.
//
// Plain C++, part of every build.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exchange/cuda/rail_params.h"
#include "exchange/network_record.h"
#include "exchange/slot_ranks.h"
#include "sluice/exchange.h"

namespace sluice {

struct RailLayout {
  RailLayout(const ExchangeConfig& config, int num_ranks);

  /// Throws: kInvalidArgument or kUnsupported naming what the kernels cannot take, and the limit.
  void check(const ExchangeConfig& config, int num_ranks) const;

  int num_hosts, num_mates, num_slots;
  ExpertPlacement placement;
  NetworkRecord record;
  int count_width = 0, num_chunks = 1, home_rows = 1;
  std::size_t row_bytes = 0;  ///< One row of bf16.
  std::int64_t max_rows = 0;

  // Byte offsets within a slot of the window.
  std::size_t dispatched = 0, returned = 0, counts = 0, x = 0, scale = 0, expert_y = 0;
  std::size_t slot_bytes = 0;
  std::size_t flags_and_counts_bytes = 0;  ///< The slot's first bytes: zero at creation.

  // Byte offsets within a slot of the own memory.
  std::size_t slots = 0, slot_rows = 0, chunk_records = 0, record_of = 0, home_at = 0, send = 0,
              pieces = 0, place = 0, relay_at = 0, home_out = 0, home_in = 0, row_begin = 0,
              num_rows = 0;
  std::size_t private_slot_bytes = 0;
  std::size_t piece_stride = 0, home_stride = 0;

  /// What a fixed piece takes on the network.
  [[nodiscard]] std::size_t fixed_piece_bytes(const ExchangeConfig& config) const {
    return record.piece_bytes(config.max_tokens_per_rank);
  }
  [[nodiscard]] std::size_t fixed_home_bytes(const ExchangeConfig& config) const {
    return home_bytes(std::int64_t{config.max_tokens_per_rank} * home_rows);
  }
  /// A home piece of so many rows of bf16.
  [[nodiscard]] std::size_t home_bytes(std::int64_t rows) const {
    return cuda::kHomeHeaderBytes + static_cast<std::size_t>(rows) * row_bytes;
  }

  [[nodiscard]] std::size_t window_bytes() const noexcept {
    return slot_bytes * static_cast<std::size_t>(num_slots);
  }
  [[nodiscard]] std::size_t private_bytes() const noexcept {
    return private_slot_bytes * static_cast<std::size_t>(num_slots);
  }
  /// Tables of ranks and slots, the same for every slot, and then the state.
  [[nodiscard]] std::size_t tables_bytes() const noexcept;
  [[nodiscard]] std::size_t state_bytes() const noexcept {
    return sizeof(cuda::ExchangeState) +
           static_cast<std::size_t>(num_slots) * sizeof(cuda::RailState);
  }
  /// Everything that the exchange reserves on one rank's device.
  [[nodiscard]] std::size_t total_bytes() const noexcept {
    return window_bytes() + private_bytes() + tables_bytes() + state_bytes();
  }
};

}  // namespace sluice
