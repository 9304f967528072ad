// epilogue.cuh - what becomes of a tile's sums: bf16 rows here or at their tokens' ranks.
// Rows of h: hidden.cuh.
#pragma once

#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/sm90_w4a8/config.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

inline constexpr int kMathBarrier = 1;  ///< Named barrier of the math warpgroups.
inline constexpr int kHomeBarrier = 2;  ///< And from here on those of each of them.

/// Waits until the tile before has left Shared::rows. Each warp counts for itself.
template <class C>
__device__ __forceinline__ void await_rows(Shared<C>& s) {
  std::uint32_t& parity = s.progress[threadIdx.x / 32].rows_parity;
  wait(&s.rows_empty, parity);
  __syncwarp();
  if (threadIdx.x % 32 == 0) parity ^= 1;
}

/// This warp has put its part of a tile there.
template <class C>
__device__ __forceinline__ void hand_over_rows(Shared<C>& s) {
  __syncwarp();
  if (threadIdx.x % 32 < kWarpArrivals) ptx::mbarrier_arrive(&s.rows_full);
}

/// Slab `b` of a warpgroup's in a pass, counted from the tile's first.
template <class C>
__device__ __forceinline__ int slab_of(const MathLane& lane, int pass, int b) {
  return pass * C::kSlabsPerPass + lane.warpgroup * C::kSlabsPerWarpgroup + b;
}

/// bf16 rows, to shared memory: a warp that carries finished rows does the rest.
template <class C, int N>
__device__ __forceinline__ void stage_bf16(Shared<C>& s, const MathLane& lane,
                                           const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  const int channel =
      lane.warpgroup * C::kSlabsPerWarpgroup * kSlabRows + lane.warp * 16 + 2 * lane.row;
  std::uint8_t* const out = s.rows + lane.column * C::kRowPitch + 2 * channel;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
        *reinterpret_cast<std::uint32_t*>(out + (8 * j + i) * C::kRowPitch + 2 * b * kSlabRows) =
            ptx::bf16x2_from_float(sum[b][4 * j + 2 + i], sum[b][4 * j + i]);
      }
    }
  }
  if constexpr (!C::kIsDecode) ptx::fence_proxy_async_shared();  // for bulk copies
}

/// Where a thread stores its sums of a tile of y.
struct RowPlace {
  std::uint16_t* out;  // its first channel of its first token
  int num_tokens;      // from that one on
};
template <class C>
__device__ __forceinline__ RowPlace row_place(const Phase& phase, const TileInfo& t, int row_tile,
                                              int pass, const MathLane& lane) {
  const int first_slab = slab_of<C>(lane, pass, 0);
  const int channel = row_tile * kTileRows + first_slab * kSlabRows + lane.warp * 16 + 2 * lane.row;
  return {.out = phase.y + static_cast<long long>(t.row0 + lane.column) * phase.n + channel,
          .num_tokens = t.num_tokens - lane.column};
}

/// bf16 rows: a thread's two rows are neighbouring channels, a warp writes whole 32-byte sectors.
template <class C, int N>
__device__ __forceinline__ void store_bf16(const Phase& phase, const RowPlace& place,
                                           const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  std::uint16_t* out = place.out;
  // One running pointer, since a pointer per token would spill. The slabs of a token one after the
  // other: both know then whether there is such a token.
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i < place.num_tokens) {
#pragma unroll
        for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
          *reinterpret_cast<std::uint32_t*>(out + i * phase.n + b * kSlabRows) =
              ptx::bf16x2_from_float(sum[b][4 * j + 2 + i], sum[b][4 * j + i]);
        }
      }
    }
    out += 8 * static_cast<long long>(phase.n);
  }
}

/// Rows that leave for their tokens' ranks go through shared memory, in lines of 128 bytes that a
/// link takes whole. Each warpgroup has its own part of what store_hidden() uses in the phase
/// before, so warpgroups do not wait for each other.
template <class C>
struct HomeStage {
  static constexpr int kTokens = C::kMaxTokens / C::kMathWarpgroups;  // staged at a time
  std::uint8_t* line;  // [kTokens, kHiddenPitch] 64 channels each
  std::uint64_t* row;  // [kMaxTokens] origins, then where the rows go

  __device__ __forceinline__ HomeStage(Shared<C>& s, const MathLane& lane)
      : line(s.rows + lane.warpgroup * kTokens * C::kHiddenPitch),
        row(reinterpret_cast<std::uint64_t*>(s.amax[4 * lane.warpgroup])) {}
};

/// Asks for the origins of the tile's rows, which come while it is computed.
template <class C>
__device__ __forceinline__ void fetch_origins(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                              const MathLane& lane) {
  static_assert(C::kMaxTokens <= 128 && 4 * sizeof(s.amax[0]) >= 8 * C::kMaxTokens);
  if (lane.thread >= t.num_tokens) return;
  ptx::cp_async_8(HomeStage<C>(s, lane).row + lane.thread,
                  phase.home.origin + t.row0 + lane.thread);
}

/// bf16 rows, each to its home.
template <class C, int N>
__device__ __forceinline__ void store_home(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                           int pass, const MathLane& lane,
                                           const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  constexpr int kTokens = HomeStage<C>::kTokens;
  constexpr int kCount = N < kTokens ? N : N % kTokens == 0 ? kTokens : N % kTokens;
  const HomeStage<C> stage(s, lane);
  const int barrier = kHomeBarrier + lane.warpgroup;
  wait(&s.rows_empty, s.progress[threadIdx.x / 32].rows_parity);
  ptx::cp_async_wait();
  if (lane.thread < t.num_tokens) {
    const std::uint64_t at = stage.row[lane.thread];
    stage.row[lane.thread] = reinterpret_cast<std::uint64_t>(
        phase.home.rows[at >> 32] + static_cast<long long>(at & 0xffffffffu) * phase.n);
  }
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
    const int slab = slab_of<C>(lane, pass, b);
    const int channel = t.row_tile * kTileRows + slab * kSlabRows + lane.thread % 8 * 8;
#pragma unroll
    for (int first = 0; first < N; first += kCount) {
#pragma unroll
      for (int j = 0; j < kCount / 8; ++j) {
        std::uint8_t* const to =
            stage.line + (8 * j + lane.column) * C::kHiddenPitch + (lane.warp * 8 + lane.row) * 4;
        const int at = 4 * (first / 8 + j);
        *reinterpret_cast<std::uint32_t*>(to) = ptx::bf16x2_from_float(sum[b][at + 2], sum[b][at]);
        *reinterpret_cast<std::uint32_t*>(to + C::kHiddenPitch) =
            ptx::bf16x2_from_float(sum[b][at + 3], sum[b][at + 1]);
      }
      ptx::named_barrier(barrier, 128);
      for (int i = lane.thread / 8; i < kCount; i += 16) {
        if (first + i >= t.num_tokens) break;
        auto* const row = reinterpret_cast<std::uint16_t*>(stage.row[first + i]);
        *reinterpret_cast<uint4*>(row + channel) = *reinterpret_cast<const uint4*>(
            stage.line + i * C::kHiddenPitch + lane.thread % 8 * 16);
      }
      ptx::named_barrier(barrier, 128);
    }
  }
}

}  // namespace sluice::cuda
