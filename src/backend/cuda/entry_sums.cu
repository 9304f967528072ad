// entry_sums.cu - the experts' rows summed back into tokens.
//
// Maths     y[t] = bf16(factor * sum_k weight[t, k] * rows[row(t, k)]): f32, product and sum
//           rounded separately, in order of k
// Operands  rows [num_rows, H] bf16; row(t, k) as token_rows.cu assigned it; channels fastest.
// Tile      a thread sums 8 channels (16 B) of one token, the loads of 8 rows in flight.
// Needs     H % 128 == 0.
// Bound     bytes: a row is read once, a token is written once.
#include <cuda_runtime.h>

#include "backend/cuda/carveout.h"
#include "backend/cuda/launch.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/token_rows.h"

namespace sluice::cuda {
namespace {

constexpr int kSumThreads = 128;
constexpr int kRowsInFlight = 8;

__device__ __forceinline__ void add_row(float (&sum)[8], const uint4& in, float weight) {
  const unsigned words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(weight, __uint_as_float(words[i] << 16)));
    sum[2 * i + 1] =
        __fadd_rn(sum[2 * i + 1], __fmul_rn(weight, __uint_as_float(words[i] & 0xffff0000u)));
  }
}

__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ EntrySums p) {
  const std::int64_t token = blockIdx.x, entry = token * p.num_topk;
  const int vectors = static_cast<int>(p.width) / 8;
  const int v = static_cast<int>(blockIdx.y) * kSumThreads + static_cast<int>(threadIdx.x);
  follow_predecessor();
  if (v >= vectors) return;
  float sum[8] = {};
  for (int k0 = 0; k0 < p.num_topk; k0 += kRowsInFlight) {
    int row[kRowsInFlight];
    float weight[kRowsInFlight];
    uint4 in[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const bool exists = k0 + i < p.num_topk;
      row[i] = exists ? p.row_of[entry + k0 + i] : -1;
      weight[i] = exists ? p.weights[entry + k0 + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row[i] >= 0)
        in[i] = __ldcs(reinterpret_cast<const uint4*>(p.rows + row[i] * p.width) + v);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row[i] >= 0) add_row(sum, in[i], weight[i]);
    }
  }
  unsigned out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = ptx::bf16x2_from_float(__fmul_rn(sum[2 * i + 1], p.factor),
                                    __fmul_rn(sum[2 * i], p.factor));
  }
  reinterpret_cast<uint4*>(p.y + token * p.width)[v] = {out[0], out[1], out[2], out[3]};
}

}  // namespace

void launch_sum_entries(const EntrySums& args, StreamHandle stream) {
  if (args.num_tokens == 0) return;
  const auto vectors = static_cast<int>(args.width) / 8;
  launch_early(sum_kernel,
               {.blocks = static_cast<int>(args.num_tokens),
                .threads = kSumThreads,
                .blocks_y = (vectors + kSumThreads - 1) / kSumThreads},
               args, static_cast<cudaStream_t>(stream));
}

void prepare_sum_kernel() {
  prefer_shared_memory(sum_kernel);
}

}  // namespace sluice::cuda
