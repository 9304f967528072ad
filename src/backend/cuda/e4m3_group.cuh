// e4m3_group.cuh - scales and codes of a group of 128 channels, as every CUDA kernel computes them.
//
// The definition is sluice/quant.h: the same float32 operations in the same order, each rounded by
// itself, on its constants.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/ptx/e4m3.cuh"
#include "backend/cuda/ptx/math.cuh"
#include "sluice/quant.h"

namespace sluice::cuda {

// Kernels hold a group in 16 neighbouring threads of 8 channels, or as half of a tile's 256 rows.
static_assert(kActivationGroup == 128);
// 1 / 448 is rounded once, at compile time, as in quantize_group().
inline constexpr float kInverseE4m3Max = 1.0f / kE4m3Max;

/// Stored scale of a group whose largest magnitude is `amax`, NaN skipped.
__device__ __forceinline__ float group_scale(float amax) {
  return __fmul_rn(fmaxf(amax, kMinGroupAmax), kInverseE4m3Max);
}

/// What the group's elements are multiplied by before the cast.
__device__ __forceinline__ float group_inverse(float amax) {
  return __fdiv_rn(kE4m3Max, fmaxf(amax, kMinGroupAmax));
}

/// Smallest power of two >= s; s is normal. Carries into the exponent on purpose.
__device__ __forceinline__ float ceil_pow2(float s) {
  const unsigned bits = __float_as_uint(s);
  const unsigned mantissa = bits & 0x007fffffu;
  return __uint_as_float(mantissa == 0 ? bits : bits - mantissa + 0x00800000u);
}

/// Eight channels of bf16 in float32; returns their largest magnitude, NaN skipped.
__device__ __forceinline__ float widen_vector(const uint4& x, float (&v)[8]) {
  const unsigned words[4] = {x.x, x.y, x.z, x.w};
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    amax = fmaxf(amax, fmaxf(fabsf(v[2 * i]), fabsf(v[2 * i + 1])));  // fmaxf skips NaN
  }
  return amax;
}
__device__ __forceinline__ float vector_amax(const uint4& x) {
  float v[8];
  return widen_vector(x, v);
}

/// Four codes of four products v[i] * factor.
__device__ __forceinline__ unsigned quantize4(const float* v, float factor) {
  const unsigned low = ptx::e4m3x2_from_float(__fmul_rn(v[1], factor), __fmul_rn(v[0], factor));
  const unsigned high = ptx::e4m3x2_from_float(__fmul_rn(v[3], factor), __fmul_rn(v[2], factor));
  return low | high << 16;
}

/// Four codes moved from `scale` to the static scale: two roundings, in the order of the
/// definition.
__device__ __forceinline__ unsigned requantize4(unsigned codes, float scale, float inverse) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned pair = ptx::f16x2_from_e4m3x2(static_cast<std::uint16_t>(codes >> (i / 2 * 16)));
    v[i] = __fmul_rn(ptx::float_from_f16(static_cast<std::uint16_t>(pair >> (i % 2 * 16))), scale);
  }
  return quantize4(v, inverse);
}

}  // namespace sluice::cuda
