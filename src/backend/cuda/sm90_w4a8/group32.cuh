// group32.cuh - math along K for weights in groups of 32: four units for each activation
// group of 128.
//
// A unit is one wgmma of k = 32 on a fresh accumulator. With activation scales per 128 the four
// units of a step are first joined by their weight scales (a product and three fma), and the joined
// value meets the activation scale once (one fma): five instructions for each sum and step, where
// promoting each unit by itself takes eight. With one scale per row each unit is one fma. All loops
// have the same order of k and the same grouping: same bits whichever runs.
#pragma once

#include "backend/cuda/sm90_w4a8/group32_halves.cuh"
#include "backend/cuda/sm90_w4a8/group32_units.cuh"
#include "backend/cuda/sm90_w4a8/ring.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// One slab, 8 or 16 columns: the four units of a step are multiplied together.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_group32_few(Shared<C>& s, Ring& ring, int num_steps,
                                                     const MathLane& lane, float (&sum)[1][N / 2]) {
  float acc[4][N / 2], joined[N / 2];
#pragma unroll
  for (int i = 0; i < 4; ++i) clear(acc[i]);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    Fragments f;
    widen<C, true>(load_codes(v.codes), f);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32(acc[i], f.a[i], v.x + i * (32 >> 4), false);
    ptx::wgmma_commit();
#pragma unroll
    for (int i = 0; i < 4; ++i) await<0>(acc[i]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      add_unit<X>(i, 0, acc[i], load_weight_scales<C>(v.scales, i), joined, sum[0]);
    }
    finish_step<X, 4>(0, joined, v.x_scale, sum[0]);
    release(s, stage);
  }
}

/// One slab, 32 or 64 columns, 32 at a time: one unit is added while the next is multiplied, where
/// registers allow two accumulators.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_group32_slab(Shared<C>& s, Ring& ring, int num_steps,
                                                      const MathLane& lane,
                                                      float (&sum)[1][N / 2]) {
  constexpr int kParts = N / 32, kUnits = 4 * kParts;
  constexpr int kPartRows = 32 * kStepK >> 4;  // of x, in units of a descriptor
  constexpr int kAhead = N == 64 && X == XScale::kPerGroup ? 0 : 1;
  float acc[1 + kAhead][16], joined[16];
#pragma unroll
  for (int i = 0; i <= kAhead; ++i) clear(acc[i]);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    Fragments f;
    widen<C, N == 32>(load_codes(v.codes), f);
    pin(f);
#pragma unroll
    for (int unit = -kAhead; unit < kUnits; ++unit) {
      const int next = unit + kAhead;
      if (next < kUnits) {
        multiply_step32(acc[next % (1 + kAhead)], f, v.x + next / 4 * kPartRows, next % 4);
      }
      if (unit < 0) continue;
      float(&done)[16] = acc[unit % (1 + kAhead)];
      const float2 ws = load_weight_scales<C>(v.scales, unit % 4);
      if (kAhead == 1 && next < kUnits) {
        await<1>(done);
      } else {
        await<0>(done);
      }
      add_unit<X>(unit % 4, unit / 4 * 8, done, ws, joined, sum[0]);
      if (unit % 4 == 3) finish_step<X, 4>(unit / 4 * 8, joined, v.x_scale, sum[0]);
    }
    release(s, stage);
  }
}

/// Two slabs: one unit is added while the next is multiplied, the last of a step while the first of
/// the next step is. Weight scales are loaded a unit ahead, codes and the descriptor of x a step
/// ahead. After the last step a warp takes the stage that it has once more and loads in vain: so
/// the loop has no branch.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_group32_two_slabs(Shared<C>& s, Ring& ring, int steps,
                                                           const MathLane& lane,
                                                           float (&sum)[2][N / 2]) {
  float acc[2][N / 2], joined[N / 2];
  ScalePair<C> ws;
  Fragments f[2];
  Codes codes;
  clear(acc[0]);
  clear(acc[1]);
  int left = uniform(steps);
  Ring at = uniform(ring), now = at;
  acquire_together(s, at);
  int last_stage = now.stage;
  std::uint32_t x = uniform(view_stage(s, now.stage, lane).x);
  // A StageView anew for each use: registers are for sums.
  auto load = [&](int slab) {
    return load_codes(view_stage(s, now.stage, lane).codes + slab * C::kSlabBytes);
  };
  auto add_last = [&](ScalePair<C> scales) {
    add_unit<X>(3, 0, acc[1], to_float2(scales), joined, sum[1]);
    finish_step<X, 4>(0, joined, view_stage(s, last_stage, lane).x_scale, sum[1]);
    pin(sum[1]);
    release(s, last_stage);
  };
  auto step = [&](bool is_first) {
    const StageView v = view_stage(s, now.stage, lane);
    std::uint32_t next_x = x;
    pin(f[0]);
    multiply_step32(acc[0], f[0], x, 0);
    ScalePair<C> next_ws = load_scale_pair<C>(v.scales, 0);
    if (!is_first) add_last(ws);
    ws = next_ws;
    last_stage = now.stage;
    widen<C>(codes, f[1]);
    pin(f[1]);
#pragma unroll
    for (int unit = 0; unit < 7; ++unit) {  // units 0..3 of slab 0, then of slab 1
      const int slab = unit / 4, i = unit % 4, next = unit + 1;
      multiply_step32(acc[next % 2], f[next / 4], x, next % 4);
      next_ws = load_scale_pair<C>(v.scales + next / 4 * C::kSlabBytes, next % 4);
      if (unit == 4) {  // slab 0 is done, its fragments are free
        const bool more = --left > 0;
        now = more ? at : now;
        wait_together(s, now);
        at = more ? after<C>(at) : at;
        codes = load(0);
        next_x = uniform(view_stage(s, now.stage, lane).x);
      }
      await<1>(acc[unit % 2]);
      add_unit<X>(i, 0, acc[unit % 2], to_float2(ws), joined, sum[slab]);
      if (i == 3) finish_step<X, 4>(0, joined, v.x_scale, sum[slab]);
      if (unit == 4) widen<C>(codes, f[0]);
      if (i < 3 && X == XScale::kPerGroup) {
        pin(joined);
      } else {
        pin(sum[slab]);
      }
      ws = next_ws;
    }
    codes = load(1);
    x = next_x;
    await<0>(acc[1]);
  };
  widen<C>(load(0), f[0]);
  codes = load(1);
  step(true);
  while (left > 0) step(false);
  add_last(ws);
  ring = at;
}

template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_group32(Shared<C>& s, Ring& ring, int num_steps,
                                                 const MathLane& lane,
                                                 float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  if constexpr (C::kSlabsPerWarpgroup == 2) {
    multiply_group32_two_slabs<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (N <= 16) {
    multiply_group32_few<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (N > 64) {
    multiply_group32_halves<C, X, N>(s, ring, num_steps, lane, sum);
  } else {
    multiply_group32_slab<C, X, N>(s, ring, num_steps, lane, sum);
  }
}

}  // namespace sluice::cuda
