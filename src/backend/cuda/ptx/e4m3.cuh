// e4m3.cuh - widening of e4m3. One instruction per function.
#pragma once

#include <cstdint>

namespace sluice::cuda::ptx {

/// Two f16 (exact; e4m3 is a subset), the low byte's value in the low half. NaN stays NaN.
__device__ __forceinline__ std::uint32_t f16x2_from_e4m3x2(std::uint16_t codes) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}

/// f32 of the low 16 bits (exact).
__device__ __forceinline__ float float_from_f16(std::uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

}  // namespace sluice::cuda::ptx
