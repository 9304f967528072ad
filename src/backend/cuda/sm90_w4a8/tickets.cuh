// tickets.cuh - which tiles there are, and which of them a ticket means.
//
// CTAs claim tickets by one atomic counter. A ticket is one tile, or, where K is so short that a
// tile is over after a few steps, several row tiles of the same rows.
#pragma once

#include "backend/cuda/sm90_w4a8/config.cuh"

namespace sluice::cuda {

/// With K short a tile is over after a few steps, and claiming, finding and waiting for each by
/// itself takes longer than its bytes: a ticket then has several. But every CTA should have several
/// tickets, or some have nothing to do at the end.
template <class C>
__device__ __forceinline__ TicketShape shape_tickets(const Params& p, int index,
                                                     int num_token_tiles) {
  constexpr int kStepsOfTicket = 8, kTicketsOfCta = 4;
  const Phase& phase = p.phase[index];
  if (phase.epilogue == Epilogue::kHidden || C::has_row_stage(index)) {
    return {1, phase.num_row_tiles};
  }
  const int enough = num_token_tiles * phase.num_row_tiles / (kTicketsOfCta * gridDim.x);
  const int row_tiles = max(1, min(kStepsOfTicket / phase.num_steps, enough));
  return {row_tiles, (phase.num_row_tiles + row_tiles - 1) / row_tiles};
}

/// Whether finished tiles of y leave through Shared::rows, carried by a warp.
template <class C>
__device__ __forceinline__ bool stages_rows(const Phase& phase) {
  return C::kStagesRows && phase.home.origin == nullptr && phase.num_steps >= C::kFewestSteps;
}

/// Whether the loops of N columns run through the row tiles of a ticket without a stop.
template <class C, int N>
inline constexpr bool kStreams =
    (N <= 16) && (C::kIsDecode) && C::kGroup == 128 && C::kFormat == WeightFormat::kInt4;

/// Whether row tiles of a ticket may be published as one tile, which has this many tokens at most.
template <class C>
inline constexpr int kTogetherTokens = kStreams<C, 16> ? 16
                                                       : (!C::kIsDecode && C::kShortK ? 64 : 0);

/// Row tiles of a ticket that are published as one tile: all, or one by one.
template <class C>
__device__ __forceinline__ int count_together(const Phase& phase, const TileInfo& t) {
  constexpr int kMost = kTogetherTokens<C>;
  const bool together = kMost > 0 && t.num_tokens <= kMost && phase.home.origin == nullptr;
  return together ? t.row_tiles : 1;
}
/// The same of a published tile.
template <class C>
__device__ __forceinline__ int row_tiles_of(const TileInfo& t) {
  return kTogetherTokens<C> > 0 ? t.row_tiles : 1;
}

/// Passes along K that compute a row tile of so many slabs.
template <class C>
__device__ __forceinline__ int passes_of(int num_slabs) {
  return C::kPasses == 1 ? 1 : num_slabs / C::kSlabsPerPass;
}
/// Times that a published tile runs along K: its passes or its row tiles.
template <class C>
__device__ __forceinline__ int runs_of(const TileInfo& t) {
  static_assert(C::kPasses == 1 || kTogetherTokens<C> == 0);
  return C::kPasses == 1 ? row_tiles_of<C>(t) : passes_of<C>(t.num_slabs);
}

/// Rows of an expert that this launch computes: none where its matrix is another kernel's.
template <class C>
__device__ __forceinline__ int rows_of(const Params& p, int expert) {
  if constexpr (C::kFormat == WeightFormat::kMxfp4) {
    const Phase& phase = p.phase[0];
    const auto* const word = reinterpret_cast<const std::uint32_t*>(
        phase.weights + expert * phase.expert_bytes + kFarWordAt);
    if (p.chooses && ((*word & kFarMatrix) != 0) != C::kIsFar) return 0;
  }
  return p.num_rows[expert];
}

/// Token tiles by which tickets of phase 0 are ahead of phase 1's; all of them: phase by phase.
///
/// With K of phase 1 short, rows of y are a fourth of all bytes, and phase by phase they would all
/// be written in its half of the time. In turns some CTAs wait for products while others wait for
/// memory. `rows`: of all experts; `most`: token tiles of one expert, whose rows of h phase 1 waits
/// for. NOTE: with few rows y is small, and turns cost 1 %.
template <class C>
__device__ __forceinline__ int count_lead(const Params& p, const TicketShape& shape, int total,
                                          int rows, int most) {
  constexpr int kFewRows = 8;  // in a token tile
  const bool takes_turns = p.phase[1].num_steps < C::kFewestSteps / 2 && rows > kFewRows * total;
  if (!takes_turns) return total;
  // All CTAs begin with phase 0, and half of them again: then the first rows of h are there.
  const int first = 3 * static_cast<int>(gridDim.x) / (2 * shape.row_tickets) + 1;
  return min(total, max(first, most));
}

/// Counts of the experts' rows, many of them asked for before the first is used: every CTA waits.
template <class C>
__device__ __forceinline__ void load_counts(Shared<C>& s, const Params& p, int lane) {
  constexpr int kTogether = 8;
  for (int first = lane; first < p.num_experts; first += 32 * kTogether) {
    int rows[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      rows[i] = rows_of<C>(p, min(first + 32 * i, p.num_experts - 1));
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + 32 * i < p.num_experts) s.num_rows[first + 32 * i] = rows[i];
    }
  }
}

/// Token tiles before each expert, by one warp. Counts are read from global memory once per CTA.
template <class C>
__device__ __forceinline__ void scan_token_tiles(Shared<C>& s, const Params& p, int lane) {
  if constexpr (C::kShortK) load_counts(s, p, lane);
  int total = 0, most = 0, all_rows = 0;
  for (int first = 0; first < p.num_experts; first += 32) {
    const int e = first + lane;
    const int rows = e < p.num_experts ? (C::kShortK ? s.num_rows[e] : rows_of<C>(p, e)) : 0;
    const int tiles = rows > 0 ? (rows + C::kMaxTokens - 1) / C::kMaxTokens : 0;
    most = max(most, tiles);
    all_rows += rows;
    int sum = tiles;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    if constexpr (C::kShortK) {
      const int end = total + sum;
#pragma unroll 1
      for (int i = end - tiles; i < min(end, C::kMapped); ++i) s.expert_of[i] = e;
    }
    if (e < p.num_experts) {
      s.tile_prefix[e + 1] = total + sum;
      s.num_rows[e] = rows;
    }
    total += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) s.tile_prefix[0] = 0;
  if (lane < p.num_phases) s.tickets[lane] = shape_tickets<C>(p, lane, total);
  if constexpr (C::kShortK) {
    most = __reduce_max_sync(0xffffffffu, most);
    all_rows = __reduce_add_sync(0xffffffffu, all_rows);
    if (lane == 0) s.lead = count_lead<C>(p, s.tickets[0], total, all_rows, most);
  }
}

/// The expert that a token tile belongs to: tile_prefix[e] <= key < tile_prefix[e + 1].
template <class C>
__device__ __forceinline__ int find_expert(const Shared<C>& s, const Params& p, int key) {
  if constexpr (C::kShortK) {
    if (key < C::kMapped) return s.expert_of[key];
  }
  int lo = 0, hi = p.num_experts;
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (s.tile_prefix[mid] <= key) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  return lo;
}

/// Of tickets behind the first `lead` token tiles of phase 0: turns of a token tile of each phase,
/// then the rest of phase 1. Whether `ticket` is of phase 0; it becomes that phase's.
template <class C>
__device__ __forceinline__ bool take_turn(const Shared<C>& s, int turns, int& ticket) {
  const int of_0 = s.tickets[0].row_tickets, of_1 = s.tickets[1].row_tickets;
  const int turn = turns == 0 ? 0 : min(ticket / (of_0 + of_1), turns);
  const int at = ticket - turn * (of_0 + of_1);
  const bool is_first = turn < turns && at < of_0;
  ticket = is_first ? (s.lead + turn) * of_0 + at : turn * of_1 + at - (turn < turns ? of_0 : 0);
  return is_first;
}

/// The first tile of a ticket. Tickets run through phase 0 for Shared::lead token tiles, then for
/// each token tile through those of phase 0, `lead` further, and its own of phase 1, then through
/// the rest of phase 1. In a phase by expert, row tiles, token tile, so that CTAs which share
/// weights run side by side. A tile only ever waits for smaller tickets: no expert has more than
/// `lead` token tiles.
///
/// While one thread looks for a tile it streams no weights. Hence the table of experts, and no
/// division that can be spared.
template <class C>
__device__ __forceinline__ TileInfo find_tile(const Shared<C>& s, const Params& p, int ticket) {
  const int num_token_tiles = s.tile_prefix[p.num_experts];
  TileInfo t{};
  t.phase = -1;
  int phase = 0;
  TicketShape shape = s.tickets[0];
  const int head = (C::kShortK ? s.lead : num_token_tiles) * shape.row_tickets;
  if (ticket >= head) {
    if (p.num_phases == 1) return t;
    ticket -= head;
    bool is_last = true;
    if constexpr (C::kShortK) is_last = !take_turn(s, num_token_tiles - s.lead, ticket);
    if (is_last) {
      phase = 1;
      shape = s.tickets[1];
      if (ticket >= num_token_tiles * shape.row_tickets) return t;
    }
  }
  const int expert = find_expert(s, p, ticket / shape.row_tickets);
  const int token_tiles = s.tile_prefix[expert + 1] - s.tile_prefix[expert];
  const int local = ticket - s.tile_prefix[expert] * shape.row_tickets;
  const int row_ticket = C::kShortK && token_tiles == 1 ? local : local / token_tiles;
  const int row_tile = row_ticket * shape.row_tiles;
  const int token0 = (local % token_tiles) * C::kMaxTokens;
  const int base =
      p.row_offset != nullptr ? static_cast<int>(p.row_offset[expert]) : expert * p.max_m;
  t.phase = phase;
  t.expert = expert;
  t.row_tile = row_tile;
  t.row0 = base + token0;
  t.num_tokens = min(s.num_rows[expert] - token0, C::kMaxTokens);
  t.ready_count = phase == 1 ? p.phase[0].num_row_tiles * token_tiles : 0;
  t.row_tiles = min(shape.row_tiles, p.phase[phase].num_row_tiles - row_tile);
  return t;
}

}  // namespace sluice::cuda
