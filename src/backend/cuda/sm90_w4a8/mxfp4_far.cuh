// mxfp4_far.cuh - math along K for matrices of mxfp4 with scales too far apart for e5m2.
//
// Some row has scales that differ by more than 2^26. Each 32 of K has an accumulator and a scale
// of its own: sum = fma(p, ws * xs, sum), or, with one scale of x per row, fma(p, ws, sum), in
// order of k. Such matrices are rare, so nothing overlaps.
#pragma once

#include "backend/cuda/sm90_w4a8/mxfp4.cuh"
#include "backend/cuda/sm90_w4a8/promote.cuh"
#include "backend/cuda/sm90_w4a8/ring.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// A word that makes every weight what it is, without a scale.
inline constexpr std::uint32_t kNoRise = 0x0d0d0d0du;

/// Scale g (a constant, 0..3) of a row of a far matrix, by the row's word.
__device__ __forceinline__ float far_scale(std::uint32_t word, int g) {
  const int largest = static_cast<int>(word >> 21 & 3);
  const int place = g < largest ? g : g - 1;  // Among the other three.
  const int below = g == largest ? 0 : static_cast<int>(word >> 7 * place & 127);
  const int code = static_cast<int>(word >> 23 & 255) - below;
  return __uint_as_float(code > 0 ? static_cast<std::uint32_t>(code) << 23 : 0x00400000u);
}

/// As multiply_step32(), of e5m2 fragments.
template <int R>
__device__ __forceinline__ void multiply_e5m2_step32(float (&acc)[R], const Fragments& f,
                                                     std::uint32_t x, int i) {
  ptx::wgmma_fence();
  ptx::wgmma_m64k32_e5m2(acc, f.a[i], x + i * (32 >> 4), false);
  ptx::wgmma_commit();
}

/// A far matrix, 32 columns at a time.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_mxfp4_far(Shared<C>& s, Ring& ring, int num_steps,
                                                   const MathLane& lane, float (&sum)[1][N / 2]) {
  constexpr int kColumns = N < 32 ? N : 32, kParts = N / kColumns;
  constexpr int kPartRows = kColumns * kStepK >> 4;  // of x, in units of a descriptor
  constexpr int kCount = kColumns / 4;
  float acc[kColumns / 2];
  clear(acc);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire_together(s, ring);
    const StageView v = view_stage(s, stage, lane);
    Fragments f;
    widen_e2m1(load_codes(v.codes), {kNoRise, kNoRise}, f);
    pin(f);
#pragma unroll
    for (int unit = 0; unit < 4 * kParts; ++unit) {
      const int part = unit / 4, g = unit % 4, first = part * kCount;
      multiply_e5m2_step32(acc, f, v.x + part * kPartRows, g);
      await<0>(acc);
      const ScaleWords words = load_scale_words(v.scales);
      const float ws[2] = {far_scale(words.lo, g), far_scale(words.hi, g)};
      float xs[kCount];
      load_token_scales<X>(v.x_scale + first, xs);
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        float& to = sum[0][2 * first + i];
        float scale = ws[i / 2 % 2];
        if constexpr (X == XScale::kPerGroup) scale = __fmul_rn(scale, xs[i / 4 * 2 + i % 2]);
        to = __fmaf_rn(acc[i], scale, to);
      }
      pin(sum[0]);
    }
    release(s, stage);
  }
}

}  // namespace sluice::cuda
