// What certificates say of layers whose answers are known, and the gate, both ways.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>

#include "accuracy_fixture.h"
#include "sluice/error.h"
#include "sluice/lab/convert.h"
#include "sluice/lab/synthetic.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

/// Wide enough for stable statistics.
ModelGeometry wide_geometry() {
  return {.name = "wide", .num_experts = 4, .num_topk = 2, .hidden = 1024, .intermediate = 256};
}

const RecipeCertificate& of(const SuiteCertificate& suite, const Recipe& recipe) {
  for (const RecipeCertificate& r : suite.recipes) {
    if (r.recipe == recipe) return r;
  }
  throw std::runtime_error("no such recipe");
}

class Certified : public ::testing::Test {
 protected:
  static SuiteCertificate run(const char* suite, const AccuracyConfig& config = {}) {
    return certify(*source_, make_suite(suite, wide_geometry(), 24, 2), config);
  }
  static void SetUpTestSuite() { source_ = make_synthetic_source(wide_geometry(), 2).release(); }
  static void TearDownTestSuite() { delete source_; }
  static LayerSource* source_;
};
LayerSource* Certified::source_ = nullptr;

TEST_F(Certified, GaussianTokensCostWhatTheoryAndSimulationSay) {
  const SuiteCertificate suite = run("gaussian");
  EXPECT_NEAR(of(suite, parse_recipe("direct")).activation1.relative_l2, 0.0257, 0.0007);
  EXPECT_NEAR(of(suite, parse_recipe("static")).activation1.relative_l2, 0.0265, 0.0007);
  EXPECT_NEAR(of(suite, parse_recipe("requant-static")).activation1.relative_l2, 0.0370, 0.0012);
  EXPECT_NEAR(of(suite, parse_recipe("pow2-static")).activation1.relative_l2, 0.0266, 0.0007);
  EXPECT_NEAR(of(suite, parse_recipe("direct-token")).activation1.relative_l2, 0.0264, 0.0009);
  const RecipeCertificate& direct = of(suite, parse_recipe("direct"));
  EXPECT_NEAR(direct.output.relative_l2, 0.0435, 0.004);
  EXPECT_NEAR(*direct.roundings.weights, 0.2, 0.02);
  EXPECT_NEAR(direct.roundings.combine, 0.0022, 0.0006);
  EXPECT_LT(direct.roundings.accumulation, 2e-6);
  EXPECT_EQ(direct.cast1.saturated, 0u);
  EXPECT_EQ(suite.num_tokens, 24);
  EXPECT_EQ(suite.num_rows, 48);
}

TEST_F(Certified, IndependentRoundingsAddInSquares) {
  for (const char* name : {"gaussian", "outliers"}) {
    for (const RecipeCertificate& r : run(name).recipes) {
      EXPECT_NEAR(r.roundings.together / r.roundings.quadrature, 1, 0.15) << to_string(r.recipe);
      const RoundingErrors& e = r.roundings;
      EXPECT_DOUBLE_EQ(e.quadrature, std::hypot(std::hypot(e.activation1, e.activation2),
                                                std::hypot(e.accumulation, e.combine)));
      EXPECT_DOUBLE_EQ(e.together, r.output.relative_l2);
    }
  }
}

/// Outliers lie in three groups, three, three and two. The largest of each group becomes 448
/// exactly under the group's scale, and everything else is as far off as ever. For normal values
/// the mean square of the largest of two is 1 + 2 / pi, of three 1 + 2 sqrt(3) / pi.
double direct_among_outliers(double hidden) {
  const double pi = std::acos(-1.0);
  const double exact = 1600 * (2 * (1 + 2 * std::sqrt(3.0) / pi) + 1 + 2 / pi);
  const double all = hidden - 8 + 8 * 1600;
  return 0.0257 * std::sqrt(1 - exact / all);
}

/// docs/accuracy.md says so of r1-slice: 1.87 %.
TEST(Outliers, CostScalesPerGroupLess) {
  EXPECT_NEAR(direct_among_outliers(7168), 0.0187, 0.00005);
  for (const int hidden : {1024, 7168}) {
    const ModelGeometry g = {.name = "", .num_experts = 4, .num_topk = 2, .hidden = hidden};
    const Workload tokens = make_suite("outliers", g, 400, 2).tokens;
    const LayerRecipe direct{};
    double errors = 0, squares = 0;
    for (std::size_t t = 0; t < 400; ++t) {
      const std::uint16_t* x = &tokens.x[t * static_cast<std::size_t>(hidden)];
      const Gemm1Row row = gemm1_row(direct, x, hidden);
      for (std::size_t i = 0; i < row.codes.size(); ++i) {
        const double v = bf16_to_float(x[i]);
        const double a = static_cast<double>(e4m3_to_float(row.codes[i])) * row.scales[i / 128];
        errors += (a - v) * (a - v), squares += v * v;
      }
    }
    EXPECT_NEAR(std::sqrt(errors / squares), direct_among_outliers(hidden), 0.0004) << hidden;
  }
}

TEST_F(Certified, OutlierChannelsFavourScalesPerGroup) {
  AccuracyConfig config;
  config.static_scales = StaticScales{0.4f, 0.4f};
  const SuiteCertificate suite = run("outliers", config);
  EXPECT_NEAR(of(suite, parse_recipe("direct")).activation1.relative_l2,
              direct_among_outliers(1024), 0.0015);
  EXPECT_GT(of(suite, parse_recipe("static")).activation1.relative_l2, 0.022);
  EXPECT_GT(of(suite, parse_recipe("requant-static")).activation1.relative_l2, 0.028);
}

TEST_F(Certified, ACalibrationThatMissesTheTailIsCatastrophicAndSaysSo) {
  const SuiteCertificate suite = run("token-spread");
  EXPECT_GT(of(suite, parse_recipe("static")).activation1.relative_l2, 0.2);
  EXPECT_GT(of(suite, parse_recipe("static")).output.relative_l2, 0.3);
  EXPECT_GT(of(suite, parse_recipe("static")).cast1.saturated, 0u);
  EXPECT_LT(of(suite, parse_recipe("direct")).output.relative_l2, 0.06);
  EXPECT_LT(suite.safety.headroom1, 1);
  EXPECT_GT(suite.safety.clip_rate1, 0);
  EXPECT_THAT(suite.safety.recommendation, HasSubstr("s1 clips"));
  EXPECT_THAT(suite.safety.recommendation, HasSubstr("direct"));
}

TEST_F(Certified, RecipesThatRoundAlikeAgreeToTheBit) {
  const SuiteCertificate suite = run("student-t");
  const auto& direct = of(suite, parse_recipe("direct"));
  const auto& bf16 = of(suite, parse_recipe("direct-bf16"));
  EXPECT_EQ(direct.token_errors, bf16.token_errors);
  EXPECT_EQ(direct.channel_errors, bf16.channel_errors);
  EXPECT_EQ(of(suite, parse_recipe("static")).token_errors,
            of(suite, parse_recipe("bf16-static")).token_errors);
}

TEST_F(Certified, AddedErrorIsTheRatioOfTheTotals) {
  const SuiteCertificate suite = run("gaussian");
  for (const RecipeCertificate& r : suite.recipes) {
    // Of the measured totals but for chance correlation, and by hand from the single errors.
    const double measured = 100 * (r.total->relative_l2 / r.total_bf16->relative_l2 - 1);
    EXPECT_NEAR(*r.added_percent, measured, 2.0) << to_string(r.recipe);
    const double w = *r.roundings.weights, rest = r.roundings.activation2;
    const double by_hand = 100 * (std::hypot(w, r.roundings.together) / std::hypot(w, rest) - 1);
    EXPECT_NEAR(*r.added_percent, by_hand, 0.3) << to_string(r.recipe);
  }
}

TEST_F(Certified, TheGateBothWays) {
  const std::vector<SuiteCertificate> suites = {run("gaussian"), run("one-hot")};
  const BudgetVerdict easy = judge_budget(suites, parse_recipe("direct"), 100);
  EXPECT_TRUE(easy.passed);
  const double worst = std::max(*of(suites[0], parse_recipe("direct")).added_percent,
                                *of(suites[1], parse_recipe("direct")).added_percent);
  EXPECT_EQ(easy.worst_percent, worst);
  EXPECT_TRUE(judge_budget(suites, parse_recipe("direct"), worst).passed);
  EXPECT_FALSE(judge_budget(suites, parse_recipe("direct"), worst - 1e-9).passed);
  EXPECT_GT(judge_budget(suites, parse_recipe("requant-static"), 2).worst_percent,
            judge_budget(suites, parse_recipe("direct"), 2).worst_percent);
  EXPECT_THROW((void)judge_budget({}, parse_recipe("direct"), 2), Error);
}

/// Whatever comes before or after it, of the definition or of what ran.
TEST_F(Certified, ANumberThatIsNoneFailsTheGate) {
  AccuracyConfig config;
  config.recipes = {parse_recipe("direct")};
  const std::vector<SuiteCertificate> good(3, run("gaussian", config));
  ASSERT_TRUE(judge_budget(good, parse_recipe("direct"), 100).passed);
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const bool is_of_engine : {false, true}) {
      std::vector<SuiteCertificate> suites = good;
      RecipeCertificate& r = suites[i].recipes[0];
      suites[i].name = "spoiled";
      if (is_of_engine) r.engine.emplace();
      (is_of_engine ? r.engine->added_percent : r.added_percent) = std::nan("");
      const BudgetVerdict verdict = judge_budget(suites, parse_recipe("direct"), 100);
      EXPECT_FALSE(verdict.passed) << i;
      EXPECT_EQ(verdict.worst_suite, "spoiled");
      EXPECT_EQ(verdict.is_of_engine, is_of_engine);
    }
  }
}

TEST_F(Certified, ADirectThatRoundsTwiceFailsTheBudget) {
  AccuracyConfig config;
  config.recipes = {parse_recipe("direct")};
  const std::vector<SuiteCertificate> honest = {run("gaussian", config)};
  // The planted fault: codes go through a second, three times larger scale.
  config.gemm1 = [](const LayerRecipe& recipe, const std::uint16_t* x, int hidden) {
    Gemm1Row row = gemm1_row(recipe, x, hidden);
    for (std::size_t i = 0; i < row.codes.size(); ++i) {
      row.codes[i] = e4m3_from_float(e4m3_to_float(row.codes[i]) * (1 / 3.0f));
    }
    for (float& s : row.scales) s *= 3;
    return row;
  };
  const std::vector<SuiteCertificate> twice = {run("gaussian", config)};
  EXPECT_NEAR(twice[0].recipes[0].activation1.relative_l2, 0.036, 0.0025);
  const double budget = 2;
  EXPECT_TRUE(judge_budget(honest, parse_recipe("direct"), budget).passed);
  EXPECT_FALSE(judge_budget(twice, parse_recipe("direct"), budget).passed);
}

TEST_F(Certified, WithoutScalesOnlyStaticRecipesAreRefused) {
  TokenSuite suite = make_suite("gaussian", wide_geometry(), 3, 2);
  suite.calibration = {};
  const SuiteCertificate certificate = certify(*source_, suite, {});
  for (const RecipeCertificate& r : certificate.recipes) {
    const bool is_static = has_static_scale(r.recipe.gemm2);
    EXPECT_EQ(!r.refused.empty(), is_static) << to_string(r.recipe);
  }
  EXPECT_EQ(certificate.safety.origin, "none");
}

TEST_F(Certified, GivenScalesAreHeldAgainstTheTokens) {
  AccuracyConfig config;
  config.recipes = {parse_recipe("static")};
  config.static_scales = StaticScales{1.0f, 1.0f};
  config.expert_scales = {{1, 2, 3}, {}, {}, {}};
  const ScaleSafety safety = run("dead-expert", config).safety;
  EXPECT_EQ(safety.origin, "checkpoint");
  double amax = 0;
  for (const auto& e : safety.experts) amax = std::max(amax, e.amax1);
  EXPECT_EQ(safety.amax1, amax);
  EXPECT_DOUBLE_EQ(safety.headroom1, 448 / amax);
  EXPECT_EQ(safety.clip_rate1, 0);
  EXPECT_EQ(safety.experts[0].scale1, 3);
  EXPECT_EQ(safety.experts[0].scale2, 2);
  EXPECT_EQ(safety.experts[3].rows, 0);  // The dead one.
  EXPECT_EQ(safety.experts[3].amax1, 0);
  EXPECT_THAT(safety.recommendation, HasSubstr("headroom"));
}

/// One token with a huge channel goes to expert 2 alone: only that expert clips, and is named.
TEST_F(Certified, SafetyNamesTheExpertThatClips) {
  TokenSuite suite = make_suite("one-hot", wide_geometry(), 24, 2);
  Workload& tokens = suite.tokens;
  const auto loud =
      static_cast<std::size_t>(std::ranges::find(tokens.topk_idx, 2) - tokens.topk_idx.begin()) / 2;
  tokens.x[loud * 1024 + 5] = bf16_from_float(64);
  AccuracyConfig config;
  config.recipes = {parse_recipe("static")};
  config.static_scales = StaticScales{8.0f / 448, 100.0f};
  config.expert_scales.assign(4, {.w1 = 8.0f / 448, .w2 = 100.0f, .w3 = 4.0f / 448});
  config.expert_scales[0].w1 = 1.0f / 448;  // w3 is the larger one: 4.
  const ScaleSafety safety = certify(*source_, suite, config).safety;
  ASSERT_EQ(safety.experts.size(), 4u);
  const auto& clips = safety.experts[2];
  EXPECT_EQ(clips.amax1, 64);
  EXPECT_DOUBLE_EQ(clips.clip_rate1, 1.0 / (1024.0 * static_cast<double>(clips.rows)));
  EXPECT_NEAR(clips.own_headroom1, 8.0 / 64, 1e-6);
  EXPECT_EQ(clips.clip_rate2, 0);
  for (const std::size_t e : {0, 1, 3}) {
    EXPECT_EQ(safety.experts[e].clip_rate1, 0);
    EXPECT_GT(safety.experts[e].rows, 0);
  }
  EXPECT_NEAR(safety.experts[0].own_headroom1, 4 / safety.experts[0].amax1, 1e-6);
  EXPECT_NEAR(safety.experts[1].own_headroom2, 448 * 100 / safety.experts[1].amax2, 0.01);
  EXPECT_DOUBLE_EQ(safety.clip_rate1, 1.0 / (24 * 1024));
  EXPECT_THAT(safety.recommendation, HasSubstr("most in expert 2 ("));
  EXPECT_THAT(safety.recommendation, HasSubstr("at most 8.0 times as much (expert 2)"));
  EXPECT_THAT(safety.recommendation, HasSubstr("raise w1, w3.input_scale to 0.1429 or more"));
}

TEST_F(Certified, TokensThatDoNotFitAreRefused) {
  ModelGeometry other = wide_geometry();
  other.hidden = 512;
  EXPECT_THROW((void)certify(*source_, make_suite("gaussian", other, 2, 1), {}), Error);
  EXPECT_THROW((void)certify(*source_, make_suite("gaussian", wide_geometry(), 0, 1), {}), Error);
}

TEST(SyntheticSource, QuantizesItsOriginalsWithAmaxOverSeven) {
  const auto source = make_synthetic_source(accuracy_geometry(), 1);
  const SourceMatrix m = source->matrix(2, MatrixRole::kUp);
  double sum = 0, squares = 0, fourth = 0;
  const std::int64_t n = m.quantized.n(), k = m.quantized.k();
  for (std::int64_t row = 0; row < n; ++row) {
    for (std::int64_t g = 0; g < k / 128; ++g) {
      const float scale = m.quantized.scales.as<float>()[row * (k / 128) + g];
      float amax = 0;
      for (std::int64_t i = g * 128; i < (g + 1) * 128; ++i) {
        const float w = m.original[row * k + i];
        amax = std::max(amax, std::fabs(w));
        ASSERT_LE(std::fabs(w - weight_at(m, false, row, i)), scale * 0.5001f);
        const double z = w * std::sqrt(static_cast<double>(k));
        sum += z, squares += z * z, fourth += z * z * z * z;
      }
      ASSERT_FLOAT_EQ(scale, amax / 7);
    }
  }
  const auto count = static_cast<double>(n * k);
  EXPECT_NEAR(sum / count, 0, 0.02);
  EXPECT_NEAR(squares / count, 1, 0.03);
  EXPECT_NEAR(fourth / count, 3, 0.1);
}

TEST(CheckpointSource, OriginalsRoundToTheCodes) {
  const auto dir =
      std::filesystem::temp_directory_path() / ("sluice-accuracy-" + std::to_string(::getpid()));
  write_synthetic_checkpoint({.geometry = accuracy_geometry()}, dir);
  const Checkpoint checkpoint = Checkpoint::open(dir);
  const auto source = make_checkpoint_source(checkpoint, checkpoint.moe_layers().front(), 9);
  const SourceMatrix m = source->matrix(1, MatrixRole::kGate);
  double error = 0;
  const std::int64_t k = m.quantized.k();
  for (std::int64_t row = 0; row < m.quantized.n(); ++row) {
    for (std::int64_t i = 0; i < k; ++i) {
      const double scale = m.quantized.scales.as<float>()[row * (k / 128) + i / 128];
      const double d = (m.original[row * k + i] - weight_at(m, false, row, i)) / scale;
      ASSERT_LE(std::fabs(d), 0.5001);
      error += d * d;
    }
  }
  EXPECT_NEAR(error / static_cast<double>(m.quantized.n() * k), 1.0 / 12, 0.003);
  std::filesystem::remove_all(dir);
}

/// A checkpoint beside the one it was quantized from.
TEST(CheckpointSource, HasTheWeightsOfItsOriginal) {
  const auto dir =
      std::filesystem::temp_directory_path() / ("sluice-original-" + std::to_string(::getpid()));
  for (const char* format : {"bf16", "fp8-block"}) {
    write_synthetic_checkpoint({.geometry = accuracy_geometry(), .format = format}, dir / format);
    const ConvertReport made = convert_checkpoint({.from = dir / format,
                                                   .to = dir / (std::string(format) + "-int4"),
                                                   .format = "w4afp8",
                                                   .scale_rule = ScaleRule::kAmax7});
    const Checkpoint original = Checkpoint::open(dir / format);
    const Checkpoint checkpoint = Checkpoint::open(dir / (std::string(format) + "-int4"));
    const int layer = checkpoint.moe_layers().front();
    const auto source = make_checkpoint_source(checkpoint, layer, 9, &original);
    EXPECT_THAT(source->original_kind(), HasSubstr(std::string(format) + ')'));
    double errors = 0, squares = 0;
    std::vector<float> w;
    for (int e = 0; e < 6; ++e) {
      for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
        const SourceMatrix m = source->matrix(e, role);
        w.resize(static_cast<std::size_t>(m.quantized.n() * m.quantized.k()));
        original.load_floats(layer, e, role, w);
        ASSERT_TRUE(std::equal(w.begin(), w.end(), m.original));
        for (std::size_t i = 0; i < w.size(); ++i) {
          const auto k = static_cast<std::size_t>(m.quantized.k());
          const double d =
              static_cast<double>(w[i]) - weight_at(m, false, static_cast<std::int64_t>(i / k),
                                                    static_cast<std::int64_t>(i % k));
          errors += d * d, squares += static_cast<double>(w[i]) * w[i];
        }
      }
    }
    // What convert said of the same weights.
    EXPECT_NEAR(std::sqrt(errors / squares), made.relative_error, 1e-8);
    EXPECT_THROW(original.load_floats(layer, 6, MatrixRole::kGate, w), Error);
    EXPECT_THROW(original.load_floats(layer, 0, MatrixRole::kGate, std::span(w).first(7)), Error);
    EXPECT_THROW(original.load_floats(77, 0, MatrixRole::kDown, w), Error);
  }
  ModelGeometry wider = accuracy_geometry();
  wider.intermediate = 384;
  write_synthetic_checkpoint({.geometry = wider}, dir / "wider");
  const Checkpoint other = Checkpoint::open(dir / "wider");
  const Checkpoint checkpoint = Checkpoint::open(dir / "bf16-int4");
  EXPECT_THROW((void)make_checkpoint_source(checkpoint, 3, 9, &other), Error);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace sluice::testing
