// experts.cuh - int4 or mxfp4 weights x fp8 activations: the experts of a layer in one
// kernel.
//
// Maths     per phase (one grouped GEMM), local expert e, row m of e, output channel n:
//             c[m,n] = sum_g xs[m,g/..] * ws[n,g] * sum_{k in g} x[m,k] * w[n,k]
//           g: weight groups of 128 (or 32) along K; xs per 128. Inner sum on tensor cores on a
//           fresh accumulator, outer sum in f32 fma, in order of g. Groups of 32: the four of a 128
//           are first joined by ws, then meet xs. Static xs (XScale::kPerRow), or one per row of x
//           (kRowThenGroup): the outer sum has no xs, and c is it times xs. Scales of mxfp4 go into
//           codes, and units are of 128: mxfp4_loops.cuh. Then, by phase:
//             kHidden  h = activate(c[gate], c[up]) in f32 -> e4m3 with a scale per (m, 128) or
//                      static
//             kBf16    y = bf16(c)
//           Two phases: h of the first is x of the second.
//
// Operands  x   [rows, K] e4m3, K fastest, 16 B aligned        tensor copy, 128 B swizzle
//           xs  [rows, K/128] or [rows] f32, or a static one   loads and shared stores, by a warp
//           w   packed stream with its scales (layout.cuh)     one bulk copy per stage
//           h   [rows, n/2] e4m3 and [rows, n/256] f32         16-byte stores, by a warp
//           y   [rows, n] bf16                                 by the same warp; where K is short,
//                                                              32-byte sectors per math warp
//           num_rows i32, row_offset i64 [E]                   read when the CTA starts
//
// Tile      w is the left operand, widened to fp8 in registers, so a CTA computes c^T:
//                           tokens: N in {8, 16, 32, 64}, prefill also 128
//                               +---------------------+
//             256 weight rows   | 4 slabs of 64 rows  |   K in steps of 128
//                               +---------------------+
//           decode: 4 math warpgroups, a slab each; prefill: 2, two slabs each. In groups of 32
//           tiles of 128 tokens run along K in two passes, in each a slab of every warpgroup; what
//           the first pass of a tile of h activates waits in shared memory. What overlaps with
//           what along K: mainloop.cuh.
//
// Warps     math warpgroups: widen, wgmma, promote, epilogue           104 / 232 registers
//           last warpgroup, producers:                                  64 /  40 registers
//             warp 0 claims tickets (tiles, several where K is short: tickets.cuh) and
//             streams weights; warp 1 fetches activations; warp 2 their scales; warp 3 carries
//             finished tiles from shared memory to where they are read (rows.cuh)
//           640 or 384 threads, one CTA per SM, set by registers and shared memory.
//
// Shared    bf16, group 128, tiles up to 64 tokens (decode, prefill64):
//                          stage = w 16896 + x 8192 + xs 320 = 25408 B, 7 stages 178 KB
//                          prefill, 128 tokens:
//                          stage = w 16896 + x 16384 + xs 576 = 33856 B, 4 stages 135 KB
//                          group 32: stage = w 9216 + x 16384 + xs 576 = 26176 B, 6 stages 153 KB
//           + finished tile 34 / 68 KB + amax 4 KB + expert prefix and counts 4 KB: of 227 KB
//
// Barriers  full[s]   producers -> math: weights, activations (both also count bytes), scales
//           empty[s]  math -> producers: one arrival per math warp
//           tile_full/tile_empty[4]  the claimed tile, warp 0 -> warps 1, 2, 3 and math
//           rows_full, rows_empty  a finished tile, math -> warp 3, and back. Tiles of y take this
//                     way unless K is short, or rows leave for their homes
//           sync[2 + e]  finished phase-0 tiles of expert e, release, by warp 3; warps 1 and 2
//                     acquire before they fetch h. Tickets order all tiles, of phase 0 and then of
//                     phase 1, or of both in turns (tickets.cuh); phase 1 waits only for lower
//                     tickets, which running CTAs hold, so any number of resident CTAs makes
//                     progress.
//           A tile whose rows of x have one scale each ends with a stage that holds these alone.
//           Between its wait and its arrive a role owns the bytes; no one else touches them.
//
// Needs     n, K multiples of 128 (n of 256 for kHidden), at most 512 experts; checked on the host.
// Bound     decode: bytes of w. Prefill: instructions around the products, which tensor cores slow
//           down: for each accumulator and 128 of K two (static: one), in groups of 32 five (four).
//           Numbers: docs/performance-kernels.md
#pragma once

#include <atomic>
#include <cstdint>

#include "backend/cuda/check.h"
#include "backend/cuda/launch.cuh"
#include "backend/cuda/sm90_w4a8/config.cuh"
#include "backend/cuda/sm90_w4a8/math_role.cuh"
#include "backend/cuda/sm90_w4a8/producer.cuh"
#include "backend/cuda/sm90_w4a8/rows.cuh"
#include "backend/cuda/sm90_w4a8/scales.cuh"

namespace sluice::cuda {

template <class C>
__device__ __forceinline__ void init_barriers(Shared<C>& s) {
  for (int i = 0; i < C::kStages; ++i) {
    ptx::mbarrier_init(&s.full[i], 2 + kWarpArrivals);
    ptx::mbarrier_init(&s.empty[i], C::kMathWarps * kWarpArrivals);
  }
  for (int i = 0; i < Shared<C>::kTileSlots; ++i) {
    ptx::mbarrier_init(&s.tile_full[i], 1);
    ptx::mbarrier_init(&s.tile_empty[i], (3 + C::kMathWarps) * kWarpArrivals);
  }
  ptx::mbarrier_init(&s.rows_full, C::kMathWarps * kWarpArrivals);
  ptx::mbarrier_init(&s.rows_empty, kWarpArrivals);
  ptx::fence_barrier_init();
}

/// The last CTA to leave puts the synchronization words back to zero for the next launch.
__device__ __forceinline__ void leave(const Params& p) {
  __threadfence();
  if (atomicAdd(&p.sync[1], 1) != static_cast<int>(gridDim.x) - 1) return;
  p.sync[0] = 0;
  p.sync[1] = 0;
  for (int e = 0; e < p.num_experts; ++e) p.sync[kSyncHeader + e] = 0;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    w4a8_experts_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  Shared<C>& s = *reinterpret_cast<Shared<C>*>(shared_bytes);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;

  constexpr int kWeightWarp = C::kMathWarps, kActivationWarp = C::kMathWarps + 1;
  constexpr int kScaleWarp = C::kMathWarps + 2, kRowWarp = C::kMathWarps + 3;
  constexpr int kWeightThread = 32 * kWeightWarp;

  if (thread == kWeightThread) init_barriers(s);
  if (thread < C::kMathWarps) s.progress[thread] = {.tiles = 0, .rows_parity = 1};
  if (warp == kScaleWarp && lane < 2 * kNumTokenBoxes) {
    ptx::prefetch_tensor_map(&p.x_map[lane / kNumTokenBoxes][lane % kNumTokenBoxes]);
  }
  follow_predecessor();

  int ticket = 0;
  if (thread == kWeightThread) ticket = atomicAdd(&p.sync[0], 1);
  if (warp == kActivationWarp) scan_token_tiles(s, p, lane);
  __syncthreads();

  if (warp >= C::kMathWarps) {
    ptx::set_max_registers_down<C::kProducerRegisters>();
    if (thread == kWeightThread) {
      stream_weights(s, p, ticket);
    } else if (warp == kActivationWarp) {
      fetch_activations(s, p, lane);
    } else if (warp == kScaleWarp) {
      fetch_scales(s, p, lane);
    } else if (warp == kRowWarp) {
      carry_rows(s, p, lane);
    }
  } else {
    ptx::set_max_registers_up<C::kMathRegisters>();
    math_role(s, p, make_math_lane<C>());
  }
  __syncthreads();
  if (thread == 0) leave(p);
}

template <class C>
void launch_kernel(const Params& params, int num_ctas, cudaStream_t stream) {
  static_assert(sizeof(Shared<C>) <= kSharedLimit);
  constexpr int kBytes = static_cast<int>(sizeof(Shared<C>));
  // Once for each device: the host would spend as much on it as on a launch.
  static std::atomic<std::uint64_t> is_allowed{0};
  int device = 0;
  SLUICE_CUDA_CHECK(cudaGetDevice(&device));
  const std::uint64_t bit = std::uint64_t{1} << (device % 64);
  if (device >= 64 || (is_allowed.load(std::memory_order_relaxed) & bit) == 0) {
    SLUICE_CUDA_CHECK(cudaFuncSetAttribute(w4a8_experts_kernel<C>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    is_allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  launch_early(w4a8_experts_kernel<C>,
               {.blocks = num_ctas, .threads = C::kThreads, .shared_bytes = kBytes}, params,
               stream);
}

}  // namespace sluice::cuda
