// mxfp4_loops.cuh - math along K for mxfp4, in the two ways that a matrix is packed for
// (layout.cuh).
//
//   near   what the scales of a row differ by is in the e5m2 codes: units of 128, of which none has
//          a weight scale. sum = fma(p, xs, sum) (one scale of x per row: sum = sum + p), in order
//          of k, and at the end sum * the row's scale
//            decode, 8 or 16 columns   multiply_mxfp4_slab_ahead
//            decode, 32 or 64          multiply_mxfp4_slab
//            prefill, up to 64         multiply_mxfp4_two_slabs
//            prefill, 128              multiply_mxfp4_128
//   far    mxfp4_far.cuh, in a kernel of its own: both kinds of loops would spill
//
// The loops of near matrices overlap the same things as those of mainloop.cuh, whose
// rules against serialized products hold here too. Which of them runs changes no bits; whether a
// matrix is far does, and depends on its weights alone.
#pragma once

#include "backend/cuda/sm90_w4a8/mxfp4.cuh"
#include "backend/cuda/sm90_w4a8/mxfp4_far.cuh"
#include "backend/cuda/sm90_w4a8/promote.cuh"
#include "backend/cuda/sm90_w4a8/ring.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// sum += acc * activation scales: xs of this thread's columns from `first` (a constant) on.
template <XScale X, int Count, int R>
__device__ __forceinline__ void add_near_columns(const int first, const float (&acc)[R],
                                                 const float (&xs)[Count], float (&sum)[R]) {
#pragma unroll
  for (int i = 0; i < 2 * Count; ++i) {
    const int at = 2 * first + i;
    if constexpr (X == XScale::kPerGroup) {
      sum[at] = __fmaf_rn(acc[at], xs[i / 4 * 2 + i % 2], sum[at]);
    } else {
      sum[at] = __fadd_rn(sum[at], acc[at]);
    }
  }
}

/// The same for all columns; scales are loaded while those before are used.
template <XScale X, int Chunk, int R>
__device__ __forceinline__ void add_near(const float (&acc)[R], const float* x_scale,
                                         float (&sum)[R]) {
  constexpr int kCount = R / 2 < Chunk ? R / 2 : Chunk;
  float xs[2][kCount];
  load_token_scales<X>(x_scale, xs[0]);
#pragma unroll
  for (int c = 0; c < R / 2; c += kCount) {
    const int at = c / kCount % 2;
    if (c + kCount < R / 2) load_token_scales<X>(x_scale + c + kCount, xs[1 - at]);
    add_near_columns<X>(c, acc, xs[at], sum);
    // NOTE: keeps the scheduler from loading every scale at once, which spills with 128 sums.
    if constexpr (R == 64 && X == XScale::kPerGroup) asm volatile("" ::: "memory");
  }
}

/// The finished sums meet the scales of their rows.
template <int R>
__device__ __forceinline__ void meet_near_scales(const ScaleWords& words, float (&sum)[R]) {
  const float lo = near_scale(words.lo), hi = near_scale(words.hi);
#pragma unroll
  for (int i = 0; i < R; ++i) sum[i] = __fmul_rn(sum[i], i % 4 < 2 ? lo : hi);
}

template <class C, int R>
__device__ __forceinline__ void meet_slab_scales(const std::uint8_t* scales, float (&sum)[2][R]) {
  meet_near_scales(load_scale_words(scales), sum[0]);
  meet_near_scales(load_scale_words(scales + C::kSlabBytes), sum[1]);
}

/// One slab, one unit after the other; other warpgroups fill the gaps.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_mxfp4_slab(Shared<C>& s, Ring& ring, int num_steps,
                                                    const MathLane& lane, float (&sum)[1][N / 2]) {
  float acc[N / 2];
  clear(acc);
  for (int k = num_steps; k > 0; --k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    Fragments f;
    widen_e2m1(load_codes(v.codes), load_scale_words(v.scales), f);
    multiply_e5m2(acc, f, v.x);
    await<0>(acc);
    add_near<X, 2>(acc, v.x_scale, sum[0]);
    if (k == 1) meet_near_scales(load_scale_words(v.scales), sum[0]);
    release(s, stage);
  }
}

/// One slab, few columns: the next step's weights are widened while this step is multiplied. After
/// the last step a warp takes the stage that it has once more and widens in vain: so the loop has
/// no branch, and the descriptor of x stays in a uniform register.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_mxfp4_slab_ahead(Shared<C>& s, Ring& ring, int steps,
                                                          const MathLane& lane,
                                                          float (&sum)[1][N / 2]) {
  float acc[N / 2];
  clear(acc);
  int left = uniform(steps);
  Ring at = uniform(ring), now = at;
  acquire_together(s, at);
  std::uint32_t x = uniform(view_stage(s, now.stage, lane).x);
  Fragments f;
  ScaleWords words = load_scale_words(view_stage(s, now.stage, lane).scales);
  widen_e2m1(load_codes(view_stage(s, now.stage, lane).codes), words, f);
  auto step = [&] {
    std::uint32_t next_x = x;
    pin(f);
    multiply_e5m2(acc, f, x);
    const int stage = now.stage;
    const bool more = --left > 0;
    now = more ? at : now;
    wait_together(s, now);
    at = more ? after<C>(at) : at;
    // Fragments of a product in flight must not be written: the next ones get their signs after it.
    const StageView ahead = view_stage(s, now.stage, lane);
    next_x = uniform(ahead.x);
    const Codes codes = load_codes(ahead.codes);
    words = load_scale_words(ahead.scales);
    Fragments next;
    look_up(codes, words, next);
    await<0>(acc);
    pin(next);
    add_signs(codes, next);
    f = next;
    add_near<X, 2>(acc, view_stage(s, stage, lane).x_scale, sum[0]);
    release(s, stage);
    x = next_x;
  };
  step();
  while (left > 0) step();
  meet_near_scales(words, sum[0]);
  ring = at;
}

/// Two slabs, up to 64 columns: slab 0 is added while slab 1 is multiplied, slab 1 while slab 0 of
/// the next step is.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_mxfp4_two_slabs(Shared<C>& s, Ring& ring, int steps,
                                                         const MathLane& lane,
                                                         float (&sum)[2][N / 2]) {
  float acc0[N / 2], acc1[N / 2];
  Fragments f0, f1;
  clear(acc0);
  clear(acc1);
  const int num_steps = uniform(steps);
  Ring at = uniform(ring);
  int stage = 0;
  // Scales of x are read where they are used, from a stage that is kept until then: registers are
  // for sums and for the tables that weights are looked up in.
  auto add = [&](int b, const float(&acc)[N / 2]) {
    add_near<X, 4>(acc, view_stage(s, stage, lane).x_scale, sum[b]);
    pin(sum[b]);
  };
  gather_lanes();
  auto step = [&](bool is_first) {
    const int next_stage = acquire_together(s, at);
    StageView v = view_stage(s, next_stage, lane);
    v.x = uniform(v.x);
    widen_e2m1(load_codes(v.codes), load_scale_words(v.scales), f0);
    widen_e2m1(load_codes(v.codes + C::kSlabBytes), load_scale_words(v.scales + C::kSlabBytes), f1);
    pin(f0);
    pin(f1);
    multiply_e5m2(acc0, f0, v.x);
    if (!is_first) {
      add(1, acc1);
      release(s, stage);
    }
    stage = next_stage;
    multiply_e5m2(acc1, f1, v.x);
    await<1>(acc0);
    add(0, acc0);
    await<0>(acc1);
  };
  step(true);
  for (int k = 1; k < num_steps; ++k) step(false);
  add(1, acc1);
  meet_slab_scales<C>(view_stage(s, stage, lane).scales, sum);
  release(s, stage);
  ring = at;
}

/// Two slabs, 128 columns: one unit after the other, since two accumulators do not fit beside 128
/// sums. Codes, and the next stage, are loaded during the product or the sums before.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_mxfp4_128(Shared<C>& s, Ring& ring, int steps,
                                                   const MathLane& lane, float (&sum)[2][N / 2]) {
  float acc[N / 2];
  clear(acc);
  const int num_steps = uniform(steps);
  Ring at = uniform(ring);
  int stage = acquire_together(s, at);
  std::uint32_t x = uniform(view_stage(s, stage, lane).x);
  // A StageView anew for each use: registers are for sums.
  Codes codes = load_codes(view_stage(s, stage, lane).codes);
  ScaleWords words = load_scale_words(view_stage(s, stage, lane).scales);
  for (int k = 1; k <= num_steps; ++k) {
    int next_stage = stage;
    std::uint32_t next_x = x;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      Fragments f;
      widen_e2m1(codes, words, f);
      pin(f);
      multiply_e5m2(acc, f, x);
      if (b == 1 && k < num_steps) {
        next_stage = acquire_together(s, at);
        next_x = uniform(view_stage(s, next_stage, lane).x);
      }
      await<0>(acc);
      add_near<X, 4>(acc, view_stage(s, stage, lane).x_scale, sum[b]);
      const StageView next = view_stage(s, b == 0 ? stage : next_stage, lane);  // at last in vain
      codes = load_codes(next.codes + (b == 0 ? C::kSlabBytes : 0));
      words = load_scale_words(next.scales + (b == 0 ? C::kSlabBytes : 0));
      pin(sum[b]);
    }
    if (k == num_steps) meet_slab_scales<C>(view_stage(s, stage, lane).scales, sum);
    release(s, stage);
    stage = next_stage;
    x = next_x;
  }
  ring = at;
}

template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_mxfp4(Shared<C>& s, Ring& ring, int num_steps,
                                               const MathLane& lane,
                                               float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  if constexpr (C::kIsFar) {
    multiply_mxfp4_far<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kIsDecode && N <= 16) {
    multiply_mxfp4_slab_ahead<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kIsDecode) {
    multiply_mxfp4_slab<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (N <= 64) {
    multiply_mxfp4_two_slabs<C, X, N>(s, ring, num_steps, lane, sum);
  } else {
    multiply_mxfp4_128<C, X, N>(s, ring, num_steps, lane, sum);
  }
}

}  // namespace sluice::cuda
