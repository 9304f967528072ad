// Every number of a certificate by its definition, on matrices small enough to do by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "accuracy/casts.h"
#include "accuracy/metrics.h"
#include "sluice/quant.h"

namespace sluice::accuracy {
namespace {

TEST(ErrorSums, ByHand) {
  // Two tokens, three channels. Errors: (0, 3, 0), (0, 0, 4).
  const std::vector<double> reference = {3, 4, 0, 6, 0, 8};
  const std::vector<double> actual = {3, 7, 0, 6, 0, 4};
  const ErrorSums sums(reference, actual, 3);
  EXPECT_DOUBLE_EQ(sums.relative_l2(), std::sqrt(25.0 / 125.0));
  EXPECT_EQ(sums.token_errors(), (std::vector<double>{3.0 / 5, 4.0 / 10}));
  EXPECT_EQ(sums.channel_errors(), (std::vector<double>{0, 3.0 / 4, 4.0 / 8}));
  const ErrorNumbers n = sums.numbers();
  EXPECT_EQ(n.worst_token, 0);
  EXPECT_DOUBLE_EQ(n.worst_token_error, 0.6);
  EXPECT_DOUBLE_EQ(n.p99_token_error, 0.6);
  EXPECT_DOUBLE_EQ(n.p99_channel_error, 0.75);
  EXPECT_NEAR(n.sqnr_db, 10 * std::log10(125.0 / 25.0), 1e-12);
}

TEST(ErrorSums, NothingOverNothingIsNoError) {
  const std::vector<double> zero = {0, 0}, one = {0, 1};
  EXPECT_EQ(ErrorSums(zero, zero, 2).relative_l2(), 0);
  EXPECT_TRUE(std::isinf(ErrorSums(zero, one, 2).relative_l2()));
}

TEST(Percentile, IsTheSmallestValueThatEnoughDoNotExceed) {
  std::vector<double> values;
  for (int i = 100; i >= 1; --i) values.push_back(i);
  EXPECT_EQ(percentile(values, 0.99), 99);
  EXPECT_EQ(percentile(values, 1.0), 100);
  EXPECT_EQ(percentile(values, 0.001), 1);
  EXPECT_EQ(percentile({}, 0.5), 0);
  EXPECT_EQ(percentile({7}, 0.99), 7);
}

/// x as bf16 bits; 128 channels.
std::vector<std::uint16_t> row_of(std::initializer_list<float> head) {
  std::vector<std::uint16_t> x(128, bf16_from_float(1.0f));
  std::size_t i = 0;
  for (const float v : head) x[i++] = bf16_from_float(v);
  return x;
}

TEST(Casts, SaturationAndUnderflowAreCountedOnce) {
  const LayerRecipe fixed{parse_recipe("static"), Mode::kLowLatency, /*s1=*/1.0f};
  // 464 rounds to 448 by itself (a tie, to even); 480 had to be clipped. 2^-10 is half of the
  // smallest code and goes to zero, 2^-9 stays. Zero was zero before.
  const auto x = row_of({480, -480, 464, 448, 0x1p-10f, 0x1p-9f, 0});
  const Gemm1Row row = gemm1_row(fixed, x.data(), 128);
  EXPECT_EQ(row.counts.values, 128u);
  EXPECT_EQ(row.counts.saturated, 2u);
  EXPECT_EQ(row.counts.underflowed, 1u);
  EXPECT_EQ(row.scales, std::vector<float>{1.0f});
}

TEST(Casts, RequantizingCountsValuesOnce) {
  const LayerRecipe twice{parse_recipe("requant-static"), Mode::kLowLatency, /*s1=*/0.5f};
  const auto x = row_of({448, 0x1p-12f});
  const Gemm1Row row = gemm1_row(twice, x.data(), 128);
  EXPECT_EQ(row.counts.values, 128u);
  EXPECT_EQ(row.counts.saturated, 1u);    // 448 / 0.5
  EXPECT_EQ(row.counts.underflowed, 1u);  // Lost by the first cast.
}

TEST(Casts, EveryRecipeByItsDefinition) {
  std::vector<std::uint16_t> x(256);
  std::vector<float> values(256);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = bf16_from_float(std::sin(static_cast<float>(i)) * (i < 128 ? 3.0f : 70.0f));
    values[i] = bf16_to_float(x[i]);
  }
  const auto code = [](float v) { return e4m3_to_float(e4m3_from_float(v)); };
  for (const auto& [label, fields] : named_recipes()) {
    const std::string name = label;
    const LayerRecipe recipe = resolve_recipe(fields, Mode::kNormal, DispatchDtype::kAuto,
                                              StaticScales{0.2f, 0.3f}, "test");
    const Gemm1Row row = gemm1_row(recipe, x.data(), 256);
    std::vector<double> actual(256);
    dequantize(row, actual);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float m = group_amax(std::span(values).subspan(i / 128 * 128, 128));
      const float scale = m * (1 / 448.0f), sent = code(values[i] * (448.0f / m));
      double expected = 0;
      if (name == "direct" || name == "direct-bf16") {
        expected = static_cast<double>(sent) * scale;
      } else if (name == "bf16-static" || name == "static") {
        expected = static_cast<double>(code(values[i] * (1 / 0.2f))) * 0.2f;
      } else if (name == "requant-static") {
        const float again = sent * scale;
        expected = static_cast<double>(code(again * (1 / 0.2f))) * 0.2f;
      } else if (name == "pow2-static") {
        const float s = ceil_pow2(scale), s1 = 0.25f;
        expected = static_cast<double>(code(code(values[i] / s) * s / s1)) * s1;
      } else if (name == "direct-token") {
        const float all = group_amax(values);
        expected = static_cast<double>(code(values[i] * (448.0f / all))) * (all * (1 / 448.0f));
      } else {
        FAIL() << "recipe " << name << " has no definition here";
      }
      ASSERT_EQ(actual[i], expected) << name << " element " << i;
    }
  }
}

}  // namespace
}  // namespace sluice::accuracy
