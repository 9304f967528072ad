// promote.cuh - from the products of a unit to sums: the only place where its scales meet
// them.
#pragma once

#include "backend/cuda/sm90_w4a8/config.cuh"

namespace sluice::cuda {

/// Scales of this thread's next columns: two for each 8 tokens. With one scale per row the loops
/// need none.
template <XScale X, int Count>
__device__ __forceinline__ void load_token_scales(const float* x_scale, float (&xs)[Count]) {
  if constexpr (X == XScale::kPerRow) {
    return;
  } else if constexpr (Count == 2) {
    const float2 v = *reinterpret_cast<const float2*>(x_scale);
    xs[0] = v.x, xs[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < Count; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(x_scale + i);
      xs[i] = v.x, xs[i + 1] = v.y, xs[i + 2] = v.z, xs[i + 3] = v.w;
    }
  }
}

/// sum += acc * scales, for this thread's columns from `first` (a constant) on: the only place
/// where the scales of a unit meet sums. One scale per row comes later: scale_rows().
template <XScale X, int Count, int R>
__device__ __forceinline__ void promote_columns(const int first, const float (&acc)[R], float2 ws,
                                                const float (&xs)[Count], float (&sum)[R]) {
#pragma unroll
  for (int i = 0; i < Count; i += 2) {
    const int at = 2 * (first + i);
    if constexpr (X == XScale::kPerGroup) {
      sum[at + 0] = __fmaf_rn(acc[at + 0], __fmul_rn(ws.x, xs[i]), sum[at + 0]);
      sum[at + 1] = __fmaf_rn(acc[at + 1], __fmul_rn(ws.x, xs[i + 1]), sum[at + 1]);
      sum[at + 2] = __fmaf_rn(acc[at + 2], __fmul_rn(ws.y, xs[i]), sum[at + 2]);
      sum[at + 3] = __fmaf_rn(acc[at + 3], __fmul_rn(ws.y, xs[i + 1]), sum[at + 3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[at + j] = __fmaf_rn(acc[at + j], j < 2 ? ws.x : ws.y, sum[at + j]);
      }
    }
  }
}

/// The same for all columns. `first` has the scales of the first `Chunk` of them, the others' are
/// loaded while those before are used.
template <XScale X, int Chunk, int R>
__device__ __forceinline__ void promote_from(const float (&first)[Chunk], const float (&acc)[R],
                                             float2 ws, const float* x_scale, float (&sum)[R]) {
  float xs[2][Chunk];
#pragma unroll
  for (int i = 0; i < Chunk; ++i) xs[0][i] = first[i];
#pragma unroll
  for (int c = 0; c < R / 2; c += Chunk) {
    const int at = c / Chunk % 2;
    if (c + Chunk < R / 2) load_token_scales<X>(x_scale + c + Chunk, xs[1 - at]);
    promote_columns<X>(c, acc, ws, xs[at], sum);
    // NOTE: keeps the scheduler from loading every scale at once, which spills with 128 sums.
    if constexpr (R == 64 && X == XScale::kPerGroup) asm volatile("" ::: "memory");
  }
}

template <XScale X, int Chunk, int R>
__device__ __forceinline__ void promote(const float (&acc)[R], float2 ws, const float* x_scale,
                                        float (&sum)[R]) {
  constexpr int kCount = R / 2 < Chunk ? R / 2 : Chunk;
  float first[kCount];
  load_token_scales<X>(x_scale, first);
  promote_from<X>(first, acc, ws, x_scale, sum);
}

}  // namespace sluice::cuda
