// The definition of every number format. Compiled without contraction of multiply and add, so that
// the order of roundings is the one written.
#include "sluice/quant.h"

#include <bit>
#include <cmath>

namespace sluice {
namespace {

constexpr std::uint32_t kF32Sign = 0x80000000u;
constexpr std::uint32_t kF32Infinity = 0x7f800000u;

/// Bits of |x| rounded to nearest even at bit `drop`, the dropped bits cleared by the shift.
constexpr std::uint32_t round_shift(std::uint32_t magnitude, int drop) {
  const std::uint32_t half = (1u << (drop - 1)) - 1 + ((magnitude >> drop) & 1);
  return (magnitude + half) >> drop;
}

}  // namespace

float e4m3_to_float(std::uint8_t code) noexcept {
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude < 8) {  // Subnormal: magnitude * 2^-9.
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
  }
  // Exponent bias 7 -> 127, mantissa 3 -> 23 bits.
  return std::bit_cast<float>(sign | ((magnitude << 20) + ((127u - 7u) << 23)));
}

std::uint8_t e4m3_from_float(float x) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint8_t>((bits & kF32Sign) >> 24);
  const std::uint32_t magnitude = bits & ~kF32Sign;
  if (magnitude > kF32Infinity) return 0x7f;
  if (magnitude >= std::bit_cast<std::uint32_t>(kE4m3Max)) return sign | 0x7e;
  if (magnitude < std::bit_cast<std::uint32_t>(0x1p-6f)) {
    // Subnormal result: adding 2^14 puts the unit 2^-9 at the last mantissa bit, so that the float
    // addition itself rounds to nearest even.
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
    return sign | static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(shifted) -
                                            std::bit_cast<std::uint32_t>(0x1p14f));
  }
  // 448 = 0x7e is the largest code and magnitude < 448 here, so rounding cannot reach NaN's 0x7f.
  const std::uint32_t rounded = round_shift(magnitude, 20) - ((127u - 7u) << 3);
  return sign | static_cast<std::uint8_t>(rounded);
}

float bf16_to_float(std::uint16_t bits) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t bf16_from_float(float x) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & ~kF32Sign) > kF32Infinity) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>(round_shift(bits & ~kF32Sign, 16) | ((bits & kF32Sign) >> 16));
}

float group_amax(std::span<const float> x) noexcept {
  float amax = kMinGroupAmax;
  for (const float v : x) {
    // Not std::fmax: it may answer a signalling NaN with a NaN, which the next call would then drop
    // together with everything before it.
    if (std::fabs(v) > amax) amax = std::fabs(v);
  }
  return amax;
}

float quantize_group(std::span<const float> x, std::span<std::uint8_t> codes) noexcept {
  const float amax = group_amax(x);
  const float inverse = kE4m3Max / amax;
  for (std::size_t i = 0; i < x.size(); ++i) codes[i] = e4m3_from_float(x[i] * inverse);
  return amax * (1.0f / kE4m3Max);
}

float quantize_group_pow2(std::span<const float> x, std::span<std::uint8_t> codes) noexcept {
  const float scale = ceil_pow2(group_amax(x) * (1.0f / kE4m3Max));
  const float inverse = 1.0f / scale;
  for (std::size_t i = 0; i < x.size(); ++i) codes[i] = e4m3_from_float(x[i] * inverse);
  return scale;
}

void quantize_static(std::span<const float> x, float s, std::span<std::uint8_t> codes) noexcept {
  const float inverse = 1.0f / s;
  for (std::size_t i = 0; i < x.size(); ++i) codes[i] = e4m3_from_float(x[i] * inverse);
}

void requantize(std::span<const std::uint8_t> q, float scale, float s1,
                std::span<std::uint8_t> codes) noexcept {
  const float inverse = 1.0f / s1;
  for (std::size_t i = 0; i < q.size(); ++i) {
    const float value = e4m3_to_float(q[i]) * scale;
    codes[i] = e4m3_from_float(value * inverse);
  }
}

float e2m1_to_float(std::uint8_t code) noexcept {
  // Exponent bias 1; exponent 0 holds the subnormals 0 and 0.5.
  constexpr float kMagnitudes[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const float magnitude = kMagnitudes[code & 7];
  return (code & 8) != 0 ? -magnitude : magnitude;
}

std::uint8_t e2m1_from_float(float x) noexcept {
  const float magnitude = std::fabs(x);
  // How many boundaries lie below. One halfway between an odd code and the even code above it
  // belongs to the even one.
  unsigned code = 0;
  code += magnitude > 0.25f ? 1 : 0;
  code += magnitude >= 0.75f ? 1 : 0;
  code += magnitude > 1.25f ? 1 : 0;
  code += magnitude >= 1.75f ? 1 : 0;
  code += magnitude > 2.5f ? 1 : 0;
  code += magnitude >= 3.5f ? 1 : 0;
  code += magnitude > 5.0f ? 1 : 0;
  return static_cast<std::uint8_t>(code | (std::signbit(x) ? 8U : 0U));
}

float e8m0_to_float(std::uint8_t code) noexcept {
  if (code == 0xff) return std::bit_cast<float>(0x7fc00000u);
  // The exponents of float32, but for 2^-127, which is a subnormal number there.
  return std::bit_cast<float>(code == 0 ? 0x00400000u : static_cast<std::uint32_t>(code) << 23);
}

float ceil_pow2(float s) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(s);
  const std::uint32_t mantissa = bits & 0x007fffffu;
  // A carry out of the exponent field gives infinity, as 2^128 should.
  return std::bit_cast<float>(mantissa == 0 ? bits : (bits - mantissa) + 0x00800000u);
}

float swiglu(float gate, float up) noexcept {
  return gate / (1.0f + std::exp(-gate)) * up;
}

void pack_int4(std::span<const std::int8_t> values, std::span<std::uint8_t> codes) noexcept {
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>((values[2 * i] & 0xf) | (values[2 * i + 1] & 0xf) << 4);
  }
}

}  // namespace sluice
