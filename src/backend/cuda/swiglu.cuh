// swiglu.cuh - the SwiGLU product and its quantization, as every CUDA kernel computes them.
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/math.cuh"

namespace sluice::cuda {

inline constexpr float kE4m3Limit = 448.0f;
inline constexpr float kMinAmax = 1e-4f;

/// gate / (1 + exp(-gate)) * up within about 6 f32 ulp. exp(-gate) is 2^hi (1 + lo ln 2) with hi +
/// lo = -gate log2(e) in twice f32's precision: a single rounded product would cost up to 80 ulp.
__device__ __forceinline__ float swiglu(float gate, float up) {
  constexpr float kLog2e = 1.44269502f;
  constexpr float kLog2eLow = 1.92596303e-8f;  // log2(e) - kLog2e
  constexpr float kLn2 = 0.693147182f;
  const float hi = __fmul_rn(-gate, kLog2e);
  const float lo = __fmaf_rn(-gate, kLog2eLow, __fmaf_rn(-gate, kLog2e, -hi));
  const float e = ptx::exp2_approx(hi);
  // An exp() that over- or underflowed has no correction (inf * 0 would be NaN).
  const float exp_gate = e < 3e38f ? __fmaf_rn(e, __fmul_rn(lo, kLn2), e) : e;
  return __fmul_rn(__fmul_rn(gate, ptx::rcp_approx(__fadd_rn(1.0f, exp_gate))), up);
}

/// Stored scale of a group whose largest magnitude is `amax`, NaN skipped.
__device__ __forceinline__ float group_scale(float amax) {
  return __fmul_rn(fmaxf(amax, kMinAmax), 1.0f / 448.0f);
}

/// What the group's elements are multiplied by before the cast.
__device__ __forceinline__ float group_inverse(float amax) {
  return __fdiv_rn(kE4m3Limit, fmaxf(amax, kMinAmax));
}

/// Smallest power of two >= s; s is normal. Carries into the exponent on purpose.
__device__ __forceinline__ float ceil_pow2(float s) {
  const unsigned bits = __float_as_uint(s);
  const unsigned mantissa = bits & 0x007fffffu;
  return __uint_as_float(mantissa == 0 ? bits : bits - mantissa + 0x00800000u);
}

}  // namespace sluice::cuda
