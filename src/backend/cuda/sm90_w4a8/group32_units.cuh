// group32_units.cuh - groups of 32: from the products of a unit to sums.
#pragma once

#include "backend/cuda/sm90_w4a8/promote.cuh"

namespace sluice::cuda {

/// Joins the four units of a step by their weight scales: joined = acc * ws for unit 0, then += .
template <int R>
__device__ __forceinline__ void join(const int i, const float (&acc)[R], float2 ws,
                                     float (&joined)[R]) {
#pragma unroll
  for (int at = 0; at < R; ++at) {
    const float scale = at % 4 < 2 ? ws.x : ws.y;
    joined[at] = i == 0 ? __fmul_rn(acc[at], scale) : __fmaf_rn(acc[at], scale, joined[at]);
  }
}

/// sum += joined * activation scale, for `Count` of this thread's columns from `first` (a constant)
/// on; the first of `joined` belongs to column `origin`.
template <int Count, int J, int R>
__device__ __forceinline__ void add_joined(const int first, const int origin,
                                           const float (&joined)[J], const float (&xs)[Count],
                                           float (&sum)[R]) {
#pragma unroll
  for (int i = 0; i < 2 * Count; ++i) {
    const int at = 2 * first + i;
    sum[at] = __fmaf_rn(joined[at - 2 * origin], xs[i / 4 * 2 + i % 2], sum[at]);
  }
}

/// Adds unit `i` (0..3) of a step: to `joined`, or, where no scale is met on the way, to the sums
/// from column `first` (a constant) on.
template <XScale X, int J, int R>
__device__ __forceinline__ void add_unit(const int i, const int first, const float (&acc)[J],
                                         float2 ws, float (&joined)[J], float (&sum)[R]) {
  if constexpr (X == XScale::kPerGroup) {
    join(i, acc, ws, joined);
  } else {
#pragma unroll
    for (int at = 0; at < J; ++at) {
      const float scale = at % 4 < 2 ? ws.x : ws.y;
      sum[2 * first + at] = __fmaf_rn(acc[at], scale, sum[2 * first + at]);
    }
  }
}

/// After the last unit of a step: the joined sums of columns `first` (a constant) on meet their
/// activation scales.
template <XScale X, int Chunk, int J, int R>
__device__ __forceinline__ void finish_step(const int first, const float (&joined)[J],
                                            const float* x_scale, float (&sum)[R]) {
  if constexpr (X == XScale::kPerGroup) {
    constexpr int kCount = J / 2 < Chunk ? J / 2 : Chunk;
#pragma unroll
    for (int c = first; c < first + J / 2; c += kCount) {
      float xs[kCount];
      load_token_scales<X>(x_scale + c, xs);
      add_joined(c, first, joined, xs, sum);
    }
  }
}

}  // namespace sluice::cuda
