// e4m3 and bf16 conversions against an independent derivation, over every input that matters.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "derived_formats.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float from_bits(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}

/// The code of x and of -x.
void expect_code(float x, int code) {
  EXPECT_EQ(e4m3_from_float(x), code) << std::hexfloat << x;
  EXPECT_EQ(e4m3_from_float(-x), code | 0x80) << std::hexfloat << -x;
}

TEST(E4m3, DecodesAll256Codes) {
  for (int code = 0; code < 256; ++code) {
    const double expected = derived::e4m3_value(code);
    const float actual = e4m3_to_float(static_cast<std::uint8_t>(code));
    EXPECT_EQ(std::signbit(actual), code >= 128) << code;
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(actual)) << code;
    } else {
      EXPECT_EQ(actual, expected) << code;
    }
  }
}

TEST(E4m3, HasTwoNansNoInfinityAndTheKnownLimits) {
  int nans = 0;
  float largest = 0, smallest = kInfinity;
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(static_cast<std::uint8_t>(code));
    nans += std::isnan(value);
    EXPECT_FALSE(std::isinf(value));
    if (value > largest) largest = value;
    if (value > 0 && value < smallest) smallest = value;
  }
  EXPECT_EQ(nans, 2);
  EXPECT_EQ(largest, 448.0f);
  EXPECT_EQ(largest, kE4m3Max);
  EXPECT_EQ(smallest, 0x1p-9f);
}

TEST(E4m3, EveryCodeSurvivesARoundTrip) {
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    EXPECT_EQ(e4m3_from_float(e4m3_to_float(byte)), code == 0xff ? 0x7f : byte);
  }
}

TEST(E4m3, EncodesEveryBf16Input) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = from_bits(bits << 16);
    ASSERT_EQ(e4m3_from_float(x), derived::e4m3_nearest(x)) << std::hexfloat << x;
    ASSERT_EQ(derived::e4m3_nearest_quick(x), derived::e4m3_nearest(x)) << std::hexfloat << x;
  }
}

TEST(E4m3, TiesGoToTheEvenCodeAndOneUlpDecides) {
  for (int code = 0; code < derived::kLargestE4m3; ++code) {
    const auto tie =
        static_cast<float>((derived::e4m3_value(code) + derived::e4m3_value(code + 1)) / 2);
    expect_code(tie, code % 2 == 0 ? code : code + 1);
    expect_code(std::nextafter(tie, 0.0f), code);
    expect_code(std::nextafter(tie, kInfinity), code + 1);
  }
}

TEST(E4m3, OneUlpAroundEveryCodeStaysOnIt) {
  for (int code = 0; code <= derived::kLargestE4m3; ++code) {
    const auto value = static_cast<float>(derived::e4m3_value(code));
    expect_code(value, code);
    expect_code(std::nextafter(value, kInfinity), code);
    if (code > 0) expect_code(std::nextafter(value, 0.0f), code);
  }
}

TEST(E4m3, SaturatesAt448) {
  // 464 is where a format with one more code would round up to 480.
  for (const float x : {448.0f, 463.99997f, 464.0f, 464.00003f, 480.0f, 1e10f,
                        std::numeric_limits<float>::max(), kInfinity}) {
    expect_code(x, 0x7e);
  }
}

TEST(E4m3, Subnormals) {
  expect_code(0x1p-10f, 0);  // Half the smallest: a tie, and zero is even.
  expect_code(std::nextafter(0x1p-10f, 1.0f), 1);
  expect_code(0x1p-9f, 1);
  expect_code(0x1.8p-9f, 2);
  expect_code(7 * 0x1p-9f, 7);
  expect_code(7.5f * 0x1p-9f, 8);  // Rounds into the normal numbers.
  expect_code(0x1p-6f, 8);
  expect_code(std::numeric_limits<float>::min(), 0);
  expect_code(std::numeric_limits<float>::denorm_min(), 0);
  expect_code(0.0f, 0);
}

TEST(E4m3, EveryNanBecomesTheOneCanonicalCode) {
  for (const std::uint32_t payload : {0x1u, 0x400000u, 0x7fffffu, 0x12345u, 0x3fffffu}) {
    EXPECT_EQ(e4m3_from_float(from_bits(0x7f800000u | payload)), 0x7f);
    EXPECT_EQ(e4m3_from_float(from_bits(0xff800000u | payload)), 0x7f);
  }
}

TEST(E4m3, AgreesOnFloatsOfEveryExponent) {
  // A stride that is prime to the mantissa's size walks over all exponents and mixed mantissas.
  for (std::uint64_t bits = 0; bits < 0x100000000u; bits += 4099) {
    const float x = from_bits(static_cast<std::uint32_t>(bits));
    ASSERT_EQ(e4m3_from_float(x), derived::e4m3_nearest_quick(x)) << std::hexfloat << x;
  }
}

TEST(E4m3, IsMonotonic) {
  int previous = -1;
  for (std::uint32_t bits = 0x3a000000u; bits < 0x44000000u; bits += 97) {
    const int code = e4m3_from_float(from_bits(bits));
    ASSERT_GE(code, previous);
    previous = code;
  }
  EXPECT_EQ(previous, 0x7e);
}

TEST(Bf16, EveryPatternSurvivesARoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = bf16_to_float(static_cast<std::uint16_t>(bits));
    EXPECT_EQ(std::bit_cast<std::uint32_t>(value), bits << 16);
    // A signalling NaN comes back quiet.
    const std::uint32_t expected = std::isnan(value) ? bits | 0x40u : bits;
    EXPECT_EQ(bf16_from_float(value), expected);
  }
}

TEST(Bf16, TiesGoToEvenBetweenAllNeighbours) {
  for (std::uint32_t low = 0; low < 0x7f80; ++low) {
    const std::uint32_t tie = low << 16 | 0x8000u;  // Up to 0x7f80: past the largest is infinity.
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const std::uint32_t s = sign >> 16;
      ASSERT_EQ(bf16_from_float(from_bits(sign | tie)), s | (low + (low & 1)));
      ASSERT_EQ(bf16_from_float(from_bits(sign | (tie - 1))), s | low);
      ASSERT_EQ(bf16_from_float(from_bits(sign | (tie + 1))), s | (low + 1));
    }
  }
}

TEST(Bf16, IsNearestInDouble) {
  std::mt19937 random(7);
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = from_bits(random() & 0x7fffffffu);
    if (!(x < bf16_to_float(0x7f7f))) continue;
    const std::uint16_t code = bf16_from_float(x);
    const double error = std::fabs(static_cast<double>(x) - bf16_to_float(code));
    const auto low = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16);
    const double to_low = static_cast<double>(x) - bf16_to_float(low);
    const double to_high =
        static_cast<double>(bf16_to_float(static_cast<std::uint16_t>(low + 1))) - x;
    ASSERT_EQ(error, std::fmin(to_low, to_high)) << std::hexfloat << x;
  }
}

TEST(Bf16, NanNeverBecomesInfinity) {
  for (const std::uint32_t payload : {0x1u, 0xffffu, 0x10000u, 0x7fffffu}) {
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const std::uint16_t code = bf16_from_float(from_bits(sign | 0x7f800000u | payload));
      EXPECT_TRUE(std::isnan(bf16_to_float(code)));
      EXPECT_EQ(code >> 15, sign >> 31);
    }
  }
}

}  // namespace
}  // namespace sluice
