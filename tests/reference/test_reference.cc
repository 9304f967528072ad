// The oracle itself: against sums written out by hand, and as a judge that cannot be fooled.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "sluice/lab/reference.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr int kHidden = 256, kIntermediate = 128;

/// Owns the memory of a hand-made layer.
struct HandMade {
  struct Matrix {
    std::vector<std::int8_t> values;
    std::vector<std::uint8_t> codes;
    std::vector<float> scales;
    int n, k;
    Matrix(int n_in, int k_in)
        : values(n_in * k_in),
          codes(n_in * k_in / 2),
          scales(n_in * k_in / 128, 0.5f),
          n(n_in),
          k(k_in) {}
    QuantMatrix view() {
      pack_int4(values, codes);
      return {.codes = {codes.data(), DType::kPackedInt4, Shape{n, k / 2}},
              .scales = {scales.data(), DType::kFloat32, Shape{n, k / 128}},
              .group_size = 128};
    }
    double at(int row, int column) const {
      return values[row * k + column] * static_cast<double>(scales[row * (k / 128) + column / 128]);
    }
  };
  Matrix gate{kIntermediate, kHidden}, up{kIntermediate, kHidden}, down{kHidden, kIntermediate};

  static std::uint32_t next(std::uint32_t& state) { return state = state * 1103515245u + 12345u; }

  HandMade() {
    std::uint32_t seed = 1;
    for (Matrix* m : {&gate, &up, &down}) {
      for (auto& v : m->values)
        v = static_cast<std::int8_t>(static_cast<int>(next(seed) >> 16 & 15) - 8);
      for (auto& s : m->scales) s = 0.001f * static_cast<float>(1 + (next(seed) >> 16 & 15));
    }
  }
  ExpertWeights weights() {
    ExpertWeights w;
    w.geometry = {.name = "hand",
                  .num_experts = 1,
                  .num_topk = 1,
                  .hidden = kHidden,
                  .intermediate = kIntermediate};
    w.experts.push_back({gate.view(), up.view(), down.view()});
    return w;
  }
};

std::vector<std::uint16_t> some_token() {
  std::vector<std::uint16_t> x(kHidden);
  for (int i = 0; i < kHidden; ++i)
    x[i] = bf16_from_float(std::sin(0.37f * i) * (i == 77 ? 30 : 1));
  return x;
}

/// The layer once more, in the plainest way there is, with the formats and nothing else shared.
std::vector<double> by_hand(const HandMade& m, const std::vector<std::uint16_t>& x, bool dynamic,
                            float s1, float s2) {
  std::vector<double> a(kHidden);
  for (int g = 0; g < kHidden / 128; ++g) {
    std::vector<float> values(128);
    std::vector<std::uint8_t> codes(128);
    for (int i = 0; i < 128; ++i) values[i] = bf16_to_float(x[g * 128 + i]);
    float scale = s1;
    if (dynamic)
      scale = quantize_group(values, codes);
    else
      quantize_static(values, s1, codes);
    for (int i = 0; i < 128; ++i)
      a[g * 128 + i] = static_cast<double>(e4m3_to_float(codes[i])) * scale;
  }
  std::vector<float> h(kIntermediate);
  for (int o = 0; o < kIntermediate; ++o) {
    double gate = 0, up = 0;
    for (int k = 0; k < kHidden; ++k) gate += m.gate.at(o, k) * a[k], up += m.up.at(o, k) * a[k];
    h[o] = static_cast<float>(gate / (1 + std::exp(-gate)) * up);
  }
  std::vector<std::uint8_t> codes(kIntermediate);
  float scale = s2;
  if (dynamic)
    scale = quantize_group(h, codes);
  else
    quantize_static(h, s2, codes);
  std::vector<double> y(kHidden, 0.0);
  for (int o = 0; o < kHidden; ++o) {
    for (int k = 0; k < kIntermediate; ++k) {
      y[o] += m.down.at(o, k) * static_cast<double>(e4m3_to_float(codes[k])) * scale;
    }
  }
  return y;
}

TEST(Reference, AgreesWithSumsWrittenOut) {
  HandMade m;
  const auto x = some_token();
  const std::int32_t idx[] = {0};
  const float weight[] = {0.75f};
  for (const bool dynamic : {true, false}) {
    const LayerRecipe recipe =
        resolve_recipe(dynamic ? parse_recipe("direct") : parse_recipe("static"), Mode::kNormal,
                       DispatchDtype::kAuto, StaticScales{.s1 = 0.07f, .s2 = 0.002f}, "layer");
    const ReferenceRow row =
        LayerReference(m.weights(), recipe, 2.0f).row(x.data(), idx, weight, 1);
    const std::vector<double> y = by_hand(m, x, dynamic, 0.07f, 0.002f);
    double norm = 0;
    for (const double v : y) norm += v * v;
    ASSERT_GT(norm, 0);
    for (int i = 0; i < kHidden; ++i) {
      const double expected = 2.0 * 0.75 * y[i];
      // h may round differently in its last float32 bit, which may flip a code: that is the bound's
      // part beyond bf16's.
      EXPECT_NEAR(row.y[i], expected, row.bound[i]) << i;
      EXPECT_LE(row.bound[i], 0.03 * std::sqrt(norm / kHidden) + 0.01 * std::fabs(expected)) << i;
    }
  }
}

// The oracle must not certify an activation that it does not know as SwiGLU.
TEST(Reference, AnUnknownActivationHasNoRow) {
  HandMade m;
  ExpertWeights weights = m.weights();
  weights.geometry.activation = {static_cast<ActivationKind>(7)};
  const LayerReference reference(weights, {Recipe{}, Mode::kNormal}, 1.0f);
  const std::int32_t expert = 0;
  const float weight = 1;
  EXPECT_THROW((void)reference.row(some_token().data(), &expert, &weight, 1), Error);
}

TEST(Reference, EmptySlotsAddNothing) {
  HandMade m;
  const auto x = some_token();
  const std::int32_t idx[] = {-1, -1};
  const float weight[] = {0.75f, 1.0f};
  const LayerRecipe recipe =
      resolve_recipe(parse_recipe("direct"), Mode::kNormal, DispatchDtype::kAuto, {}, "layer");
  const ReferenceRow row = LayerReference(m.weights(), recipe, 1.0f).row(x.data(), idx, weight, 2);
  for (const double v : row.y) EXPECT_EQ(v, 0.0);
}

TEST(CompareRow, NanInfinityAndAbsenceNeverPass) {
  const ReferenceRow row{{1.0, 2.0}, {0.01, 0.01}};
  const auto verdict = [&](float a, float b) {
    VerifyReport report;
    const std::uint16_t y[] = {bf16_from_float(a), bf16_from_float(b)};
    compare_row(row, y, 3, report);
    return report;
  };
  EXPECT_TRUE(verdict(1, 2).passed());
  EXPECT_FALSE(VerifyReport{}.passed());  // No row compared: nothing shown.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const VerifyReport with_nan = verdict(1, nan);
  EXPECT_FALSE(with_nan.passed());
  EXPECT_EQ(with_nan.worst_token, 3);
  EXPECT_EQ(with_nan.worst_element, 1);
  EXPECT_TRUE(std::isinf(with_nan.worst_ratio));
  EXPECT_FALSE(verdict(std::numeric_limits<float>::infinity(), 2).passed());
  // The worst stays the worst when later elements are right.
  EXPECT_EQ(verdict(nan, 2).worst_element, 0);
}

}  // namespace
}  // namespace sluice
