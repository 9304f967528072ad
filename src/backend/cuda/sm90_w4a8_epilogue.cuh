// sm90_w4a8_epilogue.cuh - what becomes of a tile's sums: bf16 rows here or at their tokens' ranks,
// or activated and quantized rows of h.
#pragma once

#include "backend/cuda/activation.cuh"
#include "backend/cuda/e4m3_group.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/sm90_w4a8_config.cuh"
#include "backend/cuda/sm90_w4a8_unit.cuh"

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

/// bf16 rows: a thread's two rows are neighbouring channels, a warp writes whole 32-byte sectors.
template <class C, int N>
__device__ __forceinline__ void store_bf16(const Phase& phase, const TileInfo& t, int row_tile,
                                           const MathLane& lane,
                                           const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  const int first_slab = lane.warpgroup * C::kSlabsPerWarpgroup;
  const int channel = row_tile * kTileRows + first_slab * kSlabRows + lane.warp * 16 + 2 * lane.row;
  std::uint16_t* out = phase.y + static_cast<long long>(t.row0 + lane.column) * phase.n + channel;
  const int num_tokens = t.num_tokens - lane.column;
  // One running pointer, since a pointer per token would spill. The slabs of a token one after the
  // other: both know then whether there is such a token.
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * j + i < num_tokens) {
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
                                           const MathLane& lane,
                                           const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  constexpr int kCount = N < HomeStage<C>::kTokens ? N : HomeStage<C>::kTokens;
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
    const int slab = lane.warpgroup * C::kSlabsPerWarpgroup + b;
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

/// One round of the largest values over a warp's eight rows: lanes whose rows differ in `bit` share
/// `Count` columns from `first` on, and each keeps half of them.
template <int Count, int R>
__device__ __forceinline__ void max_of_rows(float (&m)[R], int row, int bit, int& first) {
  if constexpr (Count == 1) {
    m[0] = fmaxf(m[0], __shfl_xor_sync(0xffffffffu, m[0], 4 * bit));
  } else {
    const bool is_upper = (row & bit) != 0;
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      const float sent = is_upper ? m[i] : m[i + Count / 2];
      const float kept = is_upper ? m[i + Count / 2] : m[i];
      m[i] = fmaxf(kept, __shfl_xor_sync(0xffffffffu, sent, 4 * bit));
    }
    if (is_upper) first += Count / 2;
  }
}

/// Per token, 448 / amax over the tile's 128 channels, into s.h_inv; the stored scale goes to
/// global.
template <class C, int N>
__device__ __forceinline__ void scale_hidden(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                             const MathLane& lane,
                                             const float (&h)[C::kSlabsPerWarpgroup][N / 4]) {
  const int math_warp = lane.warpgroup * 4 + lane.warp;
  float m[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    m[i] = fabsf(h[0][i]);
#pragma unroll
    for (int b = 1; b < C::kSlabsPerWarpgroup; ++b) m[i] = fmaxf(m[i], fabsf(h[b][i]));
  }
  // The eight rows of a warp. At first two lanes have the same columns; each hands half of them to
  // the other and keeps the rest, so the values to exchange become fewer from round to round.
  int first = 0;
  max_of_rows<N / 4>(m, lane.row, 1, first);
  max_of_rows<N / 8>(m, lane.row, 2, first);
  max_of_rows<(N > 16 ? N / 16 : 1)>(m, lane.row, 4, first);
#pragma unroll
  for (int i = 0; i < (N / 4 + 7) / 8; ++i) {
    const int at = first + i;
    if (lane.row < N / 4) s.amax[math_warp][8 * (at / 2) + lane.column + at % 2] = m[i];
  }
  ptx::named_barrier(kMathBarrier, C::kMathThreads);
  const int token = lane.warpgroup * 128 + lane.thread;
  if (token < N) {
    float m = 0.0f;
#pragma unroll
    for (int w = 0; w < C::kMathWarps; ++w) m = fmaxf(m, s.amax[w][token]);
    s.h_inv[token] = group_inverse(m);
    if (token < t.num_tokens) {
      phase.h_scale[static_cast<long long>(t.row0 + token) * (phase.n / kTileRows) + t.row_tile] =
          group_scale(m);
    }
  }
  ptx::named_barrier(kMathBarrier, C::kMathThreads);
}

/// h = activate(gate, up) in f32, quantized, through shared memory to whole 128-byte rows; then
/// counts the tile as finished.
template <class C, int N, class Activation>
__device__ __forceinline__ void store_hidden(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                             const MathLane& lane, const Activation& activate,
                                             const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  float h[C::kSlabsPerWarpgroup][N / 4];
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int at = 4 * (i / 2) + i % 2;
      h[b][i] = activate(sum[b][at], sum[b][at + 2]);
    }
  }
  const bool dynamic = phase.h_scale != nullptr;
  if (dynamic) scale_hidden<C, N>(s, phase, t, lane, h);
  await_rows(s);
#pragma unroll
  for (int i = 0; i < N / 4; i += 2) {
    const int token = 8 * (i / 2) + lane.column;
    const float inv0 = dynamic ? s.h_inv[token] : phase.h_inv_static;
    const float inv1 = dynamic ? s.h_inv[token + 1] : phase.h_inv_static;
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
      const int slab = lane.warpgroup * C::kSlabsPerWarpgroup + b;
      std::uint8_t* dst = s.rows + token * C::kHiddenPitch + slab * 32 + lane.warp * 8 + lane.row;
      const std::uint16_t codes =
          ptx::e4m3x2_from_float(__fmul_rn(h[b][i + 1], inv1), __fmul_rn(h[b][i], inv0));
      dst[0] = static_cast<std::uint8_t>(codes);
      dst[C::kHiddenPitch] = static_cast<std::uint8_t>(codes >> 8);
    }
  }
  hand_over_rows(s);
}

}  // namespace sluice::cuda
