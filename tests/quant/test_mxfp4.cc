// E2M1 and E8M0, derived a second time from their definitions in words.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "sluice/quant.h"

namespace sluice {
namespace {

TEST(E2M1, HigherBitsOfACodeMeanNothing) {
  for (int code = 0; code < 256; ++code) {
    const float low = e2m1_to_float(static_cast<std::uint8_t>(code & 15));
    EXPECT_EQ(e2m1_to_float(static_cast<std::uint8_t>(code)), low) << code;
  }
}

TEST(E2M1, EveryCodeSurvivesARoundTripWithItsSign) {
  for (int code = 0; code < 16; ++code) {
    EXPECT_EQ(e2m1_from_float(e2m1_to_float(static_cast<std::uint8_t>(code))), code);
  }
}

/// The nearest code by distance; of two, the one whose last bit is 0.
int nearest(double magnitude) {
  constexpr std::array kValues = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
  int best = 0;
  for (int i = 1; i < 8; ++i) {
    const double here = std::fabs(kValues[static_cast<std::size_t>(i)] - magnitude);
    const double there = std::fabs(kValues[static_cast<std::size_t>(best)] - magnitude);
    if (here < there || (here == there && i % 2 == 0)) best = i;
  }
  return best;
}

TEST(E2M1, RoundsToNearestTiesToEvenAndSaturates) {
  std::vector<float> magnitudes = {0.0f, 1e-45f, 7.0f, 1000.0f};
  for (float x = 0; x <= 8; x += 0x1p-6f) {  // Every value, every midpoint, and one ulp around.
    magnitudes.push_back(x);
    magnitudes.push_back(std::nextafter(x, 100.0f));
    if (x > 0) magnitudes.push_back(std::nextafter(x, 0.0f));
  }
  for (const float x : magnitudes) {
    EXPECT_EQ(e2m1_from_float(x), nearest(x)) << x;
    EXPECT_EQ(e2m1_from_float(-x), nearest(x) | 8) << x;
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(e2m1_from_float(kInfinity), 7);
  EXPECT_EQ(e2m1_from_float(-kInfinity), 15);
}

TEST(E8M0, IsAPowerOfTwoAndOneNan) {
  for (int code = 0; code < 255; ++code) {
    EXPECT_EQ(e8m0_to_float(static_cast<std::uint8_t>(code)), std::ldexp(1.0f, code - 127)) << code;
  }
  EXPECT_TRUE(std::isnan(e8m0_to_float(0xff)));
}

TEST(Nibbles, EvenElementsAreLow) {
  const std::uint8_t bytes[] = {0x21, 0x43, 0xf0};
  const int expected[] = {1, 2, 3, 4, 0, 15};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(unpack_nibble(bytes, i), expected[i]) << i;
}

}  // namespace
}  // namespace sluice
