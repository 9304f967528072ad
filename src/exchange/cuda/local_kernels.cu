// local_kernels.cu - dispatch and combine for one rank's own experts, in CUDA memory.
//
// Maths     route     row(t, k) = begin(e) + #{(t', k') before (t, k) with the same expert e}
//           scatter   x[row(t, k)] = quantize(x[t]), each token quantized once
//           combine   y[t] = bf16(factor * sum_k weight[t, k] * expert_y[row(t, k)]), f32, in order
//           of k
// Operands  x, y [num_tokens, hidden] bf16; rows as ExpertBatch; topk_idx int32 or int64.
// Tile      route: one warp walks the slots in order, 32 at a time. scatter, combine: one block per
// token,
//           8 channels (16 B) per thread.
// Shared    route: two counters per expert.
// Needs     hidden % 128 == 0; num_experts <= kMaxLocalExperts. One rank: more need an exchange
// over windows. Bound     bytes: route and scatter read x once and write k rows, combine reads k
// rows and writes y.
//
// What the device finds wrong (an index out of range, more rows than max_m) is written to a mapped
// word, nothing is written out of bounds, and the next call of the exchange throws it.
#include <cuda_runtime.h>

#include "backend/cuda/check.h"
#include "backend/cuda/swiglu.cuh"
#include "exchange/cuda/local_kernels.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ void record(Fault* fault, int kind, int where, int count, long long value) {
  volatile Fault* f = fault;
  if (f->kind != kNoFault) return;
  f->where = where, f->count = count, f->value = value;
  __threadfence_system();
  f->kind = kind;
}

__device__ int expert_of(const RouteParams& p, int slot) {
  if (slot >= p.num_slots) return -1;
  const long long e = p.wide_idx ? static_cast<const std::int64_t*>(p.topk_idx)[slot]
                                 : static_cast<const std::int32_t*>(p.topk_idx)[slot];
  if (e >= -1 && e < p.num_experts) return static_cast<int>(e);
  record(p.fault, kBadIndex, slot, 0, e);
  return -1;
}

/// Walks all slots in order; body(slot, expert or -1, rank among the same experts of these 32, how
/// many).
template <class Body>
__device__ void walk_slots(const RouteParams& p, const Body& body) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int base = 0; base < p.num_slots; base += 32) {
    const int e = expert_of(p, base + lane);
    const unsigned same = __match_any_sync(kAllLanes, e);
    body(base + lane, e, __popc(same & ((1u << lane) - 1)), __popc(same));
    __syncwarp();
  }
}

__global__ void __launch_bounds__(32) route_kernel(const __grid_constant__ RouteParams p) {
  __shared__ int count[kMaxLocalExperts];
  __shared__ int next[kMaxLocalExperts];
  const int lane = static_cast<int>(threadIdx.x);
  for (int e = lane; e < p.num_experts; e += 32) count[e] = 0;
  __syncwarp();
  walk_slots(p, [&](int, int e, int before, int same) {
    if (e >= 0 && before == 0) count[e] += same;
  });
  long long carry = 0;
  for (int base = 0; base < p.num_experts; base += 32) {  // Exclusive scan, 32 experts a step.
    const int e = base + lane;
    const int mine = e < p.num_experts ? count[e] : 0;
    int sum = mine;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, d);
      if (lane >= d) sum += other;
    }
    if (e < p.num_experts) {
      const bool over = p.max_m > 0 && mine > p.max_m;
      if (over) record(p.fault, kOverCapacity, e, mine, p.max_m);
      const long long begin =
          p.max_m > 0 ? static_cast<long long>(e) * p.max_m : carry + sum - mine;
      p.row_begin[e] = begin;
      p.num_rows[e] = over ? p.max_m : mine;
      next[e] = static_cast<int>(begin);
    }
    carry += __shfl_sync(kAllLanes, sum, 31);
  }
  __syncwarp();
  walk_slots(p, [&](int slot, int e, int before, int same) {
    int row = -1;
    if (e >= 0) {
      row = next[e] + before;
      if (p.max_m > 0 && row >= (e + 1) * p.max_m) row = -1;
    }
    __syncwarp();
    if (e >= 0 && before == 0) next[e] += same;
    if (slot < p.num_slots) p.slot_row[slot] = row;
  });
}

__device__ float ceil_pow2(float s) {
  const unsigned bits = __float_as_uint(s);
  const unsigned mantissa = bits & 0x007fffffu;
  return __uint_as_float(mantissa == 0 ? bits : bits - mantissa + 0x00800000u);
}

__device__ uint2 quantize8(const float (&v)[8], float factor) {
  unsigned pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = ptx::e4m3x2_from_float(__fmul_rn(v[2 * i + 1], factor), __fmul_rn(v[2 * i], factor));
  }
  return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
}

template <WireFormat Wire>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ ScatterParams p) {
  const long long token = blockIdx.x;
  const std::int32_t* const slot_row = p.slot_row + token * p.num_topk;
  // Sixteen neighbouring threads hold one group; hidden / 8 is a multiple of 16, so groups stay
  // whole.
  for (int c = static_cast<int>(threadIdx.x) * 8; c < p.hidden; c += kThreads * 8) {
    const uint4 in = *reinterpret_cast<const uint4*>(p.x + token * p.hidden + c);
    if constexpr (Wire == WireFormat::kBf16) {
      for (int k = 0; k < p.num_topk; ++k) {
        const long long row = slot_row[k];
        if (row >= 0) *reinterpret_cast<uint4*>(p.rows + (row * p.hidden + c) * 2) = in;
      }
      continue;
    }
    const unsigned words[4] = {in.x, in.y, in.z, in.w};
    float v[8], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      amax = fmaxf(amax, fmaxf(fabsf(v[2 * i]), fabsf(v[2 * i + 1])));
    }
    float factor = p.static_inverse, scale = 0.0f;
    if constexpr (Wire != WireFormat::kE4m3Static) {
      const unsigned group = 0xffffu << (threadIdx.x & 16);
#pragma unroll
      for (int d = 1; d < 16; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(group, amax, d));
      scale = group_scale(amax);
      factor = group_inverse(amax);
      if constexpr (Wire == WireFormat::kE4m3Pow2) {
        scale = ceil_pow2(scale);
        factor = __fdiv_rn(1.0f, scale);
      }
    }
    const uint2 codes = quantize8(v, factor);
    for (int k = 0; k < p.num_topk; ++k) {
      const long long row = slot_row[k];
      if (row < 0) continue;
      *reinterpret_cast<uint2*>(p.rows + row * p.hidden + c) = codes;
      if (Wire != WireFormat::kE4m3Static && c % 128 == 0) {
        p.row_scale[row * (p.hidden / 128) + c / 128] = scale;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ CombineParams p) {
  const long long token = blockIdx.x;
  for (int c = static_cast<int>(threadIdx.x) * 8; c < p.hidden; c += kThreads * 8) {
    float sum[8] = {};
    for (int k = 0; k < p.num_topk; ++k) {
      const long long row = p.slot_row[token * p.num_topk + k];
      if (row < 0) continue;
      const float weight = p.weights[token * p.num_topk + k];
      const uint4 in = *reinterpret_cast<const uint4*>(p.expert_y + row * p.hidden + c);
      const unsigned words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(weight, __uint_as_float(words[i] << 16)));
        sum[2 * i + 1] =
            __fadd_rn(sum[2 * i + 1], __fmul_rn(weight, __uint_as_float(words[i] & 0xffff0000u)));
      }
    }
    unsigned out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = ptx::bf16x2_from_float(__fmul_rn(sum[2 * i + 1], p.factor),
                                      __fmul_rn(sum[2 * i], p.factor));
    }
    *reinterpret_cast<uint4*>(p.y + token * p.hidden + c) = {out[0], out[1], out[2], out[3]};
  }
}

}  // namespace

void launch_route(const RouteParams& params, void* stream) {
  route_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(params);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_scatter(const ScatterParams& params, WireFormat wire, std::int64_t num_tokens,
                    void* stream) {
  if (num_tokens == 0) return;
  const auto blocks = static_cast<unsigned>(num_tokens);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (wire) {
    case WireFormat::kBf16:
      scatter_kernel<WireFormat::kBf16><<<blocks, kThreads, 0, queue>>>(params);
      break;
    case WireFormat::kE4m3Group:
      scatter_kernel<WireFormat::kE4m3Group><<<blocks, kThreads, 0, queue>>>(params);
      break;
    case WireFormat::kE4m3Pow2:
      scatter_kernel<WireFormat::kE4m3Pow2><<<blocks, kThreads, 0, queue>>>(params);
      break;
    case WireFormat::kE4m3Static:
      scatter_kernel<WireFormat::kE4m3Static><<<blocks, kThreads, 0, queue>>>(params);
      break;
  }
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_combine(const CombineParams& params, std::int64_t num_tokens, void* stream) {
  if (num_tokens == 0) return;
  combine_kernel<<<static_cast<unsigned>(num_tokens), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(params);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
