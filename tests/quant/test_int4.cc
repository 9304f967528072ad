// Signed int4 packing, and SwiGLU.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "sluice/quant.h"

namespace sluice {
namespace {

TEST(Int4, EveryByteHoldsTwoValuesEvenIndexLow) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto packed = static_cast<std::uint8_t>(byte);
    const int low = byte % 16, high = byte / 16;
    EXPECT_EQ(unpack_int4(&packed, 0), low >= 8 ? low - 16 : low);
    EXPECT_EQ(unpack_int4(&packed, 1), high >= 8 ? high - 16 : high);
  }
}

TEST(Int4, EveryPairOfValuesSurvivesARoundTrip) {
  std::vector<std::int8_t> values;
  for (int a = -8; a < 8; ++a) {
    for (int b = -8; b < 8; ++b) {
      values.push_back(static_cast<std::int8_t>(a));
      values.push_back(static_cast<std::int8_t>(b));
    }
  }
  std::vector<std::uint8_t> codes(values.size() / 2, 0xcd);
  pack_int4(values, codes);
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(unpack_int4(codes.data(), static_cast<std::int64_t>(i)), values[i]) << i;
  }
}

TEST(Int4, EveryByteSurvivesTheOtherRoundTrip) {
  std::vector<std::uint8_t> codes(256), again(256);
  std::vector<std::int8_t> values(512);
  for (std::size_t i = 0; i < 256; ++i) codes[i] = static_cast<std::uint8_t>(i);
  for (std::size_t i = 0; i < 512; ++i) {
    values[i] = unpack_int4(codes.data(), static_cast<std::int64_t>(i));
  }
  pack_int4(values, again);
  EXPECT_EQ(again, codes);
}

TEST(Swiglu, IsWithinAFewUlpOfDouble) {
  for (float gate = -80; gate <= 80; gate += 0.0137f) {
    for (const float up : {-3.5f, 0.25f, 1.0f, 1000.0f}) {
      const double g = gate;
      const double exact = g / (1 + std::exp(-g)) * up;
      const double ulp = std::ldexp(std::fabs(exact), -23);
      ASSERT_NEAR(swiglu(gate, up), exact, 8 * ulp + 1e-38) << gate << ' ' << up;
    }
  }
}

TEST(Swiglu, AtTheEnds) {
  EXPECT_EQ(swiglu(0, 5), 0);
  EXPECT_EQ(swiglu(200, 2), 400);
  EXPECT_EQ(std::fabs(swiglu(-200, 2)), 0);  // exp overflows to infinity, the quotient is -0.
  EXPECT_TRUE(std::isnan(swiglu(std::numeric_limits<float>::quiet_NaN(), 1)));
  EXPECT_TRUE(std::isnan(swiglu(1, std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace sluice
