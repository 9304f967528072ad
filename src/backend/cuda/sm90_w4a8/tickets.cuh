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

/// Row tiles of a ticket that are published as one tile: all, or one by one.
template <class C>
__device__ __forceinline__ int count_together(const Phase& phase, const TileInfo& t) {
  const bool streams = kStreams<C, 16> && t.num_tokens <= 16 && phase.home.origin == nullptr;
  return streams ? t.row_tiles : 1;
}
/// The same of a published tile.
template <class C>
__device__ __forceinline__ int row_tiles_of(const TileInfo& t) {
  return kStreams<C, 16> ? t.row_tiles : 1;
}

/// Passes along K that compute a row tile of so many slabs.
template <class C>
__device__ __forceinline__ int passes_of(int num_slabs) {
  return C::kPasses == 1 ? 1 : num_slabs / C::kSlabsPerPass;
}
/// Times that a published tile runs along K: its passes or its row tiles.
template <class C>
__device__ __forceinline__ int runs_of(const TileInfo& t) {
  static_assert(C::kPasses == 1 || !kStreams<C, 16>);
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

/// Token tiles before each expert, by one warp. Counts are read from global memory once per CTA.
template <class C>
__device__ __forceinline__ void scan_token_tiles(Shared<C>& s, const Params& p, int lane) {
  int total = 0;
  for (int first = 0; first < p.num_experts; first += 32) {
    const int e = first + lane;
    const int rows = e < p.num_experts ? rows_of<C>(p, e) : 0;
    int sum = rows > 0 ? (rows + C::kMaxTokens - 1) / C::kMaxTokens : 0;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(0xffffffffu, sum, d);
      if (lane >= d) sum += below;
    }
    if (e < p.num_experts) {
      s.tile_prefix[e + 1] = total + sum;
      s.num_rows[e] = rows;
    }
    total += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) s.tile_prefix[0] = 0;
  if (lane < p.num_phases) s.tickets[lane] = shape_tickets<C>(p, lane, total);
}

/// The first tile of a ticket. Tickets run through phase 0, then phase 1; in a phase by expert, row
/// tiles, token tile, so that CTAs which share weights run side by side and a tile only ever waits
/// for smaller tickets.
template <class C>
__device__ __forceinline__ TileInfo find_tile(const Shared<C>& s, const Params& p, int ticket) {
  const int num_token_tiles = s.tile_prefix[p.num_experts];
  TileInfo t{};
  t.phase = -1;
  int phase = 0;
  TicketShape shape = s.tickets[0];
  const int phase0_tickets = num_token_tiles * shape.row_tickets;
  if (ticket >= phase0_tickets) {
    if (p.num_phases == 1) return t;
    ticket -= phase0_tickets;
    phase = 1;
    shape = s.tickets[1];
    if (ticket >= num_token_tiles * shape.row_tickets) return t;
  }
  const int key = ticket / shape.row_tickets;
  int lo = 0, hi = p.num_experts;  // tile_prefix[lo] <= key < tile_prefix[hi]
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    if (s.tile_prefix[mid] <= key) {
      lo = mid;
    } else {
      hi = mid;
    }
  }
  const int token_tiles = s.tile_prefix[lo + 1] - s.tile_prefix[lo];
  const int local = ticket - s.tile_prefix[lo] * shape.row_tickets;
  const int row_tile = local / token_tiles * shape.row_tiles;
  const int token0 = (local % token_tiles) * C::kMaxTokens;
  const int base = p.row_offset != nullptr ? static_cast<int>(p.row_offset[lo]) : lo * p.max_m;
  t.phase = phase;
  t.expert = lo;
  t.row_tile = row_tile;
  t.row0 = base + token0;
  t.num_tokens = min(s.num_rows[lo] - token0, C::kMaxTokens);
  t.ready_count = phase == 1 ? p.phase[0].num_row_tiles * token_tiles : 0;
  t.row_tiles = min(shape.row_tiles, p.phase[phase].num_row_tiles - row_tile);
  return t;
}

}  // namespace sluice::cuda
