// rows.cuh - producer role of the warp that carries finished tiles from shared memory to
// where they are read, in whole lines, so that math warps go on with the next tile.
#pragma once

#include "backend/cuda/ptx/bulk_store.cuh"
#include "backend/cuda/sm90_w4a8/producer.cuh"

namespace sluice::cuda {

/// `count` pieces of 16 bytes, each `*_step` bytes after the one before.
__device__ __forceinline__ void carry_pieces(const std::uint8_t* from, int from_step,
                                             std::uint8_t* to, long long to_step, int count) {
  constexpr int kTogether = 4;  // NOTE: one by one, each would wait for its load.
#pragma unroll 1
  for (; count >= kTogether; count -= kTogether) {
    uint4 pieces[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i, from += from_step) {
      pieces[i] = *reinterpret_cast<const uint4*>(from);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i, to += to_step) *reinterpret_cast<uint4*>(to) = pieces[i];
  }
#pragma unroll 1
  for (; count > 0; --count, from += from_step, to += to_step) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

/// The rows of a tile, `lanes` lanes (a power of two) for the pieces of each. `to`: the first row.
template <class C>
__device__ __forceinline__ void carry_tile(Shared<C>& s, int pitch, void* to, long long to_pitch,
                                           int num_tokens, int lanes) {
  // Read anew: producers have no registers to keep what follows from it.
  const int lane = ptx::thread_index() % 32;
  const int token = lane / lanes, step = 32 / lanes, at = lane % lanes * 16;
  carry_pieces(s.rows + token * pitch + at, step * pitch,
               static_cast<std::uint8_t*>(to) + token * to_pitch + at, step * to_pitch,
               (num_tokens - token + step - 1) / step);
  __syncwarp();
  if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.rows_empty);
}

/// A tile of h; then counts it as finished.
template <class C>
__device__ __forceinline__ void carry_hidden(Shared<C>& s, const Params& p, const Phase& phase,
                                             const TileInfo& t) {
  const int width = phase.n / 2;
  carry_tile(s, C::kHiddenPitch,
             phase.h + static_cast<long long>(t.row0) * width + t.row_tile * (kTileRows / 2), width,
             t.num_tokens, kTileRows / 2 / 16);
  if (ptx::thread_index() % 32 == 0 && p.num_phases == 2) {
    ptx::fence_proxy_async();  // the next phase reads these rows through the copy engine
    ptx::reduce_add_release_gpu(&p.sync[kSyncHeader + t.expert], 1);
  }
}

/// `num_slabs` slabs of y, from a row tile's `first_slab` on.
template <class C>
__device__ __forceinline__ void carry_bf16(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                           int row_tile, int first_slab, int num_slabs) {
  std::uint16_t* const to = phase.y + static_cast<long long>(t.row0) * phase.n +
                            row_tile * kTileRows + first_slab * kSlabRows;
  // NOTE: from 64 rows on bulk copies, which cost no instructions, gain more than loads and stores
  // (docs/performance-gpu-tried.md). Decode's few rows are quicker through registers.
  if constexpr (C::kIsDecode) {
    carry_tile(s, C::kRowPitch, to, 2ll * phase.n, t.num_tokens, num_slabs * (2 * kSlabRows / 16));
  } else {
    const int lane = ptx::thread_index() % 32;
    for (int token = lane; token < t.num_tokens; token += 32) {
      ptx::bulk_store(to + static_cast<long long>(token) * phase.n, s.rows + token * C::kRowPitch,
                      num_slabs * 2 * kSlabRows);
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    __syncwarp();
    if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.rows_empty);
  }
}

/// One warp. A tile stays in its slot while it is carried: registers are few.
template <class C>
__device__ __forceinline__ void carry_rows(Shared<C>& s, const Params& p, int lane) {
  Ring slots;
  std::uint32_t parity = 0;
  for (;;) {
    wait_bounded(&s.tile_full[slots.stage], slots.parity);
    const TileInfo& t = s.tile[slots.stage];
    if (t.phase < 0) break;
    const Phase& phase = p.phase[t.phase];
    if (phase.epilogue == Epilogue::kHidden) {
      wait_bounded(&s.rows_full, parity);
      parity ^= 1;
      carry_hidden(s, p, phase, t);
    } else if (stages_rows<C>(phase)) {
      const int runs = runs_of<C>(t);
      for (int i = 0; i < runs; ++i) {
        wait_bounded(&s.rows_full, parity);
        parity ^= 1;
        if constexpr (C::kPasses > 1) {
          carry_bf16(s, phase, t, t.row_tile, i * C::kSlabsPerPass, C::kSlabsPerPass);
        } else {
          carry_bf16(s, phase, t, t.row_tile + i, 0, i + 1 < runs ? kSlabsPerTile : t.num_slabs);
        }
      }
    }
    __syncwarp();
    if (lane < kWarpArrivals) ptx::mbarrier_arrive(&s.tile_empty[slots.stage]);
    slots.advance<Shared<C>::kTileSlots>();
  }
  if constexpr (!C::kIsDecode) ptx::bulk_wait<0>();
}

}  // namespace sluice::cuda
