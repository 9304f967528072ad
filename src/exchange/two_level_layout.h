// two_level_layout.h - where everything lies in the window of an exchange over several hosts.
//
// A rank is the relay of N ranks: itself, and one of every other host where hosts are even. They
// are numbered in ascending order: the *relayed index* of a source at its relay.
//
//   slot
//     sent     [N, piece]                    network_record.h: what each relayed rank sent here
//     gather   [N, T, k, hidden] bf16        rows of this host's experts for each relayed rank;
//                                            a rank's own: also rows that came home by themselves
//     home     [H, T, hidden] f32            what each other host's relay sent: a sum, or one row
//                                            of bf16; where rows come home by themselves, nothing
//   and what a rank receives inside its host, as in host_layout.h:
//     counts   [R, S] i32                    low-latency: every rank's rows for every expert slot
//     x        [L, max_m, payload]           rows
//     scale    [L, max_m, hidden / 128] f32
//     origin   [L, max_m] i32
//   or, in normal mode
//     counts   [R] i32                       token copies of each source rank
//     x        [R, T, payload]               token copies
//     scale    [R, T, hidden / 128] f32
//     experts  [R, T, k] i32
//     token    [R, T] i32
//
// H hosts, R ranks, S expert slots, L of them local, T max_tokens_per_rank, k num_topk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "exchange/host_layout.h"
#include "exchange/network_record.h"

namespace sluice {

struct TwoLevelLayout : ReceiveLayout {
  TwoLevelLayout(const ExchangeConfig& config, int num_ranks);

  NetworkRecord record;
  std::size_t piece_bytes = 0;  ///< Of max_tokens_per_rank tokens, a multiple of 128.
  int max_sources = 1;          ///< N of the rank that relays for most.

  // Byte offsets within a slot.
  std::size_t sent = 0, gather = 0, home = 0;
  std::int64_t max_tokens = 0, entries = 0;  ///< T, and T * k

  [[nodiscard]] std::size_t piece_of(int relayed_index) const {
    return sent + static_cast<std::size_t>(relayed_index) * piece_bytes;
  }
  /// Row of top-k entry `token_slot` of a relayed rank.
  [[nodiscard]] std::size_t gathered(int relayed_index, std::int64_t token_slot) const {
    return gather + static_cast<std::size_t>(relayed_index * entries + token_slot) * row_bytes;
  }
  [[nodiscard]] std::size_t home_of(int host, std::int64_t token_idx) const {
    return home + static_cast<std::size_t>(host * max_tokens + token_idx) * 2 * row_bytes;
  }
};

/// The relayed index of every rank at its relay on `host`: [num_ranks].
[[nodiscard]] std::vector<int> relayed_indices(const Hosts& hosts, int host);

}  // namespace sluice
