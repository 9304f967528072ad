// sm90_w4a8_math.cuh - math role: widen int4, multiply, promote to f32, finish tiles.
#pragma once

#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sm90_w4a8_config.cuh"
#include "backend/cuda/sm90_w4a8_producer.cuh"  // wait()
#include "backend/cuda/swiglu.cuh"

namespace sluice::cuda {

inline constexpr int kMathBarrier = 1;  ///< Named barrier of the math warpgroups.

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

/// sum += acc * (weight scale * activation scale): the only place where scales meet the sums.
template <int N>
__device__ __forceinline__ void promote(const float (&acc)[N / 2], float2 weight_scale,
                                        const float* x_scale, float (&sum)[N / 2]) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    // NOTE: keeps the scheduler from loading every scale at once, which spills at N = 128.
    if (N >= 128 && j % 4 == 0) asm volatile("" ::: "memory");
    const float2 xs = *reinterpret_cast<const float2*>(x_scale + 8 * j);
    sum[4 * j + 0] = __fmaf_rn(acc[4 * j + 0], __fmul_rn(weight_scale.x, xs.x), sum[4 * j + 0]);
    sum[4 * j + 1] = __fmaf_rn(acc[4 * j + 1], __fmul_rn(weight_scale.x, xs.y), sum[4 * j + 1]);
    sum[4 * j + 2] = __fmaf_rn(acc[4 * j + 2], __fmul_rn(weight_scale.y, xs.x), sum[4 * j + 2]);
    sum[4 * j + 3] = __fmaf_rn(acc[4 * j + 3], __fmul_rn(weight_scale.y, xs.y), sum[4 * j + 3]);
  }
}

/// One slab, one step of 128 along K.
template <class C, int N>
__device__ __forceinline__ void multiply_slab(const std::uint8_t* slab, std::uint64_t x_descriptor,
                                              const float* x_scale, const MathLane& lane,
                                              float (&acc)[N / 2], float (&sum)[N / 2]) {
  const uint4* codes = reinterpret_cast<const uint4*>(slab);
  const uint4 c0 = codes[lane.thread];
  const uint4 c1 = codes[128 + lane.thread];
  std::uint32_t a[4][4];  // (k step of 32, fragment register)
  widen<C::kCode>(c0.x, a[0][0], a[0][1]);
  widen<C::kCode>(c0.y, a[0][2], a[0][3]);
  widen<C::kCode>(c0.z, a[1][0], a[1][1]);
  widen<C::kCode>(c0.w, a[1][2], a[1][3]);
  widen<C::kCode>(c1.x, a[2][0], a[2][1]);
  widen<C::kCode>(c1.y, a[2][2], a[2][3]);
  widen<C::kCode>(c1.z, a[3][0], a[3][1]);
  widen<C::kCode>(c1.w, a[3][2], a[3][3]);
  constexpr std::uint64_t kStep32 = 32 >> 4;  // descriptor units are 16 B
  if constexpr (C::kGroup == 128) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32(acc, a[i], x_descriptor + i * kStep32, i > 0);
    ptx::wgmma_commit();
    // NOTE: at N = 128 there is no register left to hold the scales across the wait.
    float2 weight_scale;
    if constexpr (N < 128) weight_scale = load_weight_scales<C>(slab, lane, 0);
    ptx::wgmma_wait<0>();
    if constexpr (N >= 128) weight_scale = load_weight_scales<C>(slab, lane, 0);
    promote<N>(acc, weight_scale, x_scale, sum);
  } else {
    static_assert(C::kGroup == 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma_fence();
      ptx::wgmma_m64k32(acc, a[i], x_descriptor + i * kStep32, false);
      ptx::wgmma_commit();
      const float2 weight_scale = load_weight_scales<C>(slab, lane, i);
      ptx::wgmma_wait<0>();
      promote<N>(acc, weight_scale, x_scale, sum);
    }
  }
}

/// All K steps of a tile. A warpgroup without slabs in this tile only keeps the ring turning.
template <class C, int N>
__device__ __forceinline__ void multiply_tile(Shared<C>& s, Ring& ring, int num_steps, bool has_slabs,
                                              const MathLane& lane,
                                              float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum[b][i] = 0.0f;
  }
  const bool signals = threadIdx.x % 32 == 0;
  for (int k = 0; k < num_steps; ++k) {
    wait(&s.full[ring.stage], ring.parity);
    if (has_slabs) {
      const std::uint64_t x =
          ptx::smem_descriptor(ptx::shared_address(s.x[ring.stage]));
      const float* x_scale = s.x_scale[ring.stage] + lane.column;
#pragma unroll
      for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
        const std::uint8_t* slab =
            s.w[ring.stage] + (lane.warpgroup * C::kSlabsPerWarpgroup + b) * C::kSlabBytes;
        multiply_slab<C, N>(slab, x, x_scale, lane, acc, sum[b]);
      }
    }
    __syncwarp();
    if (signals) ptx::mbarrier_arrive(&s.empty[ring.stage]);
    ring.advance<C::kStages>();
  }
}

/// bf16 rows: a thread's two rows are neighbouring channels, a warp writes whole 32-byte sectors.
template <class C, int N>
__device__ __forceinline__ void store_bf16(const Phase& phase, const TileInfo& t,
                                           const MathLane& lane,
                                           const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
    const int slab = lane.warpgroup * C::kSlabsPerWarpgroup + b;
    const int channel = t.row_tile * kTileRows + slab * kSlabRows + lane.warp * 16 + 2 * lane.row;
    std::uint16_t* out =
        phase.y + static_cast<long long>(t.row0 + lane.column) * phase.n + channel;
    const int num_tokens = t.num_tokens - lane.column;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {  // one running pointer: a pointer per token would spill
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i < num_tokens) {
          *reinterpret_cast<std::uint32_t*>(out + i * phase.n) =
              ptx::bf16x2_from_float(sum[b][4 * j + 2 + i], sum[b][4 * j + i]);
        }
      }
      out += 8 * static_cast<long long>(phase.n);
    }
  }
}

/// Per token, 448 / amax over the tile's 128 channels, into s.h_inv; the stored scale goes to global.
template <class C, int N>
__device__ __forceinline__ void scale_hidden(Shared<C>& s, const Phase& phase, const TileInfo& t,
                                             const MathLane& lane,
                                             const float (&h)[C::kSlabsPerWarpgroup][N / 4]) {
  const int math_warp = lane.warpgroup * 4 + lane.warp;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    float m = fabsf(h[0][i]);
#pragma unroll
    for (int b = 1; b < C::kSlabsPerWarpgroup; ++b) m = fmaxf(m, fabsf(h[b][i]));
#pragma unroll
    for (int d = 4; d < 32; d *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, d));
    if (lane.row == 0) s.amax[math_warp][8 * (i / 2) + lane.column + i % 2] = m;
  }
  ptx::named_barrier(kMathBarrier, C::kMathThreads);
  const int token = lane.warpgroup * 128 + lane.thread;
  if (token < N) {
    float m = 0.0f;
#pragma unroll
    for (int w = 0; w < C::kMathWarps; ++w) m = fmaxf(m, s.amax[w][token]);
    s.h_inv[token] = group_inverse(m);
    if (token < t.num_tokens) {
      phase.h_scale[static_cast<long long>(t.row0 + token) * (phase.n / kTileRows) + t.row_tile] =
          group_scale(m);
    }
  }
  ptx::named_barrier(kMathBarrier, C::kMathThreads);
}

/// h = silu(gate) * up in f32, quantized, through shared memory to whole 128-byte rows; then counts
/// the tile as finished.
template <class C, int N>
__device__ __forceinline__ void store_swiglu(Shared<C>& s, const Params& p, const Phase& phase,
                                             const TileInfo& t, const MathLane& lane,
                                             const float (&sum)[C::kSlabsPerWarpgroup][N / 2]) {
  float h[C::kSlabsPerWarpgroup][N / 4];
#pragma unroll
  for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int at = 4 * (i / 2) + i % 2;
      h[b][i] = swiglu(sum[b][at], sum[b][at + 2]);
    }
  }
  const bool dynamic = phase.h_scale != nullptr;
  if (dynamic) scale_hidden<C, N>(s, phase, t, lane, h);
#pragma unroll
  for (int i = 0; i < N / 4; i += 2) {
    const int token = 8 * (i / 2) + lane.column;
    const float inv0 = dynamic ? s.h_inv[token] : phase.h_inv_static;
    const float inv1 = dynamic ? s.h_inv[token + 1] : phase.h_inv_static;
#pragma unroll
    for (int b = 0; b < C::kSlabsPerWarpgroup; ++b) {
      const int slab = lane.warpgroup * C::kSlabsPerWarpgroup + b;
      std::uint8_t* dst = s.h + token * C::kHiddenPitch + slab * 32 + lane.warp * 8 + lane.row;
      const std::uint16_t codes =
          ptx::e4m3x2_from_float(__fmul_rn(h[b][i + 1], inv1), __fmul_rn(h[b][i], inv0));
      dst[0] = static_cast<std::uint8_t>(codes);
      dst[C::kHiddenPitch] = static_cast<std::uint8_t>(codes >> 8);
    }
  }
  ptx::named_barrier(kMathBarrier, C::kMathThreads);
  const int thread = lane.warpgroup * 128 + lane.thread;
  const int part = thread % 8 * 16;
  for (int token = thread / 8; token < t.num_tokens; token += C::kMathThreads / 8) {
    const uint4 row = *reinterpret_cast<const uint4*>(s.h + token * C::kHiddenPitch + part);
    std::uint8_t* dst = phase.h + static_cast<long long>(t.row0 + token) * (phase.n / 2) +
                        t.row_tile * 128 + part;
    *reinterpret_cast<uint4*>(dst) = row;
  }
  ptx::fence_proxy_async();  // the next phase reads these rows through the copy engine
  ptx::named_barrier(kMathBarrier, C::kMathThreads);
  if (thread == 0 && p.num_phases == 2) {
    ptx::fence_acq_rel_gpu();
    ptx::reduce_add_release_gpu(&p.sync[kSyncHeader + t.expert], 1);
  }
}

template <class C, int N>
__device__ __forceinline__ void compute_tile(Shared<C>& s, const Params& p, const TileInfo& t,
                                             const MathLane& lane, Ring& ring) {
  const Phase& phase = p.phase[t.phase];
  const bool has_slabs = lane.warpgroup * C::kSlabsPerWarpgroup < t.num_slabs;
  float sum[C::kSlabsPerWarpgroup][N / 2];
  multiply_tile<C, N>(s, ring, phase.num_steps, has_slabs, lane, sum);
  if (phase.epilogue == Epilogue::kSwiglu) {
    store_swiglu<C, N>(s, p, phase, t, lane, sum);
  } else if (has_slabs) {
    store_bf16<C, N>(phase, t, lane, sum);
  }
}

/// The number of columns is chosen here, once per tile, outside every loop over K.
template <class C>
__device__ __forceinline__ void math_role(Shared<C>& s, const Params& p, const MathLane& lane) {
  Ring ring, slots;
  for (;;) {
    wait(&s.tile_full[slots.stage], slots.parity);
    const TileInfo& t = s.tile[slots.stage];  // stays in shared memory: registers are scarce
    if (t.phase < 0) return;
    if constexpr (C::kIsDecode) {
      if (t.num_tokens <= 8) {
        compute_tile<C, 8>(s, p, t, lane, ring);
      } else if (t.num_tokens <= 16) {
        compute_tile<C, 16>(s, p, t, lane, ring);
      } else if (t.num_tokens <= 32) {
        compute_tile<C, 32>(s, p, t, lane, ring);
      } else {
        compute_tile<C, 64>(s, p, t, lane, ring);
      }
    } else {
      if (t.num_tokens <= 32) {
        compute_tile<C, 32>(s, p, t, lane, ring);
      } else if (C::kMaxTokens == 64 || t.num_tokens <= 64) {
        compute_tile<C, 64>(s, p, t, lane, ring);
      } else if constexpr (C::kMaxTokens > 64) {
        compute_tile<C, 128>(s, p, t, lane, ring);
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&s.tile_empty[slots.stage]);
    slots.advance<Shared<C>::kTileSlots>();
  }
}

}  // namespace sluice::cuda
