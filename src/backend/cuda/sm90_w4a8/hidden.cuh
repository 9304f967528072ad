// hidden.cuh - what becomes of a tile's sums: activated and quantized rows of h.
#pragma once

#include "backend/cuda/activation.cuh"
#include "backend/cuda/e4m3_group.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/sm90_w4a8/epilogue.cuh"

namespace sluice::cuda {

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

/// Slabs of a tile that are one warpgroup's.
template <class C>
inline constexpr int kHiddenSlabs = C::kPasses* C::kSlabsPerWarpgroup;

/// Per token, 448 / amax over the tile's 128 channels, into s.h_inv; the stored scale goes to
/// global.
template <class C, int N>
__device__ __forceinline__ void scale_hidden(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                             const MathLane& lane,
                                             const float (&h)[kHiddenSlabs<C>][N / 4]) {
  const int math_warp = lane.warpgroup * 4 + lane.warp;
  float m[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    m[i] = fabsf(h[0][i]);
#pragma unroll
    for (int b = 1; b < kHiddenSlabs<C>; ++b) m[i] = fmaxf(m[i], fabsf(h[b][i]));
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

/// What a thread activated in a pass that is not its tile's last: it reads it itself.
template <class C>
__device__ __forceinline__ float* parked_values(Shared<C>& s) {
  return reinterpret_cast<float*>(s.rows + C::kParkedAt) + threadIdx.x;
}

/// h = activate(gate, up) in f32, quantized, through shared memory to whole 128-byte rows; then
/// counts the tile as finished. A pass before the last activates and no more.
template <class C, int N, class Activation>
__device__ __forceinline__ void store_hidden(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                             int pass, const MathLane& lane,
                                             const Activation& activate,
                                             const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  float h[kHiddenSlabs<C>][N / 4];
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int at = 4 * (i / 2) + i % 2;
      h[kHiddenSlabs<C> - C::kSlabsPerWarpgroup + b][i] = activate(sum[b][at], sum[b][at + 2]);
    }
  }
  if constexpr (C::kPasses == 2) {
    static_assert(C::kSlabsPerWarpgroup == 1);
    float* const parked = parked_values(s);
    if (pass == 0) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) parked[i * C::kMathThreads] = h[1][i];
      return;
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) h[0][i] = parked[i * C::kMathThreads];
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
    for (int b = 0; b < kHiddenSlabs<C>; ++b) {
      const int slab = C::kPasses == 1 ? slab_of<C>(lane, 0, b) : slab_of<C>(lane, b, 0);
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
