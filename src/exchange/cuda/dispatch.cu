// dispatch.cu - every row to its final place in the memory of the rank that owns its expert.
//
// Maths     row(t, k) = begin(e) + sum over lower ranks of count(r, e) + #{(t', k') before (t, k)
//           on this rank with the same expert e};  x[row] = quantize(x[t]), once per token
// Operands  x [T, hidden] bf16; topk_idx [T, k]; the window of device_layout.h.
// Tile      each CTA owns a range of tokens, in chunks of a few tokens: loaded and quantized into
//           shared memory, then one bulk copy per row. Work does not depend on the number of
//           experts.
// Shared    two counters per expert, the chunk's rows, two chunks of payload and scales.
// Needs     hidden % 128 == 0; all CTAs of all ranks of a device resident at once.
// Bound     bytes: x is read once, each row written once.
//
// Order of events, per CTA:
//   1 histogram of all of this rank's slots, and of those before its own tokens
//   2 counts to every rank: one word each that carries its epoch, so no flag follows
//   3 the first chunk is quantized while the counts travel
//   4 counts of every rank: where its rows begin, and whether a capacity is exceeded (all ranks see
//     the same counts and so refuse alike)
//   5 rows; the last CTA to finish raises this rank's flag at every rank
//   6 that CTA waits for every rank's flag and publishes num_rows
// Reuse: counts are overwritten only after every rank returned the slot's last use (kReuse); rows
// only after that rank's new counts have arrived, so after its kernels that read the old ones.
#include <cuda_runtime.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/ptx/bulk_store.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/swiglu.cuh"
#include "exchange/cuda/protocol.cuh"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxTopk = 32;
constexpr int kMaxChunk = 8;            // Tokens.
constexpr int kVectorsInFlight = 7;     // 16 B each, per thread.
constexpr int kStageBytes = 88 * 1024;  // One chunk, if it is more than one token.

/// Where a chunk lies in shared memory; the same arithmetic on host and device.
struct Staging {
  int tokens, payload_bytes, num_groups;
  __host__ __device__ int scale_bytes() const { return num_groups * 4; }
  __host__ __device__ int counters_bytes(int num_experts) const {
    return (num_experts * 8 + 127) / 128 * 128;
  }
  __host__ __device__ int buffer_bytes() const {
    return (tokens * (payload_bytes + scale_bytes()) + 127) / 128 * 128;
  }
  __host__ __device__ int total_bytes(int num_experts) const {
    return counters_bytes(num_experts) + 2 * buffer_bytes();
  }
};

template <WireFormat Wire>
constexpr bool kScaled = Wire == WireFormat::kE4m3Group || Wire == WireFormat::kE4m3Pow2;

template <WireFormat Wire>
__host__ __device__ Staging staging_of(int hidden) {
  Staging s{};
  s.payload_bytes = Wire == WireFormat::kBf16 ? 2 * hidden : hidden;
  s.num_groups = kScaled<Wire> ? hidden / 128 : 0;
  const int fit = kStageBytes / (s.payload_bytes + s.scale_bytes());
  s.tokens = fit < 1 ? 1 : fit > kMaxChunk ? kMaxChunk : fit;
  return s;
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

/// Vector `v` (8 channels) of a chunk into shared memory. Sixteen neighbouring threads hold one
/// group of 128. Returns how many values were clipped (static wire).
template <WireFormat Wire>
__device__ int stage_vector(const uint4& in, int v, float static_inverse, std::uint8_t* payload,
                            float* scale) {
  if constexpr (Wire == WireFormat::kBf16) {
    reinterpret_cast<uint4*>(payload)[v] = in;
    return 0;
  }
  const unsigned words[4] = {in.x, in.y, in.z, in.w};
  float value[8], amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = __uint_as_float(words[i] << 16);
    value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    amax = fmaxf(amax, fmaxf(fabsf(value[2 * i]), fabsf(value[2 * i + 1])));
  }
  float factor = static_inverse;
  int clipped = 0;
  if constexpr (kScaled<Wire>) {
    const unsigned group = 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int d = 1; d < 16; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(group, amax, d));
    float s = group_scale(amax);
    factor = group_inverse(amax);
    if constexpr (Wire == WireFormat::kE4m3Pow2) {
      s = ceil_pow2(s);
      factor = __fdiv_rn(1.0f, s);
    }
    if (v % 16 == 0) scale[v / 16] = s;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) clipped += fabsf(__fmul_rn(value[i], factor)) > kE4m3Limit;
  }
  reinterpret_cast<uint2*>(payload)[v] = quantize8(value, factor);
  return clipped;
}

/// Tokens [first, first + count) in the wire format, into shared memory.
template <WireFormat Wire>
__device__ int stage_chunk(const SlotParams& p, const DispatchParams& d, int first, int count,
                           std::uint8_t* payload, float* scale) {
  const uint4* const in = reinterpret_cast<const uint4*>(d.x + std::int64_t{first} * p.hidden);
  const int num_vectors = count * (p.hidden / 8);
  int clipped = 0;
  for (int base = static_cast<int>(threadIdx.x); base < num_vectors;
       base += kThreads * kVectorsInFlight) {
    uint4 loaded[kVectorsInFlight];
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      if (base + i * kThreads < num_vectors) loaded[i] = __ldcs(in + base + i * kThreads);
    }
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const int v = base + i * kThreads;
      if (v < num_vectors) {
        clipped += stage_vector<Wire>(loaded[i], v, d.static_inverse, payload, scale);
      }
    }
  }
  return clipped;
}

/// Waits for every rank's count of every expert: adds those of lower ranks to next[e] and replaces
/// total[e] by the sum over all. False: a rank's counts did not arrive.
__device__ bool gather_counts(const SlotParams& p, std::uint64_t epoch, int* total, int* next) {
  __shared__ unsigned long long missing;
  constexpr int kBatch = 8;
  const int tid = static_cast<int>(threadIdx.x), ranks = p.window.num_ranks;
  const auto tag = static_cast<std::uint32_t>(epoch);
  if (tid == 0) missing = 0;
  __syncthreads();
  const std::uint64_t begin = ptx::global_timer();
  for (int e = tid; e < p.num_experts; e += kThreads) {
    int below = 0, all = 0;
    for (int r0 = 0; r0 < ranks; r0 += kBatch) {
      std::uint64_t word[kBatch];
      for (;;) {
        bool fresh = true;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (r0 + i < ranks) {
            word[i] = ptx::load_relaxed_sys(p.window.own<const std::uint64_t>(p.counts) +
                                            (r0 + i) * p.num_experts + e);
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (r0 + i < ranks) fresh &= static_cast<std::uint32_t>(word[i] >> 32) == tag;
        }
        if (fresh) break;
        if (ptx::global_timer() - begin > p.timeout_ns || has_failed(p)) {
          for (int i = 0; i < kBatch && r0 + i < ranks; ++i) {
            if (static_cast<std::uint32_t>(word[i] >> 32) != tag) {
              atomicOr(&missing, 1ull << (r0 + i));
            }
          }
          break;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (r0 + i >= ranks) break;
        const int count = static_cast<int>(word[i] & 0xffffffffu);
        all += count;
        if (r0 + i < p.window.rank) below += count;
      }
    }
    total[e] = all;
    next[e] += below;
  }
  __syncthreads();
  if (missing != 0 && tid == 0) {
    fail_exchange(p, {.kind = kPeerMissing,
                      .operation = kDispatchCounts,
                      .epoch = epoch,
                      .missing = missing,
                      .expected = epoch,
                      .seen = 0});
  }
  return missing == 0;
}

/// Adds every expert's first row to next[e], and notes those of this rank. True: a capacity is
/// exceeded.
__device__ bool place_experts(const SlotParams& p, const int* total, int* next) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_local = p.num_experts / p.window.num_ranks;
  const bool notes = blockIdx.x == 0;
  bool over = false;
  if (p.max_m > 0) {
    for (int e = tid; e < p.num_experts; e += kThreads) {
      const int begin = (e % num_local) * p.max_m;
      next[e] += begin;
      if (notes && e / num_local == p.window.rank) p.row_begin[e % num_local] = begin;
      if (total[e] <= p.max_m) continue;
      over = true;
      if (notes) {
        record_fault(p, {.kind = kOverCapacity, .where = e, .count = total[e], .value = p.max_m});
      }
    }
    return __syncthreads_or(over) != 0;
  }
  for (int r = tid / 32; r < p.window.num_ranks; r += kWarps) {  // Exclusive scan per rank.
    int carry = 0;
    for (int base = 0; base < num_local; base += 32) {
      const int local = base + lane, e = r * num_local + local;
      const int mine = local < num_local ? total[e] : 0;
      int sum = mine;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, d);
        if (lane >= d) sum += other;
      }
      if (local < num_local) {
        next[e] += carry + sum - mine;
        if (notes && r == p.window.rank) p.row_begin[local] = carry + sum - mine;
      }
      carry += __shfl_sync(kAllLanes, sum, 31);
    }
  }
  __syncthreads();
  return false;
}

/// One warp gives the slots [first, first + count) their rows, in order.
__device__ void assign_rows(const SlotParams& p, const DispatchParams& d, int first, int count,
                            int* next, std::int64_t* place) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_local = p.num_experts / p.window.num_ranks;
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    const int e = i < count ? expert_of(p, d, first + i) : -1;
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int before = __popc(same & ((1u << lane) - 1));
    std::int64_t at = -1;
    if (e >= 0) at = std::int64_t{e / num_local} << 32 | (next[e] + before);
    __syncwarp();
    if (e >= 0 && before == 0) next[e] += __popc(same);
    __syncwarp();
    if (i < count) place[i] = at;
  }
}

/// The warps send the rows of one staged chunk; lane 0 of each owns its bulk copies.
template <WireFormat Wire>
__device__ void send_chunk(const SlotParams& p, const Staging& s, int first, int count,
                           const std::int64_t* place, const std::uint8_t* payload,
                           const float* scale, int* sent) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int j = warp; j < count * p.num_topk; j += kWarps) {
    const std::int64_t at = place[j];
    if (lane == 0) p.slot_row[std::int64_t{first} * p.num_topk + j] = at;
    if (at < 0) continue;
    const int token = j / p.num_topk, k = j % p.num_topk;
    const int peer = static_cast<int>(at >> 32);
    const std::int64_t row = at & 0xffffffff;
    if (p.max_m == 0) {
      const std::int64_t other = lane < k ? place[token * p.num_topk + lane] : -1;
      const unsigned same = __ballot_sync(kAllLanes, other >= 0 && (other >> 32) == peer);
      std::int32_t from = -1;
      if (same != 0) {
        from = static_cast<std::int32_t>(place[token * p.num_topk + __ffs(same) - 1] & 0xffffffff);
      }
      if (lane == 0) p.window.at<std::int32_t>(peer, p.copy_of)[row] = from;
      if (from >= 0) {
        if (lane == 0) atomicAdd(&sent[kMaxDeviceRanks + peer], 1);
        continue;
      }
    }
    if (lane == 0) {
      ptx::bulk_store(p.window.at<std::uint8_t>(peer, p.x) + row * s.payload_bytes,
                      payload + token * s.payload_bytes,
                      static_cast<std::uint32_t>(s.payload_bytes));
      atomicAdd(&sent[peer], 1);
    }
    if constexpr (kScaled<Wire>) {
      float* const to = p.window.at<float>(peer, p.scale) + row * s.num_groups;
      for (int g = lane; g < s.num_groups; g += 32) to[g] = scale[token * s.num_groups + g];
    }
  }
  if (lane == 0) ptx::bulk_commit();
}

/// True for all threads of the CTA that finishes last; then everything the others did is visible.
__device__ bool arrive_last(const SlotParams& p) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    last = atomicAdd(&p.slot->arrived, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) p.slot->arrived = 0;
    __threadfence_system();
  }
  __syncthreads();
  return last;
}

__device__ void forget_rows(const SlotParams& p) {
  const int num_local = p.num_experts / p.window.num_ranks;
  for (int e = static_cast<int>(threadIdx.x); e < num_local; e += static_cast<int>(blockDim.x)) {
    p.num_rows[e] = 0;
  }
}

template <WireFormat Wire>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ SlotParams p,
                    const __grid_constant__ DispatchParams d) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::int64_t place[kMaxChunk * kMaxTopk];
  __shared__ int sent[2 * kMaxDeviceRanks];  // Rows, then repeats.
  const Staging s = staging_of<Wire>(p.hidden);
  int* const total = reinterpret_cast<int*>(shared);
  int* const next = total + p.num_experts;
  std::uint8_t* const buffers = shared + s.counters_bytes(p.num_experts);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  const int num_ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  const int begin = static_cast<int>(std::int64_t{d.num_tokens} * cta / num_ctas);
  const int end = static_cast<int>(std::int64_t{d.num_tokens} * (cta + 1) / num_ctas);
  const auto payload_of = [&](int buffer) { return buffers + buffer * s.buffer_bytes(); };
  const auto scale_of = [&](int buffer) {
    return reinterpret_cast<float*>(payload_of(buffer) + s.tokens * s.payload_bytes);
  };

  if (__syncthreads_or(has_failed(p)) != 0) {
    forget_rows(p);
    return;
  }
  const std::uint64_t epoch = p.slot->epoch + 1;
  for (int e = tid; e < 2 * p.num_experts; e += kThreads) total[e] = 0;
  if (tid < 2 * kMaxDeviceRanks) sent[tid] = 0;
  __syncthreads();
  for (int i = tid; i < d.num_tokens * p.num_topk; i += kThreads) {
    const int e = expert_of(p, d, i);
    if (e < 0) continue;
    atomicAdd(&total[e], 1);
    if (i < begin * p.num_topk) atomicAdd(&next[e], 1);
  }
  bool ok = wait_for_all(p, p.returned, kReuse, epoch);  // Begins and ends with a barrier.
  if (ok) {
    for (int peer = cta; peer < p.window.num_ranks; peer += num_ctas) {
      std::uint64_t* const to =
          p.window.at<std::uint64_t>(peer, p.counts) + p.window.rank * p.num_experts;
      for (int e = tid; e < p.num_experts; e += kThreads) {
        ptx::store_relaxed_sys(to + e, epoch << 32 | static_cast<unsigned>(total[e]));
      }
    }
  }
  int clipped =
      stage_chunk<Wire>(p, d, begin, min(s.tokens, end - begin), payload_of(0), scale_of(0));
  __syncthreads();  // total[] is about to become the sum over ranks.
  ok = ok && gather_counts(p, epoch, total, next);
  const bool refused = ok && place_experts(p, total, next);

  int buffer = 0;
  for (int t = begin; ok && t < end; t += s.tokens, buffer ^= 1) {
    const int count = min(s.tokens, end - t);
    if (refused) {
      for (int i = tid; i < count * p.num_topk; i += kThreads) {
        p.slot_row[std::int64_t{t} * p.num_topk + i] = -1;
      }
      continue;
    }
    if (tid < 32) assign_rows(p, d, t * p.num_topk, count * p.num_topk, next, place);
    ptx::fence_proxy_async();  // The copy engine reads what ordinary stores wrote.
    __syncthreads();
    send_chunk<Wire>(p, s, t, count, place, payload_of(buffer), scale_of(buffer), sent);
    if (t + s.tokens < end) {
      if (lane == 0) ptx::bulk_wait_read<1>();  // The other buffer's copies have read it.
      __syncthreads();
      clipped += stage_chunk<Wire>(p, d, t + s.tokens, min(s.tokens, end - t - s.tokens),
                                   payload_of(buffer ^ 1), scale_of(buffer ^ 1));
    }
  }
  if (lane == 0) {
    ptx::bulk_wait<0>();
    ptx::fence_proxy_async();
  }
  if (clipped > 0) atomicAdd(&p.state->stats.saturated, static_cast<unsigned long long>(clipped));
  const bool last = arrive_last(p);
  if (tid < p.window.num_ranks && sent[tid] > 0) {
    atomicAdd(&p.state->stats.rows[tid], static_cast<unsigned long long>(sent[tid]));
    atomicAdd(&p.state->stats.repeats[tid],
              static_cast<unsigned long long>(sent[kMaxDeviceRanks + tid]));
  }
  if (__syncthreads_or(!ok || has_failed(p)) != 0) {
    forget_rows(p);
    return;
  }
  if (!last) return;

  signal_all(p, p.dispatched, epoch);
  if (tid == 0) p.slot->epoch = epoch, p.slot->refused = refused;
  const int num_local = p.num_experts / p.window.num_ranks;
  for (int e = tid; e < num_local; e += kThreads) {
    p.num_rows[e] = refused ? 0 : total[p.window.rank * num_local + e];
  }
  if (d.receive && !wait_for_all(p, p.dispatched, kDispatchRows, epoch)) forget_rows(p);
}

/// Repeats the rows of tokens that crossed once for several experts of this rank.
__device__ void repeat_rows(const SlotParams& p, int payload_bytes, int num_groups) {
  constexpr int kBatch = 7;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int num_local = p.num_experts / p.window.num_ranks;
  const std::int64_t num_rows = p.row_begin[num_local - 1] + p.num_rows[num_local - 1];
  std::uint8_t* const x = p.window.own<std::uint8_t>(p.x);
  float* const scale = p.window.own<float>(p.scale);
  const std::int32_t* const copy_of = p.window.own<const std::int32_t>(p.copy_of);
  const int vectors = payload_bytes / 16;
  for (std::int64_t row = blockIdx.x * kWarps + threadIdx.x / 32; row < num_rows;
       row += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t from = copy_of[row];
    if (from < 0) continue;
    const uint4* const in = reinterpret_cast<const uint4*>(x + from * payload_bytes);
    uint4* const out = reinterpret_cast<uint4*>(x + row * payload_bytes);
    for (int base = lane; base < vectors; base += 32 * kBatch) {
      uint4 loaded[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + 32 * i < vectors) loaded[i] = in[base + 32 * i];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + 32 * i < vectors) out[base + 32 * i] = loaded[i];
      }
    }
    for (int g = lane; g < num_groups; g += 32) {
      scale[row * num_groups + g] = scale[from * num_groups + g];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    receive_kernel(const __grid_constant__ SlotParams p, int payload_bytes, int num_groups) {
  if (__syncthreads_or(has_failed(p)) != 0 ||
      !wait_for_all(p, p.dispatched, kDispatchRows, p.slot->epoch)) {
    forget_rows(p);
    return;
  }
  if (p.max_m == 0) repeat_rows(p, payload_bytes, num_groups);
}

template <WireFormat Wire>
void launch(const SlotParams& slot, const DispatchParams& dispatch, int num_ctas,
            cudaStream_t stream) {
  const int bytes = staging_of<Wire>(slot.hidden).total_bytes(slot.num_experts);
  dispatch_kernel<Wire>
      <<<static_cast<unsigned>(num_ctas), kThreads, bytes, stream>>>(slot, dispatch);
}

template <WireFormat Wire>
void prepare() {
  constexpr int kMostShared = 220 * 1024;
  SLUICE_CUDA_CHECK(cudaFuncSetAttribute(dispatch_kernel<Wire>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared));
}

}  // namespace

void prepare_exchange_kernels() {
  prepare<WireFormat::kBf16>();
  prepare<WireFormat::kE4m3Group>();
  prepare<WireFormat::kE4m3Pow2>();
  prepare<WireFormat::kE4m3Static>();
}

void launch_dispatch(const SlotParams& slot, const DispatchParams& dispatch, WireFormat wire,
                     int num_ctas, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (wire) {
    case WireFormat::kBf16:
      launch<WireFormat::kBf16>(slot, dispatch, num_ctas, queue);
      break;
    case WireFormat::kE4m3Group:
      launch<WireFormat::kE4m3Group>(slot, dispatch, num_ctas, queue);
      break;
    case WireFormat::kE4m3Pow2:
      launch<WireFormat::kE4m3Pow2>(slot, dispatch, num_ctas, queue);
      break;
    case WireFormat::kE4m3Static:
      launch<WireFormat::kE4m3Static>(slot, dispatch, num_ctas, queue);
      break;
  }
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_receive(const SlotParams& slot, WireFormat wire, int num_ctas, void* stream) {
  const bool scaled = wire == WireFormat::kE4m3Group || wire == WireFormat::kE4m3Pow2;
  receive_kernel<<<static_cast<unsigned>(slot.max_m == 0 ? num_ctas : 1), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(
      slot, wire == WireFormat::kBf16 ? 2 * slot.hidden : slot.hidden,
      scaled ? slot.hidden / 128 : 0);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
