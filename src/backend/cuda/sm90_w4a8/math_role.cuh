// math_role.cuh - math role: tiles from the main loop to their finished rows.
#pragma once

#include "backend/cuda/activation.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/sm90_w4a8/config.cuh"
#include "backend/cuda/sm90_w4a8/epilogue.cuh"
#include "backend/cuda/sm90_w4a8/hidden.cuh"
#include "backend/cuda/sm90_w4a8/mainloop.cuh"

namespace sluice::cuda {

/// Whether the tile has rows for this warpgroup: the last one of an odd n may not. A pass has rows
/// for all.
template <class C>
__device__ __forceinline__ bool has_slabs(const TileInfo& t, const MathLane& lane) {
  return C::kPasses > 1 || lane.warpgroup * C::kSlabsPerWarpgroup < t.num_slabs;
}

/// One scale for all rows of x, after the last step.
template <int R>
__device__ __forceinline__ void scale_rows(float (&sum)[R], float x_scale) {
#pragma unroll
  for (int i = 0; i < R; ++i) sum[i] = __fmul_rn(sum[i], x_scale);
}

/// One scale for each row of x, after the last step. `x_scale`: of this thread's columns.
template <int R>
__device__ __forceinline__ void scale_rows(float (&sum)[R], const float* x_scale) {
#pragma unroll
  for (int i = 0; i < R; i += 4) {
    const float2 xs = *reinterpret_cast<const float2*>(x_scale + i / 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i + j] = __fmul_rn(sum[i + j], j % 2 == 0 ? xs.x : xs.y);
  }
}

/// The finished sums meet the scales of their rows: one for all rows, or those of the tile's last
/// stage.
template <class C, int N>
__device__ __forceinline__ void meet_row_scales(Shared<C>& s, const Phase& phase, Ring& ring,
                                                float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  if constexpr (C::has_row_stage(0)) {
    const MathLane lane = make_math_lane<C>();
    const int stage = acquire(s, ring);
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
      scale_rows(sum[b], view_stage(s, stage, lane).x_scale);
    }
    release(s, stage);
  } else {
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) scale_rows(sum[b], phase.x_static);
  }
}

template <class C>
inline constexpr bool kRunsOn =
    C::kShortK && !C::kIsDecode && C::kFormat == WeightFormat::kInt4 && C::kGroup == 128;

/// A finished row tile leaves. `t`: what was published, `row_tile` of it.
template <class C, XScale X, int N>
__device__ __forceinline__ void finish_tile(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                            int row_tile, int pass, Ring& ring, bool has_rows,
                                            float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  if constexpr (X == XScale::kPerRow) meet_row_scales<C, N>(s, phase, ring, sum);
  // Made and read again: along K registers are for sums.
  const MathLane again = make_math_lane<C>();
  if (phase.epilogue == Epilogue::kHidden) {
    visit_activation<C::kActivations>(phase.activation, [&](const auto& activate) {
      store_hidden<C, N>(s, phase, t, pass, again, activate, sum);
    });
  } else if (stages_rows<C>(phase)) {
    await_rows(s);
    if (has_rows) stage_bf16<C, N>(s, again, sum);
    hand_over_rows(s);
  } else if (!has_rows) {
    return;
  } else if (phase.home.origin != nullptr) {
    store_home<C, N>(s, phase, t, pass, again, sum);
  } else {
    store_bf16<C, N>(phase, row_place<C>(phase, t, row_tile, pass, again), sum);
  }
}

/// Row tiles of y without a stop between them: one is stored while the next one's first product
/// runs.
template <class C, XScale X, int N>
__device__ __forceinline__ void run_on(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                       const MathLane& lane, Ring& ring, float (&sum)[2][N / 2]) {
  clear(sum[0]);
  clear(sum[1]);
  const int num_steps = phase.num_steps;
  const bool has_last = has_slabs<C>(t, make_math_lane<C>());
  RowPlace place = row_place<C>(phase, t, t.row_tile, 0, make_math_lane<C>());
  int left = num_steps;
  const auto leave = [&] {
    if constexpr (X == XScale::kPerRow) meet_row_scales<C, N>(s, phase, ring, sum);
    store_bf16<C, N>(phase, place, sum);
    place.out += kTileRows;
  };
  multiply_two_slabs<C, X, N>(s, ring, num_steps * (t.row_tiles - (has_last ? 0 : 1)), lane, sum,
                              [&] {
                                if (--left > 0) return;
                                leave();
                                clear(sum[0]);
                                clear(sum[1]);
                                left = num_steps;
                              });
  leave();
  if (has_last) return;
  for (int k = 0; k < num_steps; ++k) release(s, acquire(s, ring));
}

/// The row tiles of a published tile.
template <class C, XScale X, int N>
__device__ __forceinline__ void compute_tile(Shared<C>& s, const Params& p, const TileInfo& t,
                                             const MathLane& lane, Ring& ring) {
  const Phase& phase = p.phase[t.phase];
  float sum[C::kSlabsPerWarpgroup][N / 2];
  const bool busy = has_slabs<C>(t, make_math_lane<C>());
  const auto ask_for_origins = [&] {
    if (busy && phase.home.origin != nullptr) fetch_origins<C>(s, phase, t, make_math_lane<C>());
  };
  if constexpr (C::kPasses == 1) ask_for_origins();
  if constexpr (kStreams<C, N>) {
    clear(sum[0]);
    const int busy_tiles = t.row_tiles - (busy ? 0 : 1);
    // Where K is short a row tile is over after two steps of math: what its store needs is kept.
    const bool is_short = C::kShortK && phase.epilogue == Epilogue::kBf16 &&
                          !stages_rows<C>(phase) && phase.home.origin == nullptr;
    RowPlace place = row_place<C>(phase, t, t.row_tile, 0, make_math_lane<C>());
    int row_tile = t.row_tile;
    if (busy_tiles > 0) {
      multiply_slab_ahead<C, X, N>(
          s, ring, phase.num_steps, busy_tiles, lane, sum, [&](float(&done)[1][N / 2]) {
            if (is_short) {
              if constexpr (X == XScale::kPerRow) meet_row_scales<C, N>(s, phase, ring, done);
              store_bf16<C, N>(phase, place, done);
              place.out += kTileRows;
            } else {
              finish_tile<C, X, N>(s, phase, t, row_tile++, 0, ring, true, done);
            }
          });
    }
    if (busy) return;
    for (int k = 0; k < phase.num_steps; ++k) release(s, acquire(s, ring));
    finish_tile<C, X, N>(s, phase, t, t.row_tile + busy_tiles, 0, ring, false, sum);
  } else if constexpr (C::kPasses == 1) {
    if constexpr (kRunsOn<C>) {
      if (t.row_tiles > 1) return run_on<C, X, N>(s, phase, t, lane, ring, sum);
    }
    if constexpr (N > kTogetherTokens<C>) {
      multiply_tile<C, X, N>(s, ring, phase.num_steps, busy, lane, sum);
      finish_tile<C, X, N>(s, phase, t, t.row_tile, 0, ring, has_slabs<C>(t, make_math_lane<C>()),
                           sum);
    } else {
      // Asked again at each end: along K registers are for sums.
      const auto has_rows = [&](int i) {
        return i + 1 < t.row_tiles || has_slabs<C>(t, make_math_lane<C>());
      };
      int i = 0;
      do {
        multiply_tile<C, X, N>(s, ring, phase.num_steps, has_rows(i), lane, sum);
        finish_tile<C, X, N>(s, phase, t, t.row_tile + i, 0, ring, has_rows(i), sum);
      } while (++i < t.row_tiles);
    }
  } else {
#pragma unroll 1
    for (int pass = 0; pass < passes_of<C>(t.num_slabs); ++pass) {
      ask_for_origins();
      multiply_tile<C, X, N>(s, ring, phase.num_steps, true, lane, sum);
      finish_tile<C, X, N>(s, phase, t, t.row_tile, pass, ring, true, sum);
    }
  }
}

/// The number of columns is chosen here, once per tile, outside every loop over K.
template <class C, XScale X>
__device__ __forceinline__ void compute_columns(Shared<C>& s, const Params& p, const TileInfo& t,
                                                const MathLane& lane, Ring& ring) {
  if (t.num_tokens <= 8) {
    compute_tile<C, X, 8>(s, p, t, lane, ring);
  } else if (t.num_tokens <= 16) {
    compute_tile<C, X, 16>(s, p, t, lane, ring);
  } else if (t.num_tokens <= 32) {
    compute_tile<C, X, 32>(s, p, t, lane, ring);
  } else if (C::kMaxTokens == 64 || t.num_tokens <= 64) {
    compute_tile<C, X, 64>(s, p, t, lane, ring);
  } else if constexpr (C::kPasses > 1) {
    if (t.num_tokens <= 96) {
      compute_tile<C, X, 96>(s, p, t, lane, ring);
    } else {
      compute_tile<C, X, 128>(s, p, t, lane, ring);
    }
  } else if constexpr (C::kMaxTokens >= 128) {
    compute_tile<C, X, 128>(s, p, t, lane, ring);
  }
}

/// This CTA's next tiles, up to the last one of `last_phase`. The one after it is left where it is.
template <class C, XScale X>
__device__ __forceinline__ void compute_tiles(Shared<C>& s, const Params& p, const MathLane& lane,
                                              Ring& ring, int last_phase) {
  constexpr std::uint32_t kSlots = Shared<C>::kTileSlots;
  std::uint32_t& tiles = s.progress[threadIdx.x / 32].tiles;
  for (;;) {
    const std::uint32_t n = tiles;
    wait(&s.tile_full[n % kSlots], n / kSlots % 2);
    const TileInfo& t = s.tile[n % kSlots];
    if (t.phase < 0 || t.phase > last_phase) return;
    compute_columns<C, X>(s, p, t, lane, ring);
    __syncwarp();
    if (threadIdx.x % 32 < kWarpArrivals) ptx::mbarrier_arrive(&s.tile_empty[tiles % kSlots]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ++tiles;
    __syncwarp();
  }
}

template <class C>
__device__ __forceinline__ void math_role(Shared<C>& s, const Params& p, const MathLane& lane) {
  Ring ring;
  if constexpr (C::kXScale == XScale::kRowThenGroup) {
    compute_tiles<C, XScale::kPerRow>(s, p, lane, ring, 0);
    if constexpr (C::kComputesBothPhases) {
      compute_tiles<C, XScale::kPerGroup>(s, p, lane, ring, 1);
    }
  } else {
    compute_tiles<C, C::kXScale>(s, p, lane, ring, 1);
  }
}

}  // namespace sluice::cuda
