// group32_halves.cuh - groups of 32 in tiles of 128 columns: the loop of prefill.
#pragma once

#include "backend/cuda/sm90_w4a8/group32_units.cuh"
#include "backend/cuda/sm90_w4a8/ring.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// One slab, 96 or 128 columns as two halves, which share fragments and weight scales. One unit is
/// added while the next is multiplied, the last of a step while the first of the next step is. The
/// next step's fragments are made one by one, each when its last product is over.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_group32_halves(Shared<C>& s, Ring& ring, int steps,
                                                        const MathLane& lane,
                                                        float (&sum)[1][N / 2]) {
  constexpr int kHalf = N / 2;                              // columns
  constexpr std::uint32_t kHalfRows = kHalf * kStepK >> 4;  // of x, in units of a descriptor
  float acc[2][kHalf / 2], joined[kHalf / 2];
  float2 ws[4] = {};
  Fragments f;
  clear(acc[0]);
  clear(acc[1]);
  int left = uniform(steps);
  Ring at = uniform(ring), now = at;
  acquire_together(s, at);
  int last_stage = now.stage;
  std::uint32_t x = uniform(view_stage(s, now.stage, lane).x);
  widen<C>(load_codes(view_stage(s, now.stage, lane).codes), f);
  auto add_last = [&](float2 scales) {
    add_unit<X>(3, kHalf / 4, acc[1], scales, joined, sum[0]);
    finish_step<X, 4>(kHalf / 4, joined, view_stage(s, last_stage, lane).x_scale, sum[0]);
    pin(sum[0]);
    release(s, last_stage);
  };
  auto step = [&](bool is_first) {
    const StageView v = view_stage(s, now.stage, lane);
    std::uint32_t next_x = x;
    Codes codes;
    pin(f);
    multiply_step32(acc[0], f, x, 0);
    ScalePair<C> pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = load_scale_pair<C>(v.scales, i);
    if (!is_first) add_last(ws[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) ws[i] = to_float2(pairs[i]);
    last_stage = now.stage;
#pragma unroll
    for (int unit = 0; unit < 7; ++unit) {  // units 0..3 of the first half, then of the other
      const int half = unit / 4, i = unit % 4, next = unit + 1;
      multiply_step32(acc[next % 2], f, x + next / 4 * kHalfRows, next % 4);
      if (unit == 4) {  // After the last step: the stage that is there once more, in vain.
        const bool more = --left > 0;
        now = more ? at : now;
        wait_together(s, now);
        at = more ? after<C>(at) : at;
        codes = load_codes(view_stage(s, now.stage, lane).codes);
        next_x = uniform(view_stage(s, now.stage, lane).x);
      }
      await<1>(acc[unit % 2]);
      add_unit<X>(i, half * kHalf / 4, acc[unit % 2], ws[i], joined, sum[0]);
      if (i == 3) finish_step<X, 4>(half * kHalf / 4, joined, v.x_scale, sum[0]);
      if (half == 1) widen_step<C>(i, codes, f);
      if (i < 3 && X == XScale::kPerGroup) {
        pin(joined);
      } else {
        pin(sum[0]);
      }
    }
    await<0>(acc[1]);
    widen_step<C>(3, codes, f);
    x = next_x;
  };
  step(true);
  while (left > 0) step(false);
  add_last(ws[3]);
  ring = at;
}

}  // namespace sluice::cuda
