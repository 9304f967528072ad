// sm90_w4a8_mainloop.cuh - math along K: widen int4, multiply, promote to f32.
//
// A unit is one slab of one step (or one half of its columns): four wgmma of k = 32 on a fresh
// accumulator, later added to the running sums with its scales. Two accumulators alternate, so that
// while the tensor cores work on one unit, the same warps promote the unit before and widen the next.
// NOTE: without this, all warpgroups fall into step (all widen, all multiply, all promote) and a stage
// costs the sum of the three: measured 2.0x slower at N = 64 and 1.9x at N = 128.
// Every loop below adds the units of one (row, column) in order of k: same bits whichever runs.
#pragma once

#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sm90_w4a8_config.cuh"
#include "backend/cuda/sm90_w4a8_producer.cuh"  // wait()

namespace sluice::cuda {

/// Where a math thread sits.
struct MathLane {
  int warpgroup;  // 0..kMathWarpgroups-1
  int thread;     // in the warpgroup
  int warp;       // in the warpgroup
  int row;        // l / 4: first fragment row of its warp's 16
  int column;     // 2 (l % 4): first of its two columns in each group of 8 tokens
};

/// One word of the stream -> the e4m3 bytes of rows r (`lo`) and r + 8 (`hi`), scaled by 2^-9.
template <WeightCode Code>
__device__ __forceinline__ void widen(std::uint32_t word, std::uint32_t& lo, std::uint32_t& hi) {
  const std::uint32_t turned = __funnelshift_r(word, word, 4);
  lo = word & 0x87878787u;
  hi = turned & 0x87878787u;
  if constexpr (Code == WeightCode::kOnesComplement) {
    lo += (word & 0x80808080u) >> 7;  // no carry leaves a byte: 0x87 + 1 = 0x88 = -8
    hi += (turned & 0x80808080u) >> 7;
  }
}

/// Scales of rows r and r + 8 for group `g` of the step.
template <class C>
__device__ __forceinline__ float2 load_weight_scales(const std::uint8_t* slab, const MathLane& lane,
                                                     int g) {
  const int pair = g * 32 + lane.warp * 8 + lane.row;
  const std::uint8_t* scales = slab + kSlabCodeBytes;
  if constexpr (C::kScale == ScaleType::kBf16) {
    const std::uint32_t bits = reinterpret_cast<const std::uint32_t*>(scales)[pair];
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  } else {
    return reinterpret_cast<const float2*>(scales)[pair];
  }
}

/// The A fragments of one slab and step: [k step of 32][register].
struct Fragments {
  std::uint32_t a[4][4];
};

/// This thread's 64 weights of a slab and step.
struct Codes {
  uint4 lo, hi;
};

/// What the units of one stage read.
struct StageView {
  const std::uint8_t* weights;  // first slab of this warpgroup
  const float* x_scale;         // first column of this thread
  std::uint64_t x;              // descriptor of the activation tile
};

template <class C>
__device__ __forceinline__ StageView view_stage(const Shared<C>& s, int stage, const MathLane& lane) {
  return {.weights = s.w[stage] + lane.warpgroup * C::kSlabsPerWarpgroup * C::kSlabBytes,
          .x_scale = s.x_scale[stage] + lane.column,
          .x = ptx::smem_descriptor(ptx::shared_address(s.x[stage]))};
}

__device__ __forceinline__ Codes load_codes(const std::uint8_t* slab, const MathLane& lane) {
  const uint4* codes = reinterpret_cast<const uint4*>(slab);
  return {codes[lane.thread], codes[128 + lane.thread]};
}

template <WeightCode Code>
__device__ __forceinline__ void widen(const Codes& c, Fragments& f) {
  widen<Code>(c.lo.x, f.a[0][0], f.a[0][1]);
  widen<Code>(c.lo.y, f.a[0][2], f.a[0][3]);
  widen<Code>(c.lo.z, f.a[1][0], f.a[1][1]);
  widen<Code>(c.lo.w, f.a[1][2], f.a[1][3]);
  widen<Code>(c.hi.x, f.a[2][0], f.a[2][1]);
  widen<Code>(c.hi.y, f.a[2][2], f.a[2][3]);
  widen<Code>(c.hi.z, f.a[3][0], f.a[3][1]);
  widen<Code>(c.hi.w, f.a[3][2], f.a[3][3]);
}

/// acc = slab * x over 128 of K; asynchronous, one commit group. acc has R = columns / 2 registers.
template <int R>
__device__ __forceinline__ void multiply(float (&acc)[R], const Fragments& f, std::uint64_t x) {
  constexpr std::uint64_t kStep32 = 32 >> 4;  // descriptor units are 16 B
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32(acc, f.a[i], x + i * kStep32, i > 0);
  ptx::wgmma_commit();
}

/// Waits until at most `Pending` younger units are in flight; `acc` may be read from here on. The empty
/// asm ties the registers to this place, or the compiler reads them early and ptxas serializes.
template <int Pending, int R>
__device__ __forceinline__ void await(float (&acc)[R]) {
  ptx::wgmma_wait<Pending>();
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

/// sum[Offset..] += acc * (weight scale * activation scale): the only place where scales meet sums.
template <class C, int Offset, int R, int Total>
__device__ __forceinline__ void promote(const float (&acc)[R], const std::uint8_t* slab,
                                        const float* x_scale, const MathLane& lane, int group,
                                        float (&sum)[Total]) {
  const float2 ws = load_weight_scales<C>(slab, lane, group);
#pragma unroll
  for (int j = 0; j < R / 4; ++j) {
    // NOTE: keeps the scheduler from loading every scale at once, which spills with 128 sums.
    if (R == 64 && j % 4 == 0) asm volatile("" ::: "memory");
    const float2 xs = *reinterpret_cast<const float2*>(x_scale + 2 * Offset + 8 * j);
    float* d = sum + Offset + 4 * j;
    d[0] = __fmaf_rn(acc[4 * j + 0], __fmul_rn(ws.x, xs.x), d[0]);
    d[1] = __fmaf_rn(acc[4 * j + 1], __fmul_rn(ws.x, xs.y), d[1]);
    d[2] = __fmaf_rn(acc[4 * j + 2], __fmul_rn(ws.y, xs.x), d[2]);
    d[3] = __fmaf_rn(acc[4 * j + 3], __fmul_rn(ws.y, xs.y), d[3]);
  }
}

/// Gives a stage back; this warp reads it no more.
template <class C>
__device__ __forceinline__ void release(Shared<C>& s, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s.empty[stage]);
}

template <int R>
__device__ __forceinline__ void clear(float (&v)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) v[i] = 0.0f;
}

/// Waits for the next stage of the ring and returns its index.
template <class C>
__device__ __forceinline__ int acquire(Shared<C>& s, Ring& ring) {
  const int stage = ring.stage;
  wait(&s.full[stage], ring.parity);
  ring.advance<C::kStages>();
  return stage;
}

/// One slab per warpgroup: four warpgroups overlap each other, so a unit runs start to end.
template <class C, int N>
__device__ __forceinline__ void multiply_one_slab(Shared<C>& s, Ring& ring, int num_steps,
                                                  const MathLane& lane, float (&sum)[1][N / 2]) {
  float acc[N / 2];
  Fragments f;
  clear(acc);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    widen<C::kCode>(load_codes(v.weights, lane), f);
    multiply(acc, f, v.x);
    await<0>(acc);
    promote<C, 0>(acc, v.weights, v.x_scale, lane, 0, sum[0]);
    release(s, stage);
  }
}

/// Two slabs per warpgroup, up to 64 columns: units alternate between the slabs.
template <class C, int N>
__device__ __forceinline__ void multiply_two_slabs(Shared<C>& s, Ring& ring, int num_steps,
                                                   const MathLane& lane, float (&sum)[2][N / 2]) {
  float acc0[N / 2], acc1[N / 2];
  Fragments f0, f1;
  clear(acc0);
  clear(acc1);
  const auto issue = [&](int stage, int slab, Fragments& f, float (&acc)[N / 2]) {
    const StageView v = view_stage(s, stage, lane);
    widen<C::kCode>(load_codes(v.weights + slab * C::kSlabBytes, lane), f);
    multiply(acc, f, v.x);
  };
  const auto finish = [&](int stage, int slab, const float (&acc)[N / 2], float (&d)[N / 2]) {
    const StageView v = view_stage(s, stage, lane);
    promote<C, 0>(acc, v.weights + slab * C::kSlabBytes, v.x_scale, lane, 0, d);
  };
  // NOTE: ptxas serializes a pipeline that is in flight across a spinning wait or a loop's back edge,
  // so each step drains.
  for (int k = num_steps; k > 0; --k) {
    const int stage = acquire(s, ring);
    issue(stage, 0, f0, acc0);
    issue(stage, 1, f1, acc1);
    await<1>(acc0);
    finish(stage, 0, acc0, sum[0]);
    await<0>(acc1);
    finish(stage, 1, acc1, sum[1]);
    release(s, stage);
  }
}

/// Two slabs, 128 columns: 128 sums and 64 accumulators leave no room for a second unit.
template <class C>
__device__ __forceinline__ void multiply_wide(Shared<C>& s, Ring& ring, int num_steps,
                                              const MathLane& lane, float (&sum)[2][64]) {
  float acc[64];
  clear(acc);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      Fragments f;
      widen<C::kCode>(load_codes(v.weights + b * C::kSlabBytes, lane), f);
      multiply(acc, f, v.x);
      await<0>(acc);
      promote<C, 0>(acc, v.weights + b * C::kSlabBytes, v.x_scale, lane, 0, sum[b]);
    }
    release(s, stage);
  }
}

/// Groups of 32: every wgmma is a unit of its own. Plain, not pipelined.
template <class C, int N>
__device__ __forceinline__ void multiply_group32(Shared<C>& s, Ring& ring, int num_steps,
                                                 const MathLane& lane,
                                                 float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  float acc[N / 2];
  clear(acc);
  for (int k = 0; k < num_steps; ++k) {
    wait(&s.full[ring.stage], ring.parity);
    const StageView v = view_stage(s, ring.stage, lane);
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
      const std::uint8_t* slab = v.weights + b * C::kSlabBytes;
      Fragments f;
      widen<C::kCode>(load_codes(slab, lane), f);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::wgmma_fence();
        ptx::wgmma_m64k32(acc, f.a[i], v.x + i * (32 >> 4), false);
        ptx::wgmma_commit();
        await<0>(acc);
        promote<C, 0>(acc, slab, v.x_scale, lane, i, sum[b]);
      }
    }
    release(s, ring.stage);
    ring.advance<C::kStages>();
  }
}

/// All K steps of a tile. A warpgroup without slabs in this tile only keeps the ring turning.
template <class C, int N>
__device__ __forceinline__ void multiply_tile(Shared<C>& s, Ring& ring, int num_steps, bool has_slabs,
                                              const MathLane& lane,
                                              float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) clear(sum[b]);
  if (!has_slabs) {
    for (int k = 0; k < num_steps; ++k) {
      wait(&s.full[ring.stage], ring.parity);
      release(s, ring.stage);
      ring.advance<C::kStages>();
    }
  } else if constexpr (C::kGroup == 32) {
    multiply_group32<C, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kSlabsPerWarpgroup == 1) {
    multiply_one_slab<C, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (N <= 64) {
    multiply_two_slabs<C, N>(s, ring, num_steps, lane, sum);
  } else {
    multiply_wide<C>(s, ring, num_steps, lane, sum);
  }
}

}  // namespace sluice::cuda
