// activation.cuh - the activation functions of sluice/activation.h, as the expert kernel computes
// them. A kernel knows its function at compile time: another one is another instantiation.
#pragma once

#include "backend/cuda/ptx/math.cuh"
#include "sluice/activation.h"

namespace sluice::cuda {

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

template <ActivationKind Kind>
__device__ __forceinline__ float activate(float gate, float up) {
  static_assert(Kind == ActivationKind::kSwiglu, "this activation has no device code");
  return swiglu(gate, up);
}

}  // namespace sluice::cuda
