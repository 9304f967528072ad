// unit.cuh - one slab of one step in pieces: from the stage to fragments, to products.
//
// A unit is 64 weight rows x 128 of K x the tile's tokens: four wgmma of k = 32 on a fresh
// accumulator, which is then added to the running sums with its scales ("promoted":
// promote.cuh). The main loops are made of these pieces and decide what overlaps with
// what.
#pragma once

#include <type_traits>

#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sm90_w4a8/config.cuh"
#include "backend/cuda/sm90_w4a8/producer.cuh"  // wait()

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
  // Read anew each time: no part of a lane stays in registers along K that is not used there.
  const int id = ptx::thread_index();
  const int thread = id % 128, lane = thread % 32;
  MathLane m{.warpgroup = id / 128,
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
///
/// One's complement adds the sign of a weight to its magnitude. `AllAtOnce` does it for all eight:
/// signs and magnitudes of both rows lie seven bits apart, and no sum leaves its four bits. That is
/// six instructions, one of them not on the integer pipe, instead of seven.
/// NOTE: in decode's loop of 64 columns ptxas serializes products when they are widened so (C7513).
template <class C, bool AllAtOnce>
__device__ __forceinline__ void widen(std::uint32_t word, std::uint32_t& lo, std::uint32_t& hi) {
  if constexpr (C::kCode == WeightCode::kOnesComplement && AllAtOnce) {
    const std::uint32_t signs = word & 0x88888888u;
    const std::uint32_t sums = word - signs + __funnelshift_r(signs, signs, 7);
    lo = ptx::select_bits(0x0f0f0f0fu, sums, signs);
    const std::uint32_t other = ptx::select_bits(0xf0f0f0f0u, sums, signs);
    hi = __funnelshift_r(other, other, 4);
    return;
  }
  const std::uint32_t turned = __funnelshift_r(word, word, 4);
  lo = word & 0x87878787u;
  hi = turned & 0x87878787u;
  if constexpr (C::kCode == WeightCode::kOnesComplement) {
    lo += (word & 0x80808080u) >> 7;  // no carry leaves a byte: 0x87 + 1 = 0x88 = -8
    hi += (turned & 0x80808080u) >> 7;
  }
}

/// Scales of rows r and r + 8 as they lie in the stage.
template <class C>
using ScalePair = std::conditional_t<C::kScale == ScaleType::kBf16, std::uint32_t, float2>;

/// The pair for group `g` of the step; `scales` is this thread's first pair.
template <class C>
__device__ __forceinline__ ScalePair<C> load_scale_pair(const std::uint8_t* scales, int g) {
  return reinterpret_cast<const ScalePair<C>*>(scales)[32 * g];
}
__device__ __forceinline__ float2 to_float2(std::uint32_t bf16_pair) {
  return {__uint_as_float(bf16_pair << 16), __uint_as_float(bf16_pair & 0xffff0000u)};
}
__device__ __forceinline__ float2 to_float2(float2 pair) {
  return pair;
}

template <class C>
__device__ __forceinline__ float2 load_weight_scales(const std::uint8_t* scales, int g) {
  return to_float2(load_scale_pair<C>(scales, g));
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
  const float* x_scale;        // of this thread's columns
  std::uint32_t x;             // descriptor of the activation tile
};

template <class C>
__device__ __forceinline__ StageView view_stage(const Shared<C>& s, int stage,
                                                const MathLane& lane) {
  return {.codes = s.w[stage] + lane.code_offset,
          .scales = s.w[stage] + lane.scale_offset,
          .x_scale = s.x_scale[stage] + lane.column / 2 * C::kScalePitch,
          .x = ptx::smem_descriptor(ptx::shared_address(s.x[stage]))};
}

__device__ __forceinline__ Codes load_codes(const std::uint8_t* codes) {
  return {*reinterpret_cast<const uint4*>(codes), *reinterpret_cast<const uint4*>(codes + 2048)};
}

/// The fragment of k step `i` (a constant).
template <class C, bool AllAtOnce = !C::kIsDecode>
__device__ __forceinline__ void widen_step(const int i, const Codes& codes, Fragments& f) {
  const uint4& plane = i < 2 ? codes.lo : codes.hi;
  widen<C, AllAtOnce>(i % 2 == 0 ? plane.x : plane.z, f.a[i][0], f.a[i][1]);
  widen<C, AllAtOnce>(i % 2 == 0 ? plane.y : plane.w, f.a[i][2], f.a[i][3]);
}
template <class C, bool AllAtOnce = !C::kIsDecode>
__device__ __forceinline__ void widen(const Codes& codes, Fragments& f) {
  widen<C, AllAtOnce>(codes.lo.x, f.a[0][0], f.a[0][1]);
  widen<C, AllAtOnce>(codes.lo.y, f.a[0][2], f.a[0][3]);
  widen<C, AllAtOnce>(codes.lo.z, f.a[1][0], f.a[1][1]);
  widen<C, AllAtOnce>(codes.lo.w, f.a[1][2], f.a[1][3]);
  widen<C, AllAtOnce>(codes.hi.x, f.a[2][0], f.a[2][1]);
  widen<C, AllAtOnce>(codes.hi.y, f.a[2][2], f.a[2][3]);
  widen<C, AllAtOnce>(codes.hi.z, f.a[3][0], f.a[3][1]);
  widen<C, AllAtOnce>(codes.hi.w, f.a[3][2], f.a[3][3]);
}

/// acc = slab * x over 128 of K; asynchronous, one commit group. acc has R = columns / 2 registers.
template <int R>
__device__ __forceinline__ void multiply(float (&acc)[R], const Fragments& f, std::uint32_t x) {
  constexpr std::uint32_t kStep32 = 32 >> 4;  // descriptor units are 16 B
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32(acc, f.a[i], x + i * kStep32, i > 0);
  ptx::wgmma_commit();
}

/// The same over 32 of K, k step `i` of the unit.
template <int R>
__device__ __forceinline__ void multiply_step32(float (&acc)[R], const Fragments& f,
                                                std::uint32_t x, int i) {
  ptx::wgmma_fence();
  ptx::wgmma_m64k32(acc, f.a[i], x + i * (32 >> 4), false);
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

/// Whatever makes these values is done before this place.
template <int R>
__device__ __forceinline__ void pin(float (&v)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(v[i])::"memory");
}
__device__ __forceinline__ void pin(Fragments& f) {
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(f.a[i / 4][i % 4])::"memory");
}

/// Gives a stage back; this warp reads it no more.
template <class C>
__device__ __forceinline__ void release(Shared<C>& s, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 < kWarpArrivals) ptx::mbarrier_arrive(&s.empty[stage]);
}

template <int R>
__device__ __forceinline__ void clear(float (&v)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) v[i] = 0.0f;
}

}  // namespace sluice::cuda
