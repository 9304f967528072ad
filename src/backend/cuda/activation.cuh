// activation.cuh - the activation functions of sluice/activation.h, as the expert kernel computes
// them: the same operations in the same order, with approximations of exp(), tanh() and division
// in place of function calls.
//
// A kernel is compiled for plain SwiGLU alone or for the other functions, so that these cost SwiGLU
// nothing. One of the others is chosen by the kernel's parameters, once per tile.
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/math.cuh"
#include "sluice/activation.h"

namespace sluice::cuda {

/// Which functions a kernel computes.
enum class Activations : int {
  kSwiglu,  ///< ActivationKind::kSwiglu.
  kOthers,  ///< Every other kind; plain SwiGLU too, as one with an infinite limit.
};

/// An ActivationFn as its functor wants it. Fields of other kinds are 0.
struct ActivationParams {
  ActivationKind kind;
  // kSwigluLimit is kSwigluOai with alpha 1 and an offset of -0, which leave every bit as it is;
  // kSwiglu is kSwigluLimit with a limit of infinity, where a kernel is compiled for all functions.
  float limit, alpha, offset;
  float beta, inv_beta;
  float linear_beta, inv_linear_beta;
};

/// Throws what check_kernel_activation() (w4a8.h) throws.
ActivationParams activation_params(const ActivationFn& fn);

/// x / (1 + exp(-t)) within about 5 f32 ulp. exp(-t) is 2^hi (1 + lo ln 2) with hi + lo = -t
/// log2(e) in twice f32's precision: a single rounded product would cost up to 80 ulp.
__device__ __forceinline__ float gated(float x, float t) {
  constexpr float kLog2e = 1.44269502f;
  constexpr float kLog2eLow = 1.92596303e-8f;  // log2(e) - kLog2e
  constexpr float kLn2 = 0.693147182f;
  constexpr float kLargest = 127.81824f;  // exp2() of what lies below is below 3e38.
  const float hi = __fmul_rn(-t, kLog2e);
  const float lo = __fmaf_rn(-t, kLog2eLow, __fmaf_rn(-t, kLog2e, -hi));
  const float e = ptx::exp2_approx(hi);
  // An exp() that over- or underflowed has no correction: lo may be infinite there, or a NaN.
  const float exp_t = fabsf(hi) < kLargest ? __fmaf_rn(e, __fmul_rn(lo, kLn2), e) : e;
  return __fmul_rn(x, ptx::rcp_approx(__fadd_rn(1.0f, exp_t)));
}

/// tanh(x) within about 4 f32 ulp; a NaN stays one, -0 stays -0. Below 1/2, where 1 - exp(-2 |x|)
/// cancels, by a polynomial in x^2 (minimax, 2^-31), above by exp2().
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  constexpr float kMinus2Log2e = -2.88539004f;
  const float z = __fmul_rn(x, x);
  float p = -0.0065807644f;
  p = __fmaf_rn(p, z, 0.021261092f);
  p = __fmaf_rn(p, z, -0.053892262f);
  p = __fmaf_rn(p, z, 0.13332914f);
  p = __fmaf_rn(p, z, -0.33333325f);
  const float near = __fmul_rn(x, __fmaf_rn(p, z, 1.0f));
  const float e = ptx::exp2_approx(__fmul_rn(fabsf(x), kMinus2Log2e));
  const float far = __fmul_rn(__fadd_rn(1.0f, -e), ptx::rcp_approx(__fadd_rn(1.0f, e)));
  return fabsf(x) < 0.5f ? near : copysignf(far, x);
}

/// activate() of one element, of each kind.
struct PlainSwiglu {
  __device__ __forceinline__ float operator()(float gate, float up) const {
    return __fmul_rn(gated(gate, gate), up);
  }
};
struct LimitedSwiglu {
  __device__ explicit LimitedSwiglu(const ActivationParams& p)
      : limit(p.limit), alpha(p.alpha), offset(p.offset) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    const float g = ptx::min_nan(gate, limit);
    const float u = ptx::max_nan(ptx::min_nan(up, limit), -limit);
    return __fmul_rn(gated(g, __fmul_rn(alpha, g)), __fadd_rn(u, offset));
  }
  float limit, alpha, offset;
};
struct SituGlu {
  __device__ explicit SituGlu(const ActivationParams& p)
      : beta(p.beta),
        inv_beta(p.inv_beta),
        linear_beta(p.linear_beta),
        inv_linear_beta(p.inv_linear_beta) {}
  __device__ __forceinline__ float operator()(float gate, float up) const {
    const float g = __fmul_rn(beta, hyperbolic_tangent(__fmul_rn(gate, inv_beta)));
    const float u = __fmul_rn(linear_beta, hyperbolic_tangent(__fmul_rn(up, inv_linear_beta)));
    return __fmul_rn(gated(g, gate), u);
  }
  float beta, inv_beta, linear_beta, inv_linear_beta;
};

/// visit(functor) with that of `params`, which is one of `Set`. Every thread takes the same way.
template <Activations Set, class Visit>
__device__ __forceinline__ void visit_activation(const ActivationParams& params,
                                                 const Visit& visit) {
  if constexpr (Set == Activations::kSwiglu) {
    visit(PlainSwiglu());
  } else if (params.kind == ActivationKind::kSitu) {
    visit(SituGlu(params));
  } else {
    visit(LimitedSwiglu(params));
  }
}

}  // namespace sluice::cuda
