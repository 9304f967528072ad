// combine.cu - the weighted sum of a token's expert rows, read where the experts wrote them.
//
// Maths     y[t] = bf16(factor * sum_k weight[t, k] * expert_y[row(t, k)]): f32, product and sum
//           rounded separately, in order of k, as on the CPU
// Operands  expert_y of every rank, in its window; y [T, hidden] bf16.
// Tile      each CTA owns a range of all tokens' vectors of 8 channels (16 B), so that a few tokens
//           are spread over many SMs; a thread sums one vector, its k loads in flight together.
// Needs     hidden % 128 == 0; all CTAs of all ranks of a device resident at once.
// Bound     bytes: each row is read once, y written once. Rows are pulled: sending them first would
//           write and read them once more.
//
// Protocol  the returned flag of a rank says that its expert_y is complete. A rank may overwrite
//           its expert_y only after every rank's next dispatch of the slot, so after this kernel
//           on every rank.
#include <cuda_runtime.h>

#include "backend/cuda/carveout.h"
#include "backend/cuda/ptx/math.cuh"
#include "exchange/cuda/launch_in_order.cuh"
#include "exchange/cuda/protocol.cuh"
#include "exchange/limits.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kTokens = 32;  // Whose rows and weights are in shared memory at a time.
constexpr int kRowsInFlight = 8;
constexpr int kUnit = 16;  // Vectors that one CTA has together: two lines of 128 B.

struct Rows {
  const std::uint8_t* at[kTokens * kMaxTopk];  // Row, or null for an empty entry.
  float weight[kTokens * kMaxTopk];
};

__device__ void add(float (&sum)[8], const uint4& in, float weight) {
  const unsigned words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(weight, __uint_as_float(words[i] << 16)));
    sum[2 * i + 1] =
        __fadd_rn(sum[2 * i + 1], __fmul_rn(weight, __uint_as_float(words[i] & 0xffff0000u)));
  }
}

/// 8 channels, from byte `offset` of each of the token's rows.
__device__ uint4 sum_rows(const Rows& rows, int first, int num_topk, int offset, float factor) {
  float sum[8] = {};
  for (int k0 = 0; k0 < num_topk; k0 += kRowsInFlight) {
    uint4 in[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const bool valid = k0 + i < num_topk && rows.at[first + k0 + i] != nullptr;
      if (valid) in[i] = __ldcs(reinterpret_cast<const uint4*>(rows.at[first + k0 + i] + offset));
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const bool valid = k0 + i < num_topk && rows.at[first + k0 + i] != nullptr;
      if (valid) add(sum, in[i], rows.weight[first + k0 + i]);
    }
  }
  unsigned out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] =
        ptx::bf16x2_from_float(__fmul_rn(sum[2 * i + 1], factor), __fmul_rn(sum[2 * i], factor));
  }
  return {out[0], out[1], out[2], out[3]};
}

/// Rows and weights of tokens [first, first + count), into shared memory. Tokens from `counted` on
/// begin in this CTA's range, which counts them.
__device__ void find_rows(const SlotParams& p, const CombineParams& c, int first, int count,
                          int counted, Rows& rows, int* returned) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * p.num_topk; i += kThreads) {
    const std::int64_t entry = std::int64_t{first} * p.num_topk + i;
    const std::int64_t at = p.slot_row[entry];
    rows.weight[i] = c.weights[entry];
    rows.at[i] = nullptr;
    if (at >= 0) {
      const int peer = static_cast<int>(at >> 32);
      const std::int64_t row = c.at_home ? entry : at & 0xffffffff;
      rows.at[i] = p.window.pull<std::uint8_t>(c.at_home ? p.window.rank : peer, p.expert_y) +
                   row * 2 * p.hidden;
      if (first + i / p.num_topk >= counted) atomicAdd(&returned[peer], 1);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ SlotParams p, const __grid_constant__ CombineParams c) {
  __shared__ Rows rows;
  __shared__ int returned[kMaxDeviceRanks];
  const int tid = static_cast<int>(threadIdx.x);
  begin_in_order(p);
  const bool failed = has_failed(p);
  const std::uint64_t epoch = *static_cast<volatile std::uint64_t*>(&p.slot->epoch);
  const bool refused = *static_cast<volatile int*>(&p.slot->refused) != 0;
  if (tid < kMaxDeviceRanks) returned[tid] = 0;
  if (__syncthreads_or(failed) != 0) return;
  if (c.send && blockIdx.x == 0) signal_all(p, p.returned, 2 * epoch);

  const int columns = p.hidden / 8;
  const std::int64_t units = std::int64_t{c.num_tokens} * columns / kUnit;
  const std::int64_t begin = units * blockIdx.x / gridDim.x * kUnit;
  const std::int64_t end = units * (blockIdx.x + 1) / gridDim.x * kUnit;
  const int first = static_cast<int>(begin / columns);
  const int last = static_cast<int>((end + columns - 1) / columns);
  const int counted = static_cast<int>((begin + columns - 1) / columns);
  // Where the first tokens' rows are is known before they are there.
  find_rows(p, c, first, min(kTokens, last - first), counted, rows, returned);
  if (SLUICE_PLANTED_FAULT == 3) {
    __syncthreads();
  } else if (!wait_for_all(p, p.returned, kCombineRows, epoch)) {
    return;  // It ends with a barrier.
  }
  for (int t0 = first; t0 < last; t0 += kTokens) {
    const int count = min(kTokens, last - t0);
    if (t0 != first) {
      __syncthreads();
      find_rows(p, c, t0, count, counted, rows, returned);
      __syncthreads();
    }
    const std::int64_t base = std::int64_t{t0} * columns;
    uint4* const y = reinterpret_cast<uint4*>(c.y) + base;
    const int from = static_cast<int>(max(begin - base, std::int64_t{0}));
    const int to = static_cast<int>(min(end - base, std::int64_t{count} * columns));
    for (int v = from + tid; v < to; v += kThreads) {
      const int token = v / columns, column = v % columns;
      constexpr unsigned kNan = 0x7fc07fc0u;
      __stcs(y + v, refused
                        ? uint4{kNan, kNan, kNan, kNan}
                        : sum_rows(rows, token * p.num_topk, p.num_topk, column * 16, c.factor));
    }
  }
  __syncthreads();
  if (tid < p.window.num_ranks && returned[tid] > 0) {
    atomicAdd(&p.state->stats.returned[tid], static_cast<unsigned long long>(returned[tid]));
  }
}

__global__ void return_kernel(const __grid_constant__ SlotParams p, bool dropped) {
  begin_in_order(p);
  if (__syncthreads_or(has_failed(p)) != 0) return;
  signal_all(p, p.returned, 2 * p.slot->epoch + (dropped ? 1 : 0));
}

__global__ void __launch_bounds__(kThreads, 1)
    copy_rows_kernel(const __grid_constant__ SlotParams p, const std::uint16_t* expert_y) {
  begin_in_order(p);
  const int num_local = p.placement.num_local(), vectors = p.hidden / 8;
  uint4* const to = p.window.own<uint4>(p.expert_y);
  const uint4* const from = reinterpret_cast<const uint4*>(expert_y);
  for (int e = 0; e < num_local; ++e) {
    const std::int64_t first = p.row_begin[e] * vectors;
    const std::int64_t count = std::int64_t{p.num_rows[e]} * vectors;
    for (std::int64_t v = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; v < count;
         v += std::int64_t{gridDim.x} * kThreads) {
      to[first + v] = __ldcs(from + first + v);
    }
  }
}

}  // namespace

void prepare_combine_kernels() {
  prefer_shared_memory(combine_kernel);
  prefer_shared_memory(return_kernel);
  prefer_shared_memory(copy_rows_kernel);
}

void launch_combine(const SlotParams& slot, const CombineParams& combine, int num_ctas,
                    void* stream) {
  launch_in_order(combine_kernel, num_ctas, kThreads, 0, stream, slot, combine);
}

void launch_return(const SlotParams& slot, bool dropped, void* stream) {
  launch_in_order(return_kernel, 1, kMaxDeviceRanks, 0, stream, slot, dropped);
}

void launch_copy_rows(const SlotParams& slot, const std::uint16_t* expert_y, int num_ctas,
                      void* stream) {
  launch_in_order(copy_rows_kernel, num_ctas, kThreads, 0, stream, slot, expert_y);
}

}  // namespace sluice::cuda
