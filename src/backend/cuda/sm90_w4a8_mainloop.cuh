// sm90_w4a8_mainloop.cuh - math along K: widen int4, multiply, promote to f32.
//
// A unit is one slab of one step: four wgmma of k = 32 on a fresh accumulator, then added to the
// running sums with its scales. Every loop below adds the units of one (row, column) in order of k:
// same bits whichever runs.
#pragma once

#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sm90_w4a8_config.cuh"
#include "backend/cuda/sm90_w4a8_producer.cuh"  // wait()

namespace sluice::cuda {

/// Where a math thread sits, and what that makes it read.
struct MathLane {
  int warpgroup;     // 0..kMathWarpgroups-1
  int thread;        // in the warpgroup
  int warp;          // in the warpgroup
  int row;           // l / 4: first fragment row of its warp's 16
  int column;        // 2 (l % 4): first of its two columns in each group of 8 tokens
  int code_offset;   // of its first codes in a stage's weights
  int scale_offset;  // of its first scale pair in a stage's weights
};

template <class C>
__device__ __forceinline__ MathLane make_math_lane() {
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  MathLane m{.warpgroup = static_cast<int>(threadIdx.x) / 128,
             .thread = thread,
             .warp = thread / 32,
             .row = lane / 4,
             .column = 2 * (lane % 4)};
  const int slab = m.warpgroup * C::kSlabsPerWarpgroup * C::kSlabBytes;
  constexpr int kPairBytes = C::kScale == ScaleType::kBf16 ? 4 : 8;
  m.code_offset = slab + thread * 16;
  m.scale_offset = slab + kSlabCodeBytes + (m.warp * 8 + m.row) * kPairBytes;
  // NOTE: opaque, or the compiler computes them anew in every step, on the integer pipe that
  // widening needs. Prefill has no registers to keep them.
  if constexpr (C::kIsDecode) asm volatile("" : "+r"(m.code_offset), "+r"(m.scale_offset));
  return m;
}

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

/// Scales of rows r and r + 8 for group `g` of the step; `scales` is this thread's first pair.
template <class C>
__device__ __forceinline__ float2 load_weight_scales(const std::uint8_t* scales, int g) {
  if constexpr (C::kScale == ScaleType::kBf16) {
    const std::uint32_t bits = reinterpret_cast<const std::uint32_t*>(scales)[32 * g];
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  } else {
    return reinterpret_cast<const float2*>(scales)[32 * g];
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

/// What the units of one stage read. Slab b is b * kSlabBytes further.
struct StageView {
  const std::uint8_t* codes;   // this thread's, slab 0
  const std::uint8_t* scales;  // this thread's first pair, slab 0
  const float* x_scale;        // first column of this thread
  std::uint64_t x;             // descriptor of the activation tile
};

template <class C>
__device__ __forceinline__ StageView view_stage(const Shared<C>& s, int stage,
                                                const MathLane& lane) {
  return {.codes = s.w[stage] + lane.code_offset,
          .scales = s.w[stage] + lane.scale_offset,
          .x_scale = s.x_scale[stage] + lane.column,
          .x = ptx::smem_descriptor(ptx::shared_address(s.x[stage]))};
}

__device__ __forceinline__ Codes load_codes(const std::uint8_t* codes) {
  return {*reinterpret_cast<const uint4*>(codes), *reinterpret_cast<const uint4*>(codes + 2048)};
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

/// Waits until at most `Pending` younger units are in flight; `acc` may be read from here on. The
/// empty asm ties the registers to this place, or the compiler reads them early and ptxas
/// serializes.
template <int Pending, int R>
__device__ __forceinline__ void await(float (&acc)[R]) {
  ptx::wgmma_wait<Pending>();
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

/// sum += acc * (weight scale * activation scale): the only place where scales meet sums.
template <class C, int R>
__device__ __forceinline__ void promote(const float (&acc)[R], const std::uint8_t* scales,
                                        const float* x_scale, int group, float (&sum)[R]) {
  const float2 ws = load_weight_scales<C>(scales, group);
#pragma unroll
  for (int j = 0; j < R / 4; ++j) {
    // NOTE: keeps the scheduler from loading every scale at once, which spills with 128 sums.
    if (R == 64 && j % 4 == 0) asm volatile("" ::: "memory");
    const float2 xs = *reinterpret_cast<const float2*>(x_scale + 8 * j);
    sum[4 * j + 0] = __fmaf_rn(acc[4 * j + 0], __fmul_rn(ws.x, xs.x), sum[4 * j + 0]);
    sum[4 * j + 1] = __fmaf_rn(acc[4 * j + 1], __fmul_rn(ws.x, xs.y), sum[4 * j + 1]);
    sum[4 * j + 2] = __fmaf_rn(acc[4 * j + 2], __fmul_rn(ws.y, xs.x), sum[4 * j + 2]);
    sum[4 * j + 3] = __fmaf_rn(acc[4 * j + 3], __fmul_rn(ws.y, xs.y), sum[4 * j + 3]);
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

/// All slabs of this warpgroup, one unit after the other; other warpgroups fill the gaps.
template <class C, int N>
__device__ __forceinline__ void multiply_slabs(Shared<C>& s, Ring& ring, int num_steps,
                                               const MathLane& lane,
                                               float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  float acc[N / 2];
  clear(acc);
  for (int k = 0; k < num_steps; ++k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
      Fragments f;
      widen<C::kCode>(load_codes(v.codes + b * C::kSlabBytes), f);
      multiply(acc, f, v.x);
      await<0>(acc);
      promote<C>(acc, v.scales + b * C::kSlabBytes, v.x_scale, 0, sum[b]);
    }
    release(s, stage);
  }
}

/// One slab, few columns: the next step's weights are widened while this step is multiplied.
/// NOTE: the next stage is waited for first, and the fragments pinned after that, because ptxas
/// serializes products whose operands it prepares before a spinning wait.
template <class C, int N>
__device__ __forceinline__ void multiply_slab_ahead(Shared<C>& s, Ring& ring, int num_steps,
                                                    const MathLane& lane, float (&sum)[1][N / 2]) {
  float acc[N / 2];
  clear(acc);
  int stage = acquire(s, ring);
  Fragments now, next;
  widen<C::kCode>(load_codes(view_stage(s, stage, lane).codes), now);
  for (int k = num_steps; k > 0; --k) {
    const int next_stage = k == 1 ? stage : acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(now.a[i / 4][i % 4]));
    multiply(acc, now, v.x);
    widen<C::kCode>(load_codes(view_stage(s, next_stage, lane).codes), next);
    await<0>(acc);
    promote<C>(acc, v.scales, v.x_scale, 0, sum[0]);
    release(s, stage);
    stage = next_stage;
    now = next;
  }
}

/// Two slabs, up to 64 columns: slab 0 is promoted while slab 1 is multiplied.
/// NOTE: ptxas serializes a pipeline that is in flight across a spinning wait or a loop's back
/// edge, so each step drains.
template <class C, int N>
__device__ __forceinline__ void multiply_two_slabs(Shared<C>& s, Ring& ring, int num_steps,
                                                   const MathLane& lane, float (&sum)[2][N / 2]) {
  float acc0[N / 2], acc1[N / 2];
  Fragments f0, f1;
  clear(acc0);
  clear(acc1);
  for (int k = num_steps; k > 0; --k) {
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
    widen<C::kCode>(load_codes(v.codes), f0);
    multiply(acc0, f0, v.x);
    widen<C::kCode>(load_codes(v.codes + C::kSlabBytes), f1);
    multiply(acc1, f1, v.x);
    await<1>(acc0);
    promote<C>(acc0, v.scales, v.x_scale, 0, sum[0]);
    await<0>(acc1);
    promote<C>(acc1, v.scales + C::kSlabBytes, v.x_scale, 0, sum[1]);
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
    const int stage = acquire(s, ring);
    const StageView v = view_stage(s, stage, lane);
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
      Fragments f;
      widen<C::kCode>(load_codes(v.codes + b * C::kSlabBytes), f);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::wgmma_fence();
        ptx::wgmma_m64k32(acc, f.a[i], v.x + i * (32 >> 4), false);
        ptx::wgmma_commit();
        await<0>(acc);
        promote<C>(acc, v.scales + b * C::kSlabBytes, v.x_scale, i, sum[b]);
      }
    }
    release(s, stage);
  }
}

/// All K steps of a tile. A warpgroup without slabs in this tile only keeps the ring turning.
template <class C, int N>
__device__ __forceinline__ void multiply_tile(Shared<C>& s, Ring& ring, int num_steps,
                                              bool has_slabs, const MathLane& lane,
                                              float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) clear(sum[b]);
  if (!has_slabs) {
    for (int k = 0; k < num_steps; ++k) release(s, acquire(s, ring));
  } else if constexpr (C::kGroup == 32) {
    multiply_group32<C, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kSlabsPerWarpgroup == 1 && N <= 16) {
    multiply_slab_ahead<C, N>(s, ring, num_steps, lane, sum);
  } else if constexpr (C::kSlabsPerWarpgroup == 2 && N <= 64) {
    multiply_two_slabs<C, N>(s, ring, num_steps, lane, sum);
  } else {
    multiply_slabs<C, N>(s, ring, num_steps, lane, sum);
  }
}

}  // namespace sluice::cuda
