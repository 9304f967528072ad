// elementwise.cu - quantize bf16 rows and move codes to a static scale.
//
// Maths     quantize    m = max(amax over 128 channels, 1e-4), scale = m * (1/448), code = e4m3(x *
// (448 / m))
//                       pow2: scale = 2^ceil(log2(m * (1/448))), code = e4m3(x / scale); static:
//                       e4m3(x * (1/s))
//           requantize  code = e4m3((q * scale) * (1 / s1))
//           All in f32, each operation rounded by itself, as sluice/quant.h defines it.
// Operands  rows of bf16 or e4m3, channels fastest; loaded 16 B per thread, whole sectors per warp.
// Tile      A unit is 512 channels of one row (four groups), taken by one warp; the last unit of a
// row
//           may be shorter. Units are numbered over valid rows only: a block first sums num_rows.
// Warps     8 per block, all alike.
// Shared    prefix of row counts, 4 KiB + 4 B.
// Needs     width % 128 == 0, at most 1024 experts.
// Bound     bytes: 3 per channel (quantize), 2 (requantize). Numbers: docs/performance-gpu.md.
#include <cuda_runtime.h>

#include "backend/cuda/check.h"
#include "backend/cuda/elementwise.h"
#include "backend/cuda/ptx/e4m3.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/swiglu.cuh"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnitChannels = 512;
constexpr int kLaneChannels = kUnitChannels / 32;  // 16
constexpr unsigned kAllLanes = 0xffffffffu;

struct Shared {
  int prefix[kMaxRowExperts + 1];  // rows of the experts before e
};

/// Inclusive scan of num_rows into s.prefix[1..]; one warp, 32 experts a step.
__device__ void sum_rows(Shared& s, const RowRanges& rows) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int carry = 0;
    if (lane == 0) s.prefix[0] = 0;
    for (int base = 0; base < rows.num_experts; base += 32) {
      const int e = base + lane;
      int sum = e < rows.num_experts ? rows.num_rows[e] : 0;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, d);
        if (lane >= d) sum += other;
      }
      sum += carry;
      if (e < rows.num_experts) s.prefix[e + 1] = sum;
      carry = __shfl_sync(kAllLanes, sum, 31);
    }
  }
  __syncthreads();
}

/// Row of the buffers that the `index`-th valid row is.
__device__ long long row_of(const Shared& s, const RowRanges& rows, int index) {
  int low = 0, high = rows.num_experts;  // prefix[low] <= index < prefix[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (s.prefix[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return rows.row_begin[low] + (index - s.prefix[low]);
}

/// Calls body(row, first channel of this lane, whether the lane has channels) for each unit.
template <class Body>
__device__ void for_each_unit(const RowRanges& rows, int width, const Body& body) {
  __shared__ Shared s;
  sum_rows(s, rows);
  const int units_per_row = (width + kUnitChannels - 1) / kUnitChannels;
  const long long num_units = static_cast<long long>(s.prefix[rows.num_experts]) * units_per_row;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const long long stride = static_cast<long long>(gridDim.x) * kWarps;
  for (long long unit = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / 32;
       unit < num_units; unit += stride) {
    const int index = static_cast<int>(unit / units_per_row);
    const int channel =
        static_cast<int>(unit % units_per_row) * kUnitChannels + lane * kLaneChannels;
    body(row_of(s, rows, index), channel, channel < width);
  }
}

/// Smallest power of two >= s; s is normal. Carries into the exponent on purpose.
__device__ float ceil_pow2(float s) {
  const unsigned bits = __float_as_uint(s);
  const unsigned mantissa = bits & 0x007fffffu;
  return __uint_as_float(mantissa == 0 ? bits : bits - mantissa + 0x00800000u);
}

/// Four codes of four products v[i] * factor.
__device__ unsigned quantize4(const float* v, float factor) {
  const unsigned low = ptx::e4m3x2_from_float(__fmul_rn(v[1], factor), __fmul_rn(v[0], factor));
  const unsigned high = ptx::e4m3x2_from_float(__fmul_rn(v[3], factor), __fmul_rn(v[2], factor));
  return low | high << 16;
}

template <QuantizeScale Kind>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ Quantize p) {
  cudaGridDependencySynchronize();
  const float static_factor =
      Kind == QuantizeScale::kStatic ? __fdiv_rn(1.0f, p.static_scale) : 0.0f;
  for_each_unit(p.rows, p.width, [&](long long row, int channel, bool valid) {
    float v[kLaneChannels];
    const uint4* in = reinterpret_cast<const uint4*>(p.x + row * p.width + channel);
    const uint4 a = valid ? in[0] : uint4{}, b = valid ? in[1] : uint4{};
    const unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      amax = fmaxf(amax, fmaxf(fabsf(v[2 * i]), fabsf(v[2 * i + 1])));  // fmaxf skips NaN
    }
    float factor = static_factor;
    if constexpr (Kind != QuantizeScale::kStatic) {
      // Eight lanes hold one group of 128 channels.
#pragma unroll
      for (int d = 1; d < 8; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, d));
      float scale = group_scale(amax);
      factor = group_inverse(amax);
      if constexpr (Kind == QuantizeScale::kPow2) {
        scale = ceil_pow2(scale);
        factor = __fdiv_rn(1.0f, scale);
      }
      if (valid && channel % 128 == 0) p.scale[row * (p.width / 128) + channel / 128] = scale;
    }
    if (!valid) return;
    const uint4 codes{quantize4(v, factor), quantize4(v + 4, factor), quantize4(v + 8, factor),
                      quantize4(v + 12, factor)};
    *reinterpret_cast<uint4*>(p.codes + row * p.width + channel) = codes;
  });
}

/// Four codes moved from `scale` to the static scale: two roundings, in the order of the
/// definition.
__device__ unsigned requantize4(unsigned codes, float scale, float inverse) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned pair = ptx::f16x2_from_e4m3x2(static_cast<std::uint16_t>(codes >> (i / 2 * 16)));
    v[i] = __fmul_rn(ptx::float_from_f16(static_cast<std::uint16_t>(pair >> (i % 2 * 16))), scale);
  }
  return quantize4(v, inverse);
}

__global__ void __launch_bounds__(kThreads)
    requantize_kernel(const __grid_constant__ Requantize p) {
  cudaGridDependencySynchronize();
  const float inverse = __fdiv_rn(1.0f, p.static_scale);
  for_each_unit(p.rows, p.width, [&](long long row, int channel, bool valid) {
    if (!valid) return;
    const uint4 in = *reinterpret_cast<const uint4*>(p.in + row * p.width + channel);
    const float scale = p.in_scale[row * (p.width / 128) + channel / 128];
    const uint4 out{requantize4(in.x, scale, inverse), requantize4(in.y, scale, inverse),
                    requantize4(in.z, scale, inverse), requantize4(in.w, scale, inverse)};
    *reinterpret_cast<uint4*>(p.out + row * p.width + channel) = out;
  });
}

__global__ void narrow_offsets_kernel(const std::int64_t* row_begin, int num_experts,
                                      std::int32_t* out) {
  cudaGridDependencySynchronize();
  const int e = static_cast<int>(threadIdx.x);
  if (e < num_experts) out[e] = static_cast<std::int32_t>(row_begin[e]);
}

/// Enough blocks for the expected rows, at most what the device holds at once.
int num_blocks(const RowRanges& rows, int width, int num_sms) {
  constexpr int kBlocksPerSm = 8;
  const std::int64_t units = rows.expected_rows * ((width + kUnitChannels - 1) / kUnitChannels);
  const std::int64_t blocks = (units + kWarps - 1) / kWarps;
  const std::int64_t most = static_cast<std::int64_t>(num_sms) * kBlocksPerSm;
  return static_cast<int>(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

}  // namespace

void launch_quantize(const Quantize& args, int num_sms, StreamHandle stream) {
  const int blocks = num_blocks(args.rows, args.width, num_sms);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (args.kind) {
    case QuantizeScale::kGroup:
      quantize_kernel<QuantizeScale::kGroup><<<blocks, kThreads, 0, queue>>>(args);
      break;
    case QuantizeScale::kPow2:
      quantize_kernel<QuantizeScale::kPow2><<<blocks, kThreads, 0, queue>>>(args);
      break;
    case QuantizeScale::kStatic:
      quantize_kernel<QuantizeScale::kStatic><<<blocks, kThreads, 0, queue>>>(args);
      break;
  }
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_requantize(const Requantize& args, int num_sms, StreamHandle stream) {
  const int blocks = num_blocks(args.rows, args.width, num_sms);
  requantize_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

void launch_narrow_offsets(const std::int64_t* row_begin, int num_experts, std::int32_t* out,
                           StreamHandle stream) {
  narrow_offsets_kernel<<<1, kMaxRowExperts, 0, static_cast<cudaStream_t>(stream)>>>(
      row_begin, num_experts, out);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
