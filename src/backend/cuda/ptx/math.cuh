// math.cuh - conversions and approximations the kernels are built from. One instruction per
// function.
#pragma once

#include <cstdint>

namespace sluice::cuda::ptx {

/// 2^x, relative error below 2^-22; 0 where that is subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x within 1 ulp.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Bits of `ones` where the mask has ones, of `zeros` where it has none.
__device__ __forceinline__ std::uint32_t select_bits(std::uint32_t mask, std::uint32_t ones,
                                                     std::uint32_t zeros) {
  std::uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(bits) : "r"(ones), "r"(mask), "r"(zeros));
  return bits;
}

/// Byte `i` (a constant) of a word: an integer dot product, which leaves the integer pipe alone.
__device__ __forceinline__ std::uint32_t byte_of(std::uint32_t word, const int i) {
  std::uint32_t byte;
  asm("dp4a.u32.u32 %0, %1, %2, 0;" : "=r"(byte) : "r"(word), "r"(1u << 8 * i));
  return byte;
}

/// The upper half of a word, twice. It goes through the pipe of fp16, times 1 and less 0: requires
/// that it is no infinity or NaN there (below 0x7c00).
__device__ __forceinline__ std::uint32_t upper_half(std::uint32_t word) {
  std::uint32_t halves;
  asm("{\n.reg .b16 l, h;\n.reg .b32 t;\nmov.b32 {l, h}, %1;\nmov.b32 t, {h, h};\n"
      "fma.rn.f16x2 %0, t, %2, %3;\n}\n"
      : "=r"(halves)
      : "r"(word), "r"(0x3c003c00u), "r"(0x80008000u));
  return halves;
}

/// The smaller and the larger one; a NaN where either is one. -0 is below +0.
__device__ __forceinline__ float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

/// Two e4m3 codes, `lo` in the low byte: nearest even, saturating; NaN becomes 0x7f.
__device__ __forceinline__ std::uint16_t e4m3x2_from_float(float hi, float lo) {
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(hi), "f"(lo));
  return codes;
}

/// Two bf16, `lo` in the low half: nearest even.
__device__ __forceinline__ std::uint32_t bf16x2_from_float(float hi, float lo) {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}

}  // namespace sluice::cuda::ptx
