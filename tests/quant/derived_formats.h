// derived_formats.h - the number formats derived a second time, from their definitions in words.
//
// Slow and obvious on purpose: doubles, ldexp and a search over all codes. Shares nothing with
// src/quant. Products and quotients of two floats are formed in double and rounded once to float,
// which gives the correctly rounded float result.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace sluice::derived {

inline constexpr int kLargestE4m3 = 0x7e;

/// Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; all ones is NaN; no infinities.
inline double e4m3_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::copysign(NAN, code & 0x80 ? -1.0 : 1.0);
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -6 - 3) : std::ldexp(8 + mantissa, exponent - 7 - 3);
  return code & 0x80 ? -magnitude : magnitude;
}

/// The finite code nearest to x, searched; of two equally near, the even one. NaN is 0x7f.
inline std::uint8_t e4m3_nearest(double x) {
  const int sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return 0x7f;
  if (std::isinf(x)) return static_cast<std::uint8_t>(sign | kLargestE4m3);
  int best = 0;
  double best_distance = std::fabs(x);
  for (int code = 1; code <= kLargestE4m3; ++code) {
    const double distance = std::fabs(std::fabs(x) - e4m3_value(code));
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) {
      best = code, best_distance = distance;
    }
  }
  return static_cast<std::uint8_t>(sign | best);
}

/// The same result from the last code at or below |x|: for the tests that need millions.
inline std::uint8_t e4m3_nearest_quick(double x) {
  static const std::vector<double> values = [] {
    std::vector<double> all;
    for (int code = 0; code <= kLargestE4m3; ++code) all.push_back(e4m3_value(code));
    return all;
  }();
  const int sign = std::signbit(x) ? 0x80 : 0;
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7f;
  if (magnitude >= values.back()) return static_cast<std::uint8_t>(sign | kLargestE4m3);
  int low = 0, high = kLargestE4m3;  // values[low] <= magnitude < values[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (values[static_cast<std::size_t>(middle)] <= magnitude ? low : high) = middle;
  }
  const double to_low = magnitude - values[static_cast<std::size_t>(low)];
  const double to_high = values[static_cast<std::size_t>(high)] - magnitude;
  const bool up = to_high < to_low || (to_high == to_low && high % 2 == 0);
  return static_cast<std::uint8_t>(sign | (up ? high : low));
}

inline float product(float a, float b) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b));
}
inline float quotient(float a, float b) {
  return static_cast<float>(static_cast<double>(a) / static_cast<double>(b));
}

/// One group: its scale, or its power-of-two scale, and its codes.
struct Group {
  float scale = 0;
  std::vector<std::uint8_t> codes;
};

inline float amax(const std::vector<float>& x) {
  float largest = 1e-4f;
  for (const float v : x) {
    if (std::fabs(v) > largest) largest = std::fabs(v);
  }
  return largest;
}

inline Group group(const std::vector<float>& x) {
  const float m = amax(x);
  Group result{product(m, quotient(1, 448)), {}};
  for (const float v : x) {
    result.codes.push_back(e4m3_nearest_quick(product(v, quotient(448, m))));
  }
  return result;
}

inline Group group_pow2(const std::vector<float>& x) {
  int exponent = 0;
  const double fraction = std::frexp(product(amax(x), quotient(1, 448)), &exponent);
  if (fraction == 0.5) --exponent;  // frexp gives [0.5, 1): an exact power is 0.5 * 2^e.
  Group result{static_cast<float>(std::ldexp(1.0, exponent)), {}};
  for (const float v : x) {
    result.codes.push_back(e4m3_nearest_quick(product(v, std::ldexp(1.0f, -exponent))));
  }
  return result;
}

}  // namespace sluice::derived
