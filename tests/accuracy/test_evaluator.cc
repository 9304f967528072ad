// The evaluator against plain loops, and all roundings together against the library's oracle.
#include <gtest/gtest.h>

#include "accuracy/column_gemm.h"
#include "accuracy/evaluator.h"
#include "accuracy_fixture.h"
#include "core/threads.h"
#include "sluice/error.h"

namespace sluice::accuracy {
namespace {

using sluice::testing::accuracy_geometry;
using sluice::testing::naive_multiply;
using sluice::testing::naive_token;
using sluice::testing::WholeLayer;

TEST(ColumnGemm, AgreesWithPlainLoopsForAnyNumberOfColumns) {
  ThreadPool pool(2, available_cores());
  for (const int group : {128, 32}) {
    ModelGeometry geometry = accuracy_geometry();
    geometry.group_size = group;
    const auto source = make_synthetic_source(geometry, 3);
    const SourceMatrix m = source->matrix(1, MatrixRole::kDown);  // [384, 256]
    for (const int count : {1, 7, 8, 9, 17}) {
      Columns<double> wide(256, count);
      Columns<float> narrow(256, count);
      std::vector<std::vector<double>> v(static_cast<std::size_t>(count));
      for (int c = 0; c < count; ++c) {
        const std::vector<float> scales = {0.5f + static_cast<float>(c), 2.0f};
        wide.set_scales(c, scales);
        narrow.set_scales(c, scales);
        for (int k = 0; k < 256; ++k) {
          const int value = (k * 7 + c * 13) % 31 - 15;
          wide.value(k, c) = value;
          narrow.value(k, c) = static_cast<float>(value);
          v[static_cast<std::size_t>(c)].push_back(value *
                                                   static_cast<double>(scales[k < 128 ? 0 : 1]));
        }
      }
      std::vector<double> out(static_cast<std::size_t>(count) * 384), out32(out.size());
      for (const bool original : {false, true}) {
        multiply(m, original, wide, out.data(), pool);
        for (std::size_t c = 0; c < v.size(); ++c) {
          const auto expected = naive_multiply(m, original, v[c]);
          for (std::size_t n = 0; n < 384; ++n) {
            ASSERT_NEAR(out[c * 384 + n], expected[n], 1e-11 * (1 + std::fabs(expected[n])))
                << group << ' ' << count << ' ' << c << ' ' << n;
          }
        }
      }
      multiply(m, false, wide, out.data(), pool);
      multiply(m, false, narrow, out32.data(), pool);
      double largest = 0, worst = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        largest = std::max(largest, std::fabs(out[i]));
        worst = std::max(worst, std::fabs(out[i] - out32[i]));
      }
      EXPECT_LT(worst, largest * 1e-6);
      EXPECT_GT(worst, 0);  // It does round.
    }
  }
}

TEST(PlanRows, OrdersByExpertTokenSlot) {
  Workload tokens;
  tokens.num_tokens = 2, tokens.num_topk = 2, tokens.hidden = 128;
  tokens.topk_idx = {1, 0, -1, 1};
  const RowPlan plan = plan_rows(tokens, 3);
  EXPECT_EQ(plan.expert_begin, (std::vector<int>{0, 1, 3, 3}));
  EXPECT_EQ(plan.row_of, (std::vector<int>{1, 0, -1, 2}));
  tokens.topk_idx = {1, 3, -1, 1};
  EXPECT_THROW((void)plan_rows(tokens, 3), Error);
}

class Evaluated : public ::testing::Test {
 protected:
  std::unique_ptr<LayerSource> source_ = make_synthetic_source(accuracy_geometry(), 5);
  TokenSuite suite_ = make_suite("gaussian", accuracy_geometry(), 4, 5);
  WholeLayer layer_{*source_};
  ThreadPool pool_{1, available_cores()};
  StaticScales scales_{0.012f, 0.02f};
};

TEST_F(Evaluated, WithoutRoundingsItIsThePlainLayer) {
  Evaluator evaluator(*source_, suite_.tokens, pool_);
  const Variant exact{};
  Variant original{};
  original.original_weights = true;
  evaluator.run_gemm1({exact, original}, {});
  evaluator.run_gemm2({exact, original}, 0, {});
  for (const bool use_original : {false, true}) {
    const auto y = evaluator.y(use_original ? original : exact);
    for (std::size_t t = 0; t < 4; ++t) {
      const auto expected = naive_token(layer_, suite_.tokens, t, use_original);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(y[t * expected.size() + i], expected[i], 1e-12) << t << ' ' << i;
      }
    }
  }
}

TEST_F(Evaluated, WithAllRoundingsItIsWithinTheOraclesBoundsForEveryRecipe) {
  for (const NamedRecipe& row : named_recipes()) {
    const LayerRecipe recipe =
        resolve_recipe(row.recipe, Mode::kLowLatency, DispatchDtype::kAuto, scales_, "test");
    Evaluator evaluator(*source_, suite_.tokens, pool_);
    std::vector<Gemm1Row> inputs;
    const auto hidden = static_cast<std::size_t>(suite_.tokens.hidden);
    for (std::size_t t = 0; t < 4; ++t) {
      inputs.push_back(gemm1_row(recipe, &suite_.tokens.x[t * hidden], suite_.tokens.hidden));
    }
    evaluator.set_inputs(gemm1_casts(recipe), std::move(inputs));
    Variant together{};
    together.casts1 = gemm1_casts(recipe), together.float32_sums = true;
    together.cast2 = recipe.gemm2, together.bf16_combine = true;
    evaluator.run_gemm1({together}, {});
    evaluator.run_gemm2({together}, recipe.s2, {});
    const LayerReference reference(layer_.weights, recipe, 1.0f);
    VerifyReport report;
    for (std::size_t t = 0; t < 4; ++t) {
      std::vector<std::uint16_t> y(hidden);
      for (std::size_t i = 0; i < hidden; ++i) {
        const double value = evaluator.y(together)[t * hidden + i];
        y[i] = bf16_from_float(static_cast<float>(value));
        ASSERT_EQ(bf16_to_float(y[i]), value);  // The result is a bf16 number already.
      }
      compare_row(reference.row(&suite_.tokens.x[t * hidden], &suite_.tokens.topk_idx[t * 3],
                                &suite_.tokens.topk_weights[t * 3], 3),
                  y.data(), static_cast<std::int64_t>(t), report);
    }
    EXPECT_TRUE(report.passed()) << row.name << ' ' << report.worst_ratio;
  }
}

TEST_F(Evaluated, ThreadsChangeNoBit) {
  std::vector<std::vector<double>> results;
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads, available_cores());
    Evaluator evaluator(*source_, suite_.tokens, pool);
    Variant sums{};
    sums.float32_sums = true;
    evaluator.run_gemm1({sums, Variant{}}, {});
    evaluator.run_gemm2({sums, Variant{}}, 0, {});
    results.emplace_back(evaluator.y(sums).begin(), evaluator.y(sums).end());
    const auto exact = evaluator.y(Variant{});
    results.back().insert(results.back().end(), exact.begin(), exact.end());
  }
  EXPECT_EQ(results[0], results[1]);
}

}  // namespace
}  // namespace sluice::accuracy
