// mainloop.cuh - math along K: all units of a tile, and what overlaps with what.
//
// Every loop adds the units of one (row, column) in order of k: same bits whichever runs. Each has
// two versions: scales of activations per 128 of K are a factor of every unit (XScale::kPerGroup);
// one scale per row multiplies the finished sums (XScale::kPerRow).
//
//   decode, 8 or 16 columns  multiply_slab_ahead  next weights are widened during a product
//   decode, 32 or 64         multiply_slab        nothing; four warpgroups fill the gaps
//   prefill, up to 64        multiply_two_slabs   a product runs while the one before is promoted
//   prefill, 128             multiply_wide        the next stage is awaited during a product
//   groups of 32             multiply_group32     group32.cuh; 128 columns:
//                                                 group32_halves.cuh
//   mxfp4                    multiply_mxfp4       mxfp4_loops.cuh
//
// ptxas serializes products (an error here, see ptxas_guard.sh) unless
//   - the fragments of all products that will be in flight together are finished (pin) first;
//   - an accumulator that is read during other products was made by a product, not by an
//     assignment: hence the first step of two slabs stands before its loop;
//   - no product is in flight across a loop's back edge, or across a wait that lanes may leave
//     one by one: acquire_together() votes. Finished accumulators may cross both.
#pragma once

#include "backend/cuda/sm90_w4a8/group32.cuh"
#include "backend/cuda/sm90_w4a8/mxfp4_loops.cuh"
#include "backend/cuda/sm90_w4a8/promote.cuh"
#include "backend/cuda/sm90_w4a8/ring.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// One slab, one unit after the other; other warpgroups fill the gaps.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_slab(Shared<C>& s, Ring& ring, int num_steps,
                                              const MathLane& lane, float (&sum)[1][N / 2]) {
  float acc[N / 2];
  clear(acc);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    Fragments f;
    widen<C, N == 32>(load_codes(v.codes), f);
    if constexpr (C::kCode == WeightCode::kOnesComplement && N == 32) pin(f);
    multiply(acc, f, v.x);
    await<0>(acc);
    promote<X, 2>(acc, load_weight_scales<C>(v.scales, 0), v.x_scale, sum[0]);
    release(s, stage);
  }
}

/// One slab, few columns: the next step's weights are widened while this step is multiplied.
template <class C, XScale X, int N, class Finish>
__device__ __forceinline__ void multiply_slab_ahead(Shared<C>& s, Ring& ring, int num_steps,
                                                    int num_tiles, const MathLane& lane,
                                                    float (&sum)[1][N / 2], const Finish& finish) {
  float acc[N / 2];
  clear(acc);
  int stage = acquire(s, ring);
  Fragments now, next;
  widen<C, true>(load_codes(view_stage(s, stage, lane).codes), now);
  int left = num_steps * num_tiles, left_of_tile = num_steps;
  auto step = [&](Fragments& f, Fragments& following) {
    const int next_stage = left == 1 ? stage : acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    pin(f);
    multiply(acc, f, v.x);
    widen<C, true>(load_codes(view_stage(s, next_stage, lane).codes), following);
    await<0>(acc);
    promote<X, 2>(acc, load_weight_scales<C>(v.scales, 0), v.x_scale, sum[0]);
    release(s, stage);
    stage = next_stage;
    --left;
    if (--left_of_tile == 0) {
      finish(sum);
      clear(sum[0]);
      left_of_tile = num_steps;
    }
  };
  // NOTE: one's complement in twos, or ptxas serializes products (C7513). With the other code that
  // gains nothing, and tiles of two steps take 2 % longer.
  if constexpr (C::kCode == WeightCode::kOnesComplement) {
    for (; left > 1; step(next, now)) step(now, next);
    if (left == 1) step(now, next);
  } else {
    for (; left > 0; now = next) step(now, next);
  }
}

/// Two slabs, up to 64 columns: slab 0 is promoted while slab 1 is multiplied, slab 1 while slab 0
/// of the next step is. `between` runs after each step but the last, when its sums are there and
/// the next step's first product is under way.
template <class C, XScale X, int N, class Between>
__device__ __forceinline__ void multiply_two_slabs(Shared<C>& s, Ring& ring, int steps,
                                                   const MathLane& lane, float (&sum)[2][N / 2],
                                                   const Between& between) {
  float acc0[N / 2], acc1[N / 2], xs[2][N / 4];
  float2 ws0, ws1[2];
  Fragments f0, f1;
  clear(acc0);
  clear(acc1);
  const int num_steps = uniform(steps);
  Ring at = uniform(ring);
  int stage = 0;
  // From the next stage to registers: what a step's products and their promotion read.
  auto load = [&](const StageView& v, int parity) {
    const Codes codes0 = load_codes(v.codes), codes1 = load_codes(v.codes + C::kSlabBytes);
    load_token_scales<X>(v.x_scale, xs[parity]);
    ws0 = load_weight_scales<C>(v.scales, 0);
    ws1[parity] = load_weight_scales<C>(v.scales + C::kSlabBytes, 0);
    widen<C>(codes0, f0);
    widen<C>(codes1, f1);
    pin(f0);
    pin(f1);
  };
  auto finish = [&](int parity) {
    promote_columns<X>(0, acc1, ws1[parity], xs[parity], sum[1]);
    pin(sum[1]);
    release(s, stage);
  };
  auto step = [&](int parity, bool is_first) {
    const int next_stage = acquire(s, at);
    const StageView v = view_stage(s, next_stage, lane);
    load(v, parity);
    multiply(acc0, f0, v.x);
    if (!is_first) {
      finish(1 - parity);
      between();
    }
    stage = next_stage;
    multiply(acc1, f1, v.x);
    await<1>(acc0);
    promote_columns<X>(0, acc0, ws0, xs[parity], sum[0]);
    await<0>(acc1);
  };
  step(0, true);
  int k = 1;
  for (; k + 1 < num_steps; k += 2) {
    step(1, false);
    step(0, false);
  }
  if (k < num_steps) {
    step(1, false);
    finish(1);
  } else {
    finish(0);
  }
  ring = at;
}

/// Two slabs, 128 columns: one unit after the other, since two accumulators do not fit beside 128
/// sums. What a unit reads is loaded during the product or the promotion before.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_wide(Shared<C>& s, Ring& ring, int steps,
                                              const MathLane& lane, float (&sum)[2][N / 2]) {
  // The first token scales too are loaded during a product, unless f32 weight scales take their
  // registers.
  constexpr bool kScalesAhead = C::kScale == ScaleType::kBf16;
  float acc[N / 2];
  clear(acc);
  const int num_steps = uniform(steps);
  Ring at = uniform(ring);
  int stage = acquire_together(s, at);
  std::uint32_t x = uniform(view_stage(s, stage, lane).x);
  // A StageView anew for each use: registers are for sums.
  Codes codes = load_codes(view_stage(s, stage, lane).codes);
  for (int k = 1; k <= num_steps; ++k) {
    int next_stage = stage;
    std::uint32_t next_x = x;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      Fragments f;
      widen<C>(codes, f);
      pin(f);
      multiply(acc, f, x);
      const ScalePair<C> ws =
          load_scale_pair<C>(view_stage(s, stage, lane).scales + b * C::kSlabBytes, 0);
      const float* const x_scale = view_stage(s, stage, lane).x_scale;
      float xs[4];
      if constexpr (kScalesAhead) load_token_scales<X>(x_scale, xs);
      if (b == 1 && k < num_steps) {
        next_stage = acquire_together(s, at);
        next_x = uniform(view_stage(s, next_stage, lane).x);
      }
      await<0>(acc);
      if constexpr (!kScalesAhead) load_token_scales<X>(x_scale, xs);
      promote_from<X>(xs, acc, to_float2(ws), x_scale, sum[b]);
      codes = b == 0 ? load_codes(view_stage(s, stage, lane).codes + C::kSlabBytes)
                     : load_codes(view_stage(s, next_stage, lane).codes);  // at last in vain
      pin(sum[b]);
    }
    release(s, stage);
    stage = next_stage;
    x = next_x;
  }
  ring = at;
}

/// All K steps of a tile. A warpgroup without slabs in this tile only keeps the ring turning.
template <class C, XScale X, int N>
__device__ __forceinline__ void multiply_tile(Shared<C>& s, Ring& ring, int num_steps,
                                              bool has_slabs, const MathLane& lane,
                                              float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) clear(sum[b]);
  if (!has_slabs) {
    for (int k = 0; k < num_steps; ++k) release(s, acquire(s, ring));
  } else if constexpr (C::kFormat == WeightFormat::kMxfp4) {
    multiply_mxfp4<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kGroup == 32) {
    multiply_group32<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kSlabsPerWarpgroup == 1) {
    multiply_slab<C, X, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (N <= 64) {
    multiply_two_slabs<C, X, N>(s, ring, num_steps, lane, sum, [] {});
  } else {
    multiply_wide<C, X, N>(s, ring, num_steps, lane, sum);
  }
}

}  // namespace sluice::cuda
