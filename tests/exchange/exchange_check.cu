#include <cuda_runtime.h>

#include <cstddef>

#include "backend/cuda/check.h"
#include "exchange/exchange_check.h"

namespace sluice::testing {
namespace {

constexpr int kThreads = 256;

__device__ std::uint32_t mix32(std::uint32_t z) {
  z = (z ^ (z >> 16)) * 0x85ebca6bu;
  z = (z ^ (z >> 13)) * 0xc2b2ae35u;
  return z ^ (z >> 16);
}

__device__ float from_bf16(std::uint16_t v) {
  return __uint_as_float(static_cast<unsigned>(v) << 16);
}

__device__ std::uint16_t to_bf16(float v) {  // Nearest even; no NaN comes here.
  const unsigned bits = __float_as_uint(v);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/// What expert `e` makes of channel `c` of a row: different for every expert, element and row.
__device__ std::uint16_t expert_value(int e, const std::uint8_t* row, int payload_bytes, int c) {
  const std::uint32_t bytes = row[c % payload_bytes] | row[payload_bytes / 2] << 8;
  const std::uint32_t hash =
      mix32(mix32(static_cast<std::uint32_t>(e) * 0x9e3779b9u + static_cast<std::uint32_t>(c)) ^
            bytes * 0x01000193u);
  return to_bf16(static_cast<float>(static_cast<int>(hash >> 8) - (1 << 23)) * 0x1p-23f);
}

__device__ void report(Mismatches* found, int row, int element, int count) {
  if (atomicAdd(&found->rows, 1) == 0) found->first_row = row, found->first_element = element;
  atomicAdd(&found->elements, count);
}

__global__ void check_batch_kernel(BatchCheck p) {
  __shared__ int wrong, first;
  for (int i = blockIdx.x; i < p.num_expected; i += gridDim.x) {
    const ExpectedRow expected = p.expected[i];
    if (threadIdx.x == 0) wrong = 0, first = 1 << 30;
    __syncthreads();
    const std::uint8_t* want = p.table + static_cast<std::size_t>(expected.token) * p.payload_bytes;
    const std::uint8_t* have = p.x + static_cast<std::size_t>(expected.row) * p.payload_bytes;
    int count = 0, where = 1 << 30;
    for (int b = threadIdx.x; b < p.payload_bytes; b += kThreads) {
      if (want[b] != have[b]) ++count, where = min(where, b);
    }
    const float* want_scale =
        p.table_scale + static_cast<std::size_t>(expected.token) * p.num_groups;
    const float* have_scale = p.x_scale + static_cast<std::size_t>(expected.row) * p.num_groups;
    for (int g = threadIdx.x; g < p.num_groups; g += kThreads) {
      if (__float_as_uint(want_scale[g]) != __float_as_uint(have_scale[g])) {
        ++count, where = min(where, p.payload_bytes + g);
      }
    }
    std::uint16_t* y = p.expert_y + static_cast<std::size_t>(expected.row) * p.hidden;
    for (int c = threadIdx.x; c < p.hidden; c += kThreads) {
      y[c] = expert_value(p.first_expert + expected.expert, have, p.payload_bytes, c);
    }
    if (count > 0) atomicAdd(&wrong, count), atomicMin(&first, where);
    __syncthreads();
    if (threadIdx.x == 0 && wrong > 0) report(p.found, expected.row, first, wrong);
    __syncthreads();
  }
}

/// The sum of a token's channel: each part in order of k, then neighbours in rounds; what has no
/// entry is left out.
__device__ float sum_of(const SumCheck& p, int t, const std::uint8_t* row, int c) {
  float part[kMaxCheckedParts] = {};
  unsigned has = 0;
  for (int k = 0; k < p.num_topk; ++k) {
    const int e = p.topk_idx[t * p.num_topk + k];
    if (e < 0) continue;
    const float value = from_bf16(expert_value(e, row, p.payload_bytes, c));
    const float product = __fmul_rn(p.weights[t * p.num_topk + k], value);
    const int mine = p.num_parts == 1 ? 0 : e / p.experts_per_part;
#pragma unroll
    for (int i = 0; i < kMaxCheckedParts; ++i) {
      if (i == mine) part[i] = __fadd_rn(part[i], product), has |= 1u << i;
    }
  }
#pragma unroll
  for (int step = 1; step < kMaxCheckedParts; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < kMaxCheckedParts; i += 2 * step) {
      const bool left = has >> i & 1, right = has >> (i + step) & 1;
      if (right) part[i] = left ? __fadd_rn(part[i], part[i + step]) : part[i + step];
      if (right) has |= 1u << i;
    }
  }
  return part[0];
}

__global__ void check_sum_kernel(SumCheck p) {
  __shared__ int wrong, first;
  for (int t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    if (threadIdx.x == 0) wrong = 0, first = 1 << 30;
    __syncthreads();
    const std::uint8_t* row =
        p.table + static_cast<std::size_t>(p.first_token + t) * p.payload_bytes;
    int count = 0, where = 1 << 30;
    for (int c = threadIdx.x; c < p.hidden; c += kThreads) {
      const std::uint16_t want = to_bf16(__fmul_rn(sum_of(p, t, row, c), p.factor));
      if (p.y[static_cast<std::size_t>(t) * p.hidden + c] != want) ++count, where = min(where, c);
    }
    if (count > 0) atomicAdd(&wrong, count), atomicMin(&first, where);
    __syncthreads();
    if (threadIdx.x == 0 && wrong > 0) report(p.found, t, first, wrong);
    __syncthreads();
  }
}

constexpr int kBlocks = 64;

}  // namespace

void launch_check_batch(const BatchCheck& check, void* stream) {
  check_batch_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(check);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_check_sum(const SumCheck& check, void* stream) {
  check_sum_kernel<<<kBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(check);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_poison(void* memory, std::size_t num_bytes, void* stream) {
  SLUICE_CUDA_CHECK(cudaMemsetAsync(memory, 0xff, num_bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace sluice::testing
