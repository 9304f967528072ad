// Activation quantization: group, power-of-two, static and re-quantized, against a derivation that
// rounds every operation in double; and the order of roundings, by inputs on which orders differ.
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
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Codes = std::vector<std::uint8_t>;

std::vector<float> gaussian(std::size_t size, std::uint32_t seed, float sigma = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> x(size);
  for (float& v : x) v = bf16_to_float(bf16_from_float(normal(random)));
  return x;
}

TEST(GroupScale, AgreesForEveryLengthAndMagnitude) {
  for (const std::size_t size : {1u, 7u, 32u, 128u}) {
    for (int exponent = -40; exponent <= 40; ++exponent) {
      const auto x =
          gaussian(size, static_cast<std::uint32_t>(exponent + 100), std::ldexp(1.0f, exponent));
      Codes codes(size);
      const derived::Group expected = derived::group(x);
      EXPECT_EQ(quantize_group(x, codes), expected.scale) << size << " 2^" << exponent;
      EXPECT_EQ(codes, expected.codes) << size << " 2^" << exponent;
    }
  }
}

TEST(GroupScale, EveryBf16InputBesideAFixedMaximum) {
  // 512 groups of 128: each holds the maximum, 3, and 127 consecutive bf16 values up to it.
  std::vector<float> x = {3.0f};
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = bf16_to_float(static_cast<std::uint16_t>(bits));
    if (std::fabs(value) <= 3.0f) x.push_back(value);
    if (x.size() < 128 && bits < 0xffff) continue;
    Codes codes(x.size());
    const derived::Group expected = derived::group(x);
    ASSERT_EQ(quantize_group(x, codes), expected.scale);
    ASSERT_EQ(codes, expected.codes) << bits;
    x = {3.0f};
  }
}

TEST(GroupScale, LargestElementGetsTheLargestCode) {
  for (std::uint32_t bits = 0x38d20000u; bits < 0x7f800000u; bits += 0x10000) {
    const float x[] = {std::bit_cast<float>(bits), -std::bit_cast<float>(bits)};
    std::uint8_t codes[2];
    (void)quantize_group(x, codes);
    ASSERT_EQ(codes[0], 0x7e) << std::hexfloat << x[0];
    ASSERT_EQ(codes[1], 0xfe) << std::hexfloat << x[1];
  }
}

TEST(GroupScale, AllZeroGroupsHaveAFiniteScale) {
  std::vector<float> x(128, 0.0f);
  x[5] = -0.0f;
  Codes codes(128, 0xaa), expected(128, 0);
  expected[5] = 0x80;
  const float scale = quantize_group(x, codes);
  EXPECT_EQ(scale, 1e-4f * (1.0f / 448.0f));
  EXPECT_EQ(codes, expected);
  EXPECT_EQ(quantize_group_pow2(x, codes), 0x1p-22f);  // 1e-4 / 448 lies in (2^-23, 2^-22].
  EXPECT_EQ(codes, expected);
}

TEST(GroupScale, AmaxHasAFloor) {
  const float below = std::nextafter(kMinGroupAmax, 0.0f);
  const float above = std::nextafter(kMinGroupAmax, 1.0f);
  EXPECT_EQ(group_amax(std::vector<float>{below}), kMinGroupAmax);
  EXPECT_EQ(group_amax(std::vector<float>{-kMinGroupAmax}), kMinGroupAmax);
  EXPECT_EQ(group_amax(std::vector<float>{-above, 0}), above);
  EXPECT_EQ(group_amax({}), kMinGroupAmax);
  std::uint8_t code;
  (void)quantize_group(std::vector<float>{kMinGroupAmax / 2}, {&code, 1});
  EXPECT_EQ(e4m3_to_float(code), 224.0f);
}

TEST(GroupScale, ASignallingNanIsSkippedToo) {
  std::vector<float> x(128, 0.5f);
  x[3] = 7.0f;
  x[60] = bf16_to_float(0x7f81);
  EXPECT_EQ(group_amax(x), 7.0f);
}

TEST(GroupScale, ANanLeavesItsNeighboursAlone) {
  auto x = gaussian(128, 3);
  Codes clean(128), codes(128);
  x[17] = 0;
  const float scale = quantize_group(x, clean);
  for (const float nan : {kNan, -kNan}) {
    x[17] = nan;
    EXPECT_EQ(quantize_group(x, codes), scale);
    EXPECT_EQ(codes[17], 0x7f);
    codes[17] = clean[17];
    EXPECT_EQ(codes, clean);
  }
}

TEST(GroupScale, AnInfinityStaysVisible) {
  auto x = gaussian(128, 4);
  x[0] = kInfinity, x[99] = -kInfinity;
  Codes codes(128);
  EXPECT_EQ(quantize_group(x, codes), kInfinity);
  for (std::size_t i = 0; i < 128; ++i) {
    EXPECT_EQ(codes[i] & 0x7f, i == 0 || i == 99 ? 0x7f : 0) << i;
  }
}

TEST(Pow2Scale, CeilPow2AtEveryExponent) {
  for (int e = -126; e <= 127; ++e) {
    const float power = std::ldexp(1.0f, e), next = e == 127 ? kInfinity : std::ldexp(1.0f, e + 1);
    EXPECT_EQ(ceil_pow2(power), power);
    EXPECT_EQ(ceil_pow2(std::nextafter(power, kInfinity)), next);
    EXPECT_EQ(ceil_pow2(1.5f * power), next);
    if (e > -126) {
      EXPECT_EQ(ceil_pow2(std::nextafter(power, 0.0f)), power);
    }
  }
}

TEST(Pow2Scale, AgreesAtEveryExponentAndOneUlpAroundIt) {
  // amax = 448 * 2^e is where the scale is 2^e exactly; an ulp more and it doubles.
  for (int e = -20; e <= 100; ++e) {
    const float exact = std::ldexp(448.0f, e);
    for (const float amax : {std::nextafter(exact, 0.0f), exact, std::nextafter(exact, kInfinity),
                             exact * 1.25f, exact * 1.875f}) {
      const std::vector<float> x = {amax, -amax / 3, amax / 1000, 0};
      Codes codes(x.size());
      const derived::Group expected = derived::group_pow2(x);
      EXPECT_EQ(quantize_group_pow2(x, codes), expected.scale) << std::hexfloat << amax;
      EXPECT_EQ(codes, expected.codes) << std::hexfloat << amax;
    }
    std::uint8_t code;
    EXPECT_EQ(quantize_group_pow2({&exact, 1}, {&code, 1}), std::ldexp(1.0f, e));
    EXPECT_EQ(code, 0x7e);
  }
}

TEST(Pow2Scale, AgreesOnRandomGroups) {
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    const auto x =
        gaussian(seed % 2 ? 32 : 128, seed, std::ldexp(1.0f, static_cast<int>(seed % 40) - 20));
    Codes codes(x.size());
    const derived::Group expected = derived::group_pow2(x);
    ASSERT_EQ(quantize_group_pow2(x, codes), expected.scale) << seed;
    ASSERT_EQ(codes, expected.codes) << seed;
  }
}

TEST(StaticScale, EveryBf16InputAtSeveralScales) {
  std::vector<float> x;
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    x.push_back(bf16_to_float(static_cast<std::uint16_t>(bits)));
  }
  Codes codes(x.size());
  for (const float s : {1.0f, 0.0213f, 7.0f, 0x1p-10f, 1e-6f, 300.0f}) {
    quantize_static(x, s, codes);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const float scaled = derived::product(x[i], derived::quotient(1, s));
      ASSERT_EQ(codes[i], derived::e4m3_nearest_quick(scaled)) << s << ' ' << std::hexfloat << x[i];
    }
  }
}

TEST(Requantize, EveryCodeAtManyScales) {
  Codes q(256), codes(256);
  for (std::size_t i = 0; i < 256; ++i) q[i] = static_cast<std::uint8_t>(i);
  std::mt19937 random(11);
  std::uniform_real_distribution<float> exponent(-12, 4);
  for (int trial = 0; trial < 2000; ++trial) {
    const float scale = std::exp2(exponent(random)), s1 = std::exp2(exponent(random));
    requantize(q, scale, s1, codes);
    for (std::size_t i = 0; i < 256; ++i) {
      const auto value = static_cast<float>(derived::e4m3_value(static_cast<int>(i)));
      const float scaled =
          derived::product(derived::product(value, scale), derived::quotient(1, s1));
      ASSERT_EQ(codes[i], derived::e4m3_nearest_quick(scaled)) << i << ' ' << scale << ' ' << s1;
    }
  }
}

TEST(Requantize, EqualScalesChangeNothing) {
  Codes q(256), codes(256);
  for (std::size_t i = 0; i < 256; ++i) q[i] = static_cast<std::uint8_t>(i);
  std::mt19937 random(12);
  std::uniform_real_distribution<float> exponent(-20, 20);
  for (int trial = 0; trial < 2000; ++trial) {
    const float s = std::exp2(exponent(random));
    requantize(q, s, s, codes);
    codes[0xff] = codes[0xff] == 0x7f ? 0xff : 0;  // There is one NaN.
    ASSERT_EQ(codes, q) << s;
  }
}

TEST(Requantize, PowersOfTwoOnlyMoveTheExponent) {
  for (int from = -6; from <= 6; ++from) {
    for (int to = -6; to <= 6; ++to) {
      for (int code = 0; code < 256; ++code) {
        const double exact = std::ldexp(derived::e4m3_value(code), from - to);
        const auto q = static_cast<std::uint8_t>(code);
        std::uint8_t moved;
        requantize({&q, 1}, std::ldexp(1.0f, from), std::ldexp(1.0f, to), {&moved, 1});
        if (std::isnan(exact)) {
          EXPECT_EQ(moved, 0x7f);
        } else if (std::fabs(exact) <= 448 && std::fabs(exact) >= 0x1p-6) {
          EXPECT_EQ(derived::e4m3_value(moved), exact) << code << ' ' << from << ' ' << to;
        } else {
          EXPECT_EQ(moved, derived::e4m3_nearest(exact)) << code << ' ' << from << ' ' << to;
        }
      }
    }
  }
}

TEST(Requantize, FromPow2ToStaticPow2IsOneRounding) {
  // Sent with 2^e per group and shifted to a static power of two: the codes are those of quantizing
  // the input to that static scale directly, wherever the group's step was not the coarser one.
  const auto x = gaussian(128 * 64, 21);
  const float s1 = ceil_pow2(derived::amax(x) / 448);
  Codes direct(x.size()), sent(128), moved(128);
  quantize_static(x, s1, direct);
  std::size_t compared = 0;
  for (std::size_t g = 0; g < x.size(); g += 128) {
    const float scale = quantize_group_pow2({&x[g], 128}, sent);
    ASSERT_LE(scale, s1);
    requantize(sent, scale, s1, moved);
    for (std::size_t i = 0; i < 128; ++i) {
      const double magnitude = std::fabs(derived::e4m3_value(moved[i]));
      if (magnitude < 0x1p-6) continue;  // Subnormal after the shift: bits are lost.
      ASSERT_EQ(moved[i], direct[g + i]) << g + i;
      ++compared;
    }
  }
  EXPECT_GT(compared, x.size() * 99 / 100);
}

// --- The order of roundings ---------------------------------------------------------------------

TEST(Order, MultipliesByTheInverseInsteadOfDividing) {
  // Group: x * (448 / m), not x / scale and not x / m * 448. All three differ somewhere; the
  // derived values above follow the first. This shows that the tests can tell them apart.
  int divided = 0, other_order = 0;
  for (std::uint32_t seed = 0; seed < 2000; ++seed) {
    const auto x = gaussian(128, seed);
    Codes codes(128);
    const float scale = quantize_group(x, codes);
    const float m = derived::amax(x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      divided += codes[i] != derived::e4m3_nearest_quick(derived::quotient(x[i], scale));
      other_order += codes[i] !=
                     derived::e4m3_nearest_quick(derived::product(derived::quotient(x[i], m), 448));
    }
  }
  EXPECT_GT(divided, 0);
  EXPECT_GT(other_order, 0);
}

TEST(Order, RequantizeFormsTheValueFirst) {
  // (q * scale) * (1 / s1), not q * (scale / s1): they differ only next to ties, so the inputs are
  // chosen there.
  std::mt19937 random(5);
  std::uniform_real_distribution<float> scales(0.001f, 0.1f);
  int different = 0;
  for (int trial = 0; trial < 200'000; ++trial) {
    const auto q = static_cast<std::uint8_t>(8 + random() % 119);
    const int below = 8 + static_cast<int>(random() % 118);
    const double tie = (derived::e4m3_value(below) + derived::e4m3_value(below + 1)) / 2;
    const float value = e4m3_to_float(q), scale = scales(random);
    const auto s1 = static_cast<float>(static_cast<double>(value) * scale / tie);
    std::uint8_t code;
    requantize({&q, 1}, scale, s1, {&code, 1});
    const float scaled = derived::product(derived::product(value, scale), derived::quotient(1, s1));
    ASSERT_EQ(code, derived::e4m3_nearest_quick(scaled));
    const float merged = derived::product(value, derived::quotient(scale, s1));
    different += code != derived::e4m3_nearest_quick(merged);
  }
  EXPECT_GT(different, 1000);
}

#if defined(__x86_64__) && defined(__GNUC__)
/// Compiled with fused multiply-add at hand, and with the flags of the library.
__attribute__((target("fma"), noinline)) float multiply_add(float a, float b, float c) {
  return a * b + c;
}

TEST(Order, OurFlagsForbidContraction) {
  if (!__builtin_cpu_supports("fma")) GTEST_SKIP() << "this CPU has no fused multiply-add";
  // (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24; the product alone rounds the last term away.
  const float a = 1 + 0x1p-12f;
  EXPECT_EQ(multiply_add(a, a, -1.0f), 0x1p-11f);
  EXPECT_EQ(std::fma(a, a, -1.0f), 0x1p-11f + 0x1p-24f);
}
#endif

// --- What the recipes cost
// --------------------------------------------------------------------------

struct ActivationErrors {
  double direct = 0, static_only = 0, requantized = 0, pow2 = 0, token = 0;
};

constexpr std::size_t kRows = 256, kHidden = 7168;

/// Relative L2 error, in percent, of the activation that GEMM1 sees. x: [kRows, kHidden]. The
/// static scale is calibrated on the first `calibration_rows`.
ActivationErrors activation_errors(const std::vector<float>& x, std::size_t calibration_rows) {
  const float largest = group_amax(std::span(x).first(calibration_rows * kHidden));
  const float s1 = largest * (1.0f / 448.0f), s1_pow2 = ceil_pow2(s1);
  double norm = 0;
  ActivationErrors sum;
  Codes codes(128), moved(128);
  const auto error = [&](std::span<const float> group, const Codes& q, float scale) {
    double total = 0;
    for (std::size_t i = 0; i < group.size(); ++i) {
      const double e = static_cast<double>(e4m3_to_float(q[i])) * scale - group[i];
      total += e * e;
    }
    return total;
  };
  for (std::size_t g = 0; g < x.size(); g += 128) {
    const std::span<const float> group(&x[g], 128);
    for (const float v : group) norm += static_cast<double>(v) * v;
    const float scale = quantize_group(group, codes);
    sum.direct += error(group, codes, scale);
    requantize(codes, scale, s1, moved);
    sum.requantized += error(group, moved, s1);
    quantize_static(group, s1, moved);
    sum.static_only += error(group, moved, s1);
    requantize(codes, quantize_group_pow2(group, codes), s1_pow2, moved);
    sum.pow2 += error(group, moved, s1_pow2);
  }
  Codes row_codes(kHidden);
  for (std::size_t row = 0; row < kRows; ++row) {
    const std::span<const float> token(&x[row * kHidden], kHidden);
    sum.token += error(token, row_codes, quantize_group(token, row_codes));
  }
  for (double* value : {&sum.direct, &sum.static_only, &sum.requantized, &sum.pow2, &sum.token}) {
    *value = std::sqrt(*value / norm) * 100;
  }
  return sum;
}

TEST(ActivationError, Gaussian) {
  const ActivationErrors e = activation_errors(gaussian(kRows * kHidden, 1), kRows);
  RecordProperty("direct_percent", std::to_string(e.direct));
  RecordProperty("requantized_percent", std::to_string(e.requantized));
  EXPECT_NEAR(e.direct, 2.57, 0.03);
  EXPECT_NEAR(e.static_only, 2.65, 0.03);
  EXPECT_NEAR(e.requantized, 3.70, 0.06);
  EXPECT_NEAR(e.pow2, 2.67, 0.04);
  EXPECT_NEAR(e.token, 2.65, 0.03);
}

/// Eight channels 40 times as large, in three groups of 128. How many share a group matters: the
/// largest of a group is always exact under a scale of the group's own.
std::vector<float> with_outliers(std::uint32_t seed) {
  auto x = gaussian(kRows * kHidden, seed);
  for (std::size_t row = 0; row < kRows; ++row) {
    for (const std::size_t channel : {97, 98, 99, 1889, 1890, 1891, 5473, 5474}) {
      float& v = x[row * kHidden + channel];
      v = bf16_to_float(bf16_from_float(v * 40));
    }
  }
  return x;
}

TEST(ActivationError, EightOutlierChannels) {
  const ActivationErrors e = activation_errors(with_outliers(2), kRows);
  RecordProperty("direct_percent", std::to_string(e.direct));
  RecordProperty("requantized_percent", std::to_string(e.requantized));
  EXPECT_NEAR(e.direct, 1.88, 0.06);
  EXPECT_NEAR(e.static_only, 2.65, 0.06);
  EXPECT_NEAR(e.requantized, 3.25, 0.08);
  EXPECT_NEAR(e.pow2, 2.66, 0.06);
  EXPECT_NEAR(e.token, 2.25, 0.06);
}

TEST(ActivationError, EightOutlierChannelsAndACalibrationThatFellShort) {
  // Outliers of tokens that calibration did not see saturate: only static scales suffer.
  const ActivationErrors e = activation_errors(with_outliers(2), kRows / 4);
  EXPECT_NEAR(e.direct, 1.88, 0.06);
  EXPECT_NEAR(e.requantized, 3.5, 0.2);
  EXPECT_GT(e.requantized, e.static_only + 0.4);
}

}  // namespace
}  // namespace sluice
