// quant.h - the number formats of the layer, defined by scalar code.
//
// These functions *are* the formats: every backend must reproduce their bytes. All arithmetic is in
// float32, in exactly the order written here, so that the wire format is the one DeepEP sends.
//
//   m = max(amax, 1e-4f)        amax: largest |x| of the group
//
//   format      stored scale                         code
//   group       m * (1.0f / 448.0f)                  e4m3(x * (448.0f / m))
//   token       the same for all channels of a token
//   pow2        2^ceil(log2(m * (1.0f / 448.0f)))    e4m3(x * (1.0f / scale))
//   static      s, given                             e4m3(x * (1.0f / s))
//   requantize  s1, given                            e4m3((q * scale) * (1.0f / s1))
//
// A group is 128 consecutive channels of one token. amax skips NaN (a NaN element becomes a NaN
// code and leaves its neighbours alone). An infinity makes its group's scale infinite: the infinite
// elements become NaN codes and all others 0, so that the damage stays visible after
// dequantization.
#pragma once

#include <cstdint>
#include <span>

namespace sluice {

/// Channels that share one activation scale, on the wire and in the GEMM.
inline constexpr int kActivationGroup = 128;
/// Largest finite e4m3 value.
inline constexpr float kE4m3Max = 448.0f;
/// Smallest amax a group scale is computed from, so that all-zero groups have a finite inverse.
inline constexpr float kMinGroupAmax = 1e-4f;

/// Exact. Codes 0x7f and 0xff are NaN.
[[nodiscard]] float e4m3_to_float(std::uint8_t code) noexcept;
/// Nearest, ties to even, saturating to +-448 (infinities too); every NaN gives 0x7f.
[[nodiscard]] std::uint8_t e4m3_from_float(float x) noexcept;

/// OCP e2m1: sign, two bits of exponent, one of mantissa. Codes 0 .. 7 are 0, 0.5, 1, 1.5, 2, 3, 4,
/// 6; bit 3 is the sign, and 8 is -0. Higher bits of `code` are ignored.
[[nodiscard]] float e2m1_to_float(std::uint8_t code) noexcept;
/// Nearest, ties to even, saturating to +-6. Requires: x is no NaN, which e2m1 does not have.
[[nodiscard]] std::uint8_t e2m1_from_float(float x) noexcept;
/// OCP e8m0: 2^(code - 127), from 2^-127 (a subnormal float32) to 2^127. 0xff is NaN.
[[nodiscard]] float e8m0_to_float(std::uint8_t code) noexcept;

[[nodiscard]] float bf16_to_float(std::uint16_t bits) noexcept;
/// Nearest, ties to even; overflow gives infinity; NaN stays a quiet NaN.
[[nodiscard]] std::uint16_t bf16_from_float(float x) noexcept;

/// max |x[i]|, NaN skipped, not below kMinGroupAmax.
[[nodiscard]] float group_amax(std::span<const float> x) noexcept;

/// Quantizes one group of any length with a scale of its own; returns the stored scale.
float quantize_group(std::span<const float> x, std::span<std::uint8_t> codes) noexcept;
/// The same with a power-of-two scale: the smallest 2^e with 2^e >= amax / 448 (in float32).
float quantize_group_pow2(std::span<const float> x, std::span<std::uint8_t> codes) noexcept;
/// Quantizes with the given static scale `s` (finite, > 0).
void quantize_static(std::span<const float> x, float s, std::span<std::uint8_t> codes) noexcept;
/// Moves codes from their group's scale to the static scale `s1`: a second rounding, unless both
/// scales are powers of two and nothing under- or overflows.
void requantize(std::span<const std::uint8_t> q, float scale, float s1,
                std::span<std::uint8_t> codes) noexcept;

/// Smallest power of two >= s (s finite, > 0, normal).
[[nodiscard]] float ceil_pow2(float s) noexcept;

/// gate / (1 + exp(-gate)) * up. Defined to a few float32 ulp, not to the bit: exp() differs.
[[nodiscard]] float swiglu(float gate, float up) noexcept;

/// Signed int4 [-8, 7]: element i in byte i / 2, even i in the low nibble (docs/formats.md#int4).
[[nodiscard]] inline std::int8_t unpack_int4(const std::uint8_t* codes, std::int64_t i) noexcept {
  const int nibble = (codes[i / 2] >> (i % 2 * 4)) & 0xf;
  return static_cast<std::int8_t>((nibble ^ 8) - 8);
}
/// The four bits of element i, of any format that packs as int4 does.
[[nodiscard]] inline std::uint8_t unpack_nibble(const std::uint8_t* codes,
                                                std::int64_t i) noexcept {
  return (codes[i / 2] >> (i % 2 * 4)) & 0xf;
}
/// Packs 2 * codes.size() values. Requires: every value in [-8, 7].
void pack_int4(std::span<const std::int8_t> values, std::span<std::uint8_t> codes) noexcept;

}  // namespace sluice
