// elementwise.cu - quantize bf16 rows and move codes to a static scale.
//
// Maths     m = max(amax over 128 channels, 1e-4)
//           format      scale                               code
//           group       m * (1 / 448)                       e4m3(x * (448 / m))
//           pow2        2^ceil(log2(m * (1 / 448)))         e4m3(x * (1 / scale))
//           token       as group, of all channels of a row: a kernel of its own
//           static      s, given                            e4m3(x * (1 / s))
//           requantize  s1, given                           e4m3((q * scale) * (1 / s1))
//           All in f32, each operation rounded by itself, as sluice/quant.h defines it.
// Operands  rows of bf16 or e4m3, channels fastest.
// Tile      A vector is 16 B of one row: 8 channels of bf16, 16 of e4m3. Vectors are numbered over
//           the valid rows only, and every block takes the same number of consecutive ones:
//               block b:  | pass 0: 4 x 256 vectors | pass 1 | ...
//           so neither an empty expert nor a short row costs a block anything.
// Warps     8 per block, all alike; each thread has four loads in flight before it computes.
// Shared    prefix of row counts and where each expert's rows begin, 12 KB.
// Needs     width % 128 == 0, at most 1024 experts and 2^32 vectors (64 GB).
// Bound     bytes: 3 per channel (quantize), 2 (requantize). Numbers: docs/performance-kernels.md.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "backend/cuda/check.h"
#include "backend/cuda/e4m3_group.cuh"
#include "backend/cuda/elementwise.h"
#include "backend/cuda/launch.cuh"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;  // Of 64 registers a thread: 64 KB of loads in flight per SM.
constexpr int kDepth = 4;        // Vectors of one thread in flight.
constexpr int kVectorBytes = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

struct RowTable {
  long long shift[kMaxRowExperts];  // row of the buffers - number of the valid row
  int prefix[kMaxRowExperts + 1];   // valid rows of the experts before e
};

/// Inclusive scan of the row counts into s.prefix[1..]; one warp, 32 experts a step.
__device__ void sum_rows(RowTable& s, const RowRanges& rows) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int carry = 0;
    if (lane == 0) s.prefix[0] = 0;
#pragma unroll 4
    for (int base = 0; base < rows.num_experts; base += 32) {
      const int e = base + lane;
      const bool exists = e < rows.num_experts;
      int count = exists ? static_cast<int>(rows.max_rows_per_expert) : 0;
      if (exists && rows.count != nullptr) count = __ldcg(rows.count + e);
      long long begin = e * rows.max_rows_per_expert;
      if (exists && rows.begin != nullptr) begin = __ldcg(rows.begin + e);
      int sum = count;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, d);
        if (lane >= d) sum += other;
      }
      sum += carry;
      if (exists) {
        s.prefix[e + 1] = sum;
        s.shift[e] = begin - (sum - count);
      }
      carry = __shfl_sync(kAllLanes, sum, 31);
    }
  }
  __syncthreads();
}

/// A thread's place in the valid rows; it only moves forward.
struct Cursor {
  int row;          // number of the valid row
  unsigned vector;  // in the row
  int expert;       // s.prefix[expert] <= row < s.prefix[expert + 1], once it has moved
};

/// Expert of the first valid row at or after which a warp works; all lanes ask for the same row.
__device__ int find_expert(const RowTable& s, int num_experts, int row) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int before = 0;  // experts that end at or before `row`
  for (int base = 0; base < num_experts; base += 32) {
    const bool ends = base + lane < num_experts && s.prefix[base + lane + 1] <= row;
    before += __popc(__ballot_sync(kAllLanes, ends));
  }
  return before;
}

/// For every vector of the valid rows, kDepth of a thread at a time: item = load(row, vector), then
/// finish(item, row, vector, is_valid) by all lanes of the warp, valid or not. 16 consecutive lanes
/// are valid together.
template <class Load, class Finish>
__device__ void for_each_vector(const RowRanges& rows, unsigned vectors_per_row, const Load& load,
                                const Finish& finish) {
  __shared__ RowTable s;
  sum_rows(s, rows);
  const unsigned total = static_cast<unsigned>(s.prefix[rows.num_experts]) * vectors_per_row;
  const unsigned share = ((total - 1) / gridDim.x + 32) / 32 * 32;  // >= total / gridDim.x
  const unsigned begin = share * blockIdx.x;
  if (total == 0 || begin >= total) return;
  const unsigned count = min(share, total - begin);

  const unsigned thread = threadIdx.x;
  const unsigned warp_first = begin + min(thread / 32 * 32, count - 1);
  Cursor at;
  at.row = static_cast<int>(warp_first / vectors_per_row);
  at.vector = warp_first - static_cast<unsigned>(at.row) * vectors_per_row + thread % 32;
  at.expert = find_expert(s, rows.num_experts, at.row);
  while (at.vector >= vectors_per_row) at.vector -= vectors_per_row, ++at.row;
  const unsigned step_rows = kThreads / vectors_per_row, step = kThreads % vectors_per_row;

  for (unsigned base = 0; base < count; base += kThreads * kDepth) {
    decltype(load(0LL, 0u)) item[kDepth];
    long long row[kDepth];
    unsigned vector[kDepth];
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      item[i] = {};
      row[i] = 0, vector[i] = 0;
      if (base + i * kThreads + thread < count) {
        while (at.row >= s.prefix[at.expert + 1]) ++at.expert;
        row[i] = at.row + s.shift[at.expert];
        vector[i] = at.vector;
        item[i] = load(row[i], vector[i]);
        at.row += static_cast<int>(step_rows);
        at.vector += step;
        if (at.vector >= vectors_per_row) at.vector -= vectors_per_row, ++at.row;
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (base + i * kThreads < count) {
        finish(item[i], row[i], vector[i], base + i * kThreads + thread < count);
      }
    }
  }
}

enum class QuantizeScale : std::uint8_t { kGroup, kPow2, kStatic };

template <QuantizeScale Kind>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    quantize_kernel(const __grid_constant__ Quantize p) {
  constexpr int kChannels = 8;  // Of a vector; 16 lanes hold one group.
  follow_predecessor();
  const int width = static_cast<int>(p.out.width);
  const float static_factor =
      Kind == QuantizeScale::kStatic ? __fdiv_rn(1.0f, p.out.static_scale) : 0.0f;
  const auto load = [&](long long row, unsigned vector) {
    return __ldcs(reinterpret_cast<const uint4*>(p.x + row * width) + vector);
  };
  for_each_vector(p.rows, width / kChannels, load,
                  [&](const uint4& x, long long row, unsigned vector, bool is_valid) {
                    float v[kChannels];
                    float amax = widen_vector(x, v);
                    float factor = static_factor;
                    if constexpr (Kind != QuantizeScale::kStatic) {
#pragma unroll
                      for (int d = 1; d < 16; d *= 2)
                        amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, d));
                      float scale = group_scale(amax);
                      factor = group_inverse(amax);
                      if constexpr (Kind == QuantizeScale::kPow2) {
                        scale = ceil_pow2(scale);
                        factor = __fdiv_rn(1.0f, scale);
                      }
                      if (is_valid && vector % 16 == 0)
                        p.out.scale[row * (width / kActivationGroup) + vector / 16] = scale;
                    }
                    if (!is_valid) return;
                    reinterpret_cast<uint2*>(p.out.row(row))[vector] = {quantize4(v, factor),
                                                                        quantize4(v + 4, factor)};
                  });
}

/// A block takes whole rows, one after the other: it reads a row, and reads it again from the L1 or
/// the L2 once its largest magnitude is known.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    quantize_token_kernel(const __grid_constant__ Quantize p) {
  __shared__ RowTable s;
  __shared__ float warp_amax[2][kThreads / 32];
  follow_predecessor();
  sum_rows(s, p.rows);
  const int num_rows = s.prefix[p.rows.num_experts];
  const int vectors = static_cast<int>(p.out.width) / 8, thread = static_cast<int>(threadIdx.x);
  int turn = 0;
  for (int i = static_cast<int>(blockIdx.x); i < num_rows; i += static_cast<int>(gridDim.x)) {
    const long long row = i + s.shift[find_expert(s, p.rows.num_experts, i)];
    const uint4* const in = reinterpret_cast<const uint4*>(p.x + row * p.out.width);
    float amax = 0.0f;
    for (int v = thread; v < vectors; v += kThreads) amax = fmaxf(amax, vector_amax(in[v]));
#pragma unroll
    for (int d = 1; d < 32; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, d));
    // Two sets in turn: a warp may be a row ahead of one that still reads.
    if (thread % 32 == 0) warp_amax[turn][thread / 32] = amax;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) amax = fmaxf(amax, warp_amax[turn][w]);
    turn ^= 1;
    const float factor = group_inverse(amax);
    if (thread == 0) p.out.scale[row] = group_scale(amax);
    for (int v = thread; v < vectors; v += kThreads) {
      float x[8];
      widen_vector(in[v], x);
      reinterpret_cast<uint2*>(p.out.row(row))[v] = {quantize4(x, factor),
                                                     quantize4(x + 4, factor)};
    }
  }
}

/// 16 codes of one group, and the group's scale.
struct ScaledCodes {
  uint4 codes;
  float scale;
};

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    requantize_kernel(const __grid_constant__ Requantize p) {
  follow_predecessor();
  const int width = static_cast<int>(p.in.width);
  const float inverse = __fdiv_rn(1.0f, p.out.static_scale);
  // Rows that a dispatch has just written are in the L2 and stay there; what is written here is
  // read once, next, and may go first (docs/performance-kernels.md: 0.4 us at 64 rows).
  const auto load = [&](long long row, unsigned vector) {
    return ScaledCodes{.codes = __ldcg(reinterpret_cast<const uint4*>(p.in.row(row)) + vector),
                       .scale = __ldcg(p.in.scale + row * (width / kActivationGroup) + vector / 8)};
  };
  for_each_vector(p.rows, width / 16, load,
                  [&](const ScaledCodes& in, long long row, unsigned vector, bool is_valid) {
                    if (!is_valid) return;
                    const uint4 out{requantize4(in.codes.x, in.scale, inverse),
                                    requantize4(in.codes.y, in.scale, inverse),
                                    requantize4(in.codes.z, in.scale, inverse),
                                    requantize4(in.codes.w, in.scale, inverse)};
                    __stcs(reinterpret_cast<uint4*>(p.out.row(row)) + vector, out);
                  });
}

/// One vector per thread for few rows, for latency; for many, what the device holds at once.
int num_blocks(const RowRanges& rows, std::int64_t bytes_per_row, int num_sms) {
  const std::int64_t expected = std::int64_t{rows.num_experts} * std::max(1, rows.expected_m);
  const std::int64_t vectors = expected * (bytes_per_row / kVectorBytes);
  const std::int64_t blocks = (vectors + kThreads - 1) / kThreads;
  const std::int64_t most = static_cast<std::int64_t>(num_sms) * kBlocksPerSm;
  return static_cast<int>(std::clamp<std::int64_t>(blocks, std::min(num_sms, 64), most));
}

void check_rows(const RowRanges& rows) {
  if (rows.num_experts > kMaxRowExperts) {
    throw Error(ErrorCode::kUnsupported, "num_experts " + std::to_string(rows.num_experts) +
                                             ": at most " + std::to_string(kMaxRowExperts) +
                                             " on one rank");
  }
}

}  // namespace

void launch_quantize(const Quantize& args, int num_sms, StreamHandle stream) {
  check_rows(args.rows);
  const LaunchSize size{.blocks = num_blocks(args.rows, 2 * args.out.width, num_sms),
                        .threads = kThreads};
  const auto queue = static_cast<cudaStream_t>(stream);
  if (args.out.scale == nullptr) {
    launch_early(quantize_kernel<QuantizeScale::kStatic>, size, args, queue);
  } else if (args.out.scale_per_row) {
    launch_early(quantize_token_kernel, size, args, queue);
  } else if (args.pow2) {
    launch_early(quantize_kernel<QuantizeScale::kPow2>, size, args, queue);
  } else {
    launch_early(quantize_kernel<QuantizeScale::kGroup>, size, args, queue);
  }
}

void launch_requantize(const Requantize& args, int num_sms, StreamHandle stream) {
  check_rows(args.rows);
  const LaunchSize size{.blocks = num_blocks(args.rows, args.in.width, num_sms),
                        .threads = kThreads};
  launch_early(requantize_kernel, size, args, static_cast<cudaStream_t>(stream));
}

}  // namespace sluice::cuda
