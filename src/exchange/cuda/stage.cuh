// stage.cuh - tokens brought to the wire format in shared memory, a chunk at a time.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/e4m3_group.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/sync.cuh"
#include "exchange/cuda/exchange_kernels.h"
#include "exchange/cuda/protocol.cuh"
#include "sluice/quant.h"

namespace sluice::cuda {

inline constexpr int kMaxChunk = 8;            // Tokens.
inline constexpr int kVectorsInFlight = 7;     // 16 B each, per thread.
inline constexpr int kStageBytes = 88 * 1024;  // One chunk, if it is more than one token.

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
inline constexpr bool kScaled = wire_scale_bytes(Wire, kActivationGroup) > 0;
template <WireFormat Wire>
inline constexpr int kElementBytes = wire_payload_bytes(Wire, 1);

/// The part of every token that one CTA has: groups of 128 channels.
struct TokenPart {
  int first_vector, row_vectors;  // Of 8 channels.
  std::uint32_t first_byte, bytes;
  int first_scale, num_scales;
};

template <WireFormat Wire>
__host__ __device__ Staging staging_of(int hidden) {
  Staging s{};
  s.payload_bytes = kElementBytes<Wire> * hidden;
  s.num_groups = !kScaled<Wire>                   ? 0
                 : Wire == WireFormat::kE4m3Token ? 1
                                                  : hidden / kActivationGroup;
  const int fit = kStageBytes / (s.payload_bytes + s.scale_bytes());
  s.tokens = fit < 1 ? 1 : fit > kMaxChunk ? kMaxChunk : fit;
  return s;
}

/// Part `index` of `parts`. A wire with one scale per token has one part.
template <WireFormat Wire>
__device__ TokenPart part_of(const Staging& s, int hidden, int parts, int index) {
  constexpr int kGroupBytes = kActivationGroup * kElementBytes<Wire>;
  const int groups = hidden / kActivationGroup;
  const int first = groups * index / parts, count = groups * (index + 1) / parts - first;
  const bool has_group_scales = kScaled<Wire> && Wire != WireFormat::kE4m3Token;
  return {.first_vector = first * (kActivationGroup / 8),
          .row_vectors = count * (kActivationGroup / 8),
          .first_byte = static_cast<std::uint32_t>(first) * kGroupBytes,
          .bytes = static_cast<std::uint32_t>(count) * kGroupBytes,
          .first_scale = has_group_scales ? first : 0,
          .num_scales = has_group_scales ? count : s.num_groups};
}

__device__ inline uint2 quantize8(const float (&v)[8], float factor) {
  unsigned pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = ptx::e4m3x2_from_float(__fmul_rn(v[2 * i + 1], factor), __fmul_rn(v[2 * i], factor));
  }
  return {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
}

/// Largest magnitude that 16 neighbouring threads hold, who hold one group of 128.
__device__ inline float amax_of_group(float amax) {
  const unsigned group = 0xffffu << (threadIdx.x & 16);
#pragma unroll
  for (int d = 1; d < 16; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(group, amax, d));
  return amax;
}

/// Vector `v` (8 channels) of a chunk into shared memory. Sixteen neighbouring threads hold one
/// group of 128. `token_amax`: of the vector's token, where the wire has one scale per token.
/// Returns how many values were clipped (static wire).
template <WireFormat Wire>
__device__ int stage_vector(const uint4& in, int v, int row_vectors, float static_inverse,
                            float token_amax, std::uint8_t* payload, float* scale) {
  if constexpr (Wire == WireFormat::kBf16) {
    reinterpret_cast<uint4*>(payload)[v] = in;
    return 0;
  }
  float value[8];
  float amax = widen_vector(in, value);
  float factor = static_inverse;
  int clipped = 0;
  if constexpr (Wire == WireFormat::kE4m3Token) {
    factor = group_inverse(token_amax);
    if (v % row_vectors == 0) scale[v / row_vectors] = group_scale(token_amax);
  } else if constexpr (kScaled<Wire>) {
    amax = amax_of_group(amax);
    float s = group_scale(amax);
    factor = group_inverse(amax);
    if constexpr (Wire == WireFormat::kE4m3Pow2) {
      s = ceil_pow2(s);
      factor = __fdiv_rn(1.0f, s);
    }
    if (v % 16 == 0) scale[v / 16] = s;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) clipped += fabsf(__fmul_rn(value[i], factor)) > kE4m3Max;
  }
  reinterpret_cast<uint2*>(payload)[v] = quantize8(value, factor);
  return clipped;
}

/// What one thread reads of a chunk at a time, its loads in flight together.
struct Batch {
  uint4 vector[kVectorsInFlight];
};

/// From vector `base` of the chunk that lies at `x` and has `num_vectors`.
__device__ inline void load_batch(const std::uint16_t* x, int num_vectors, int base, Batch& batch) {
  const uint4* const in = reinterpret_cast<const uint4*>(x);
#pragma unroll
  for (int i = 0; i < kVectorsInFlight; ++i) {
    const int v = base + i * kDispatchThreads;
    if (v < num_vectors) batch.vector[i] = __ldcs(in + v);
  }
}

/// Of whole tokens, from token `first` of a dispatch.
__device__ inline void load_batch(const SlotParams& p, const DispatchParams& d, int first,
                                  int num_vectors, int base, Batch& batch) {
  load_batch(d.x + std::int64_t{first} * p.hidden, num_vectors, base, batch);
}

/// The largest magnitude of each token of a chunk, as bits of a float32, in shared memory. All
/// threads call it. `batch` holds what load_batch() reads from vector threadIdx.x on, before and
/// after.
__device__ inline const unsigned* find_token_amax(const std::uint16_t* x, int num_vectors,
                                                  int row_vectors, Batch& batch) {
  __shared__ unsigned token_amax[kMaxChunk];
  const int begin = ptx::thread_index();
  if (begin < kMaxChunk) token_amax[begin] = 0;
  __syncthreads();
  constexpr int kBatchVectors = kDispatchThreads * kVectorsInFlight;
  for (int base = begin; base < num_vectors;) {
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      const int v = base + i * kDispatchThreads;
      if (v >= num_vectors) continue;
      const float amax = amax_of_group(vector_amax(batch.vector[i]));
      if (v % 16 == 0) atomicMax(&token_amax[v / row_vectors], __float_as_uint(amax));
    }
    base += kBatchVectors;
    if (num_vectors > kBatchVectors) load_batch(x, num_vectors, base, batch);
  }
  if (num_vectors > kBatchVectors) load_batch(x, num_vectors, begin, batch);
  __syncthreads();
  return token_amax;
}

/// A chunk of `count` rows of `row_vectors` at `x` in the wire format, into shared memory. A row is
/// a token, or a part of one in whole groups (not for a wire with one scale per token). `batch`
/// holds what load_batch() reads from vector threadIdx.x on. Returns how many values were clipped.
template <WireFormat Wire>
__device__ int stage_chunk(const std::uint16_t* x, int count, int row_vectors, float static_inverse,
                           Batch& batch, std::uint8_t* payload, float* scale) {
  const int num_vectors = count * row_vectors;
  const unsigned* token_amax = nullptr;
  if constexpr (Wire == WireFormat::kE4m3Token) {
    token_amax = find_token_amax(x, num_vectors, row_vectors, batch);
  }
  int clipped = 0;
  for (int first = 0; first < num_vectors;) {
#pragma unroll
    for (int i = 0; i < kVectorsInFlight; ++i) {
      // All threads leave at once: to jump from one skipped part to the next would fetch them all.
      if (first + i * kDispatchThreads >= num_vectors) break;
      const int v = first + ptx::thread_index() + i * kDispatchThreads;
      if (v < num_vectors) {
        float amax = 0.0f;
        if constexpr (Wire == WireFormat::kE4m3Token) {
          amax = __uint_as_float(token_amax[v / row_vectors]);
        }
        clipped += stage_vector<Wire>(batch.vector[i], v, row_vectors, static_inverse, amax,
                                      payload, scale);
      }
    }
    first += kDispatchThreads * kVectorsInFlight;
    if (first < num_vectors) load_batch(x, num_vectors, first + ptx::thread_index(), batch);
  }
  return clipped;
}

/// Tokens [first, first + count) of a dispatch.
template <WireFormat Wire>
__device__ int stage_chunk(const SlotParams& p, const DispatchParams& d, int first, int count,
                           Batch& batch, std::uint8_t* payload, float* scale) {
  return stage_chunk<Wire>(d.x + std::int64_t{first} * p.hidden, count, p.hidden / 8,
                           d.static_inverse, batch, payload, scale);
}

}  // namespace sluice::cuda
