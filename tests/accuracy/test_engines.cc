// Real engines against their certificate; and a build of `direct` that rounds twice, which neither
// the proof nor the budget lets pass.
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdio>

#include "accuracy_fixture.h"
#include "sluice/lab/synthetic.h"
#include "support/scalar_backend.h"
#include "support/tensor_core_adder.h"

namespace sluice::testing {
namespace {

class Engines : public ::testing::Test {
 protected:
  Engines() {
    write_synthetic_checkpoint({.geometry = accuracy_geometry()}, dir_);
    checkpoint_.emplace(Checkpoint::open(dir_));
    layer_ = checkpoint_->moe_layers().front();
    source_ = make_checkpoint_source(*checkpoint_, layer_, 1);
  }
  ~Engines() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }
  [[nodiscard]] EngineRanks ranks(int num_ranks, Mode mode) const {
    return {.checkpoint = &*checkpoint_, .layer = layer_, .num_ranks = num_ranks, .mode = mode};
  }
  [[nodiscard]] SuiteCertificate run(const char* suite, const AccuracyConfig& config,
                                     std::int64_t num_tokens = 20) const {
    return certify(*source_, make_suite(suite, accuracy_geometry(), num_tokens, 2), config);
  }

  std::filesystem::path dir_ =
      std::filesystem::temp_directory_path() / ("sluice-engines-" + std::to_string(::getpid()));
  std::optional<Checkpoint> checkpoint_;
  int layer_ = 0;
  std::unique_ptr<LayerSource> source_;
};

TEST_F(Engines, HaveTheBytesAndTheErrorOfTheirCertificate) {
  double farthest = 0;
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    const EngineRanks engines = ranks(3, mode);
    AccuracyConfig config;
    config.static_scales = checkpoint_->static_scales(layer_);
    config.engine = &engines;
    for (const char* suite : {"gaussian", "massive", "token-spread", "dead-expert"}) {
      for (const RecipeCertificate& r : run(suite, config).recipes) {
        SCOPED_TRACE(::testing::Message() << suite << ' ' << to_string(r.recipe));
        ASSERT_TRUE(r.engine);
        EXPECT_TRUE(r.engine->same_bytes);
        EXPECT_TRUE(r.engine->passed()) << r.engine->distance << " of " << r.engine->limit;
        EXPECT_NEAR(r.engine->output.relative_l2, r.output.relative_l2, r.engine->distance);
        EXPECT_NEAR(r.engine->output.worst_token_error, r.output.worst_token_error, 0.002);
        ASSERT_TRUE(r.engine->added_percent);
        EXPECT_NEAR(*r.engine->added_percent, *r.added_percent, 0.01);
        farthest = std::max(farthest, r.engine->distance);
      }
    }
  }
  std::printf("farthest engine: %.2g of the output\n", farthest);
}

TEST_F(Engines, RunOnlyWithTheScalesOfTheCertificate) {
  const EngineRanks engines = ranks(2, Mode::kNormal);
  AccuracyConfig config;  // Calibrates: not the checkpoint's scales.
  config.engine = &engines;
  for (const RecipeCertificate& r : run("gaussian", config).recipes) {
    EXPECT_EQ(r.engine.has_value(), r.recipe.gemm2 == Cast::kGroup) << to_string(r.recipe);
  }
}

/// A backend that adds as Hopper's tensor cores do; it says that it is a host.
class TensorCoreBackend final : public ScalarBackend {
  [[nodiscard]] float sum_of_group(const double* a, const double* w, int size) const override {
    return static_cast<float>(TensorCoreAdder{}.sum(a, w, size));
  }
};

TEST_F(Engines, OnTensorCoresStayWithinTheirLimit) {
  EngineRanks engines = ranks(1, Mode::kLowLatency);
  engines.make_backend = [](int, int) { return std::make_unique<TensorCoreBackend>(); };
  AccuracyConfig config;
  config.static_scales = checkpoint_->static_scales(layer_);
  config.engine = &engines;
  config.recipes = {parse_recipe("direct"), parse_recipe("requant-static")};
  for (const char* suite : {"gaussian", "massive", "token-spread"}) {
    double farthest = 0, differ = 0;
    for (const RecipeCertificate& r : run(suite, config, 6).recipes) {
      EXPECT_TRUE(r.engine->same_bytes) << suite << ' ' << to_string(r.recipe);
      farthest = std::max(farthest, r.engine->distance);
      differ = std::max(differ, std::fabs(r.engine->output.relative_l2 - r.output.relative_l2));
    }
    std::printf("%s: distance %.2e, errors differ by %.2e\n", suite, farthest, differ);
    EXPECT_LE(farthest, engine_limit(Device::Kind::kCuda)) << suite;
    EXPECT_GT(farthest, engine_limit(Device::Kind::kHost)) << suite;
    EXPECT_LE(differ, 0.002) << suite;
  }
}

/// The planted fault: group-scaled codes go through a second, three times larger scale.
void round_again(std::span<std::uint8_t> codes, std::span<float> scales) {
  for (std::uint8_t& code : codes) code = e4m3_from_float(e4m3_to_float(code) * (1 / 3.0f));
  for (float& scale : scales) scale *= 3;
}

/// `direct` as it would be if the sender rounded twice. Receivers quantize for several experts at
/// once, the sender for none in particular.
class TwiceRoundingBackend final : public ScalarBackend {
 public:
  void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2, const Fp8Rows& out,
                Stream stream) override {
    ScalarBackend::quantize(x, rows, pow2, out, stream);
    if (rows.num_experts != 1 || !out.scale) return;
    const auto width = static_cast<std::size_t>(out.width);
    const std::size_t count = static_cast<std::size_t>(rows.num_rows(0)) * width;
    round_again({out.codes, count}, {out.scale, count / kActivationGroup});
  }
};

TEST_F(Engines, ADirectThatRoundsTwiceFailsProofAndBudget) {
  EngineRanks engines = ranks(2, Mode::kLowLatency);
  const std::vector<TokenSuite> suites = {make_suite("gaussian", accuracy_geometry(), 20, 2)};
  EXPECT_TRUE(prove_identity(engines, suites).passed());
  engines.make_backend = [](int, int) { return std::make_unique<TwiceRoundingBackend>(); };
  const IdentityProof proof = prove_identity(engines, suites);
  EXPECT_EQ(proof.direct_bf16, proof.definition);
  EXPECT_NE(proof.direct, proof.definition);
  EXPECT_FALSE(proof.passed());

  // The honest certificate disowns that engine; one of the same fault owns it, over the budget.
  AccuracyConfig config;
  config.recipes = {parse_recipe("direct")};
  config.engine = &engines;
  const SuiteCertificate honest = run("gaussian", config);
  EXPECT_FALSE(honest.recipes[0].engine->same_bytes);
  EXPECT_FALSE(honest.recipes[0].engine->passed());
  EXPECT_GT(honest.recipes[0].engine->distance, 10 * honest.recipes[0].engine->limit);
  // The budget is for what runs: the engine's own output is past it, the definition's is not.
  const BudgetVerdict ran = judge_budget({honest}, parse_recipe("direct"), 2);
  EXPECT_FALSE(ran.passed);
  EXPECT_TRUE(ran.is_of_engine);
  EXPECT_GT(ran.worst_percent, 2.5);
  EXPECT_LT(*honest.recipes[0].added_percent, 2);
  config.gemm1 = [](const LayerRecipe& recipe, const std::uint16_t* x, int hidden) {
    Gemm1Row row = gemm1_row(recipe, x, hidden);
    round_again(row.codes, row.scales);
    return row;
  };
  const SuiteCertificate twice = run("gaussian", config);
  EXPECT_TRUE(twice.recipes[0].engine->passed());
  EXPECT_NEAR(twice.recipes[0].activation1.relative_l2, 0.036, 0.0025);
  EXPECT_FALSE(judge_budget({twice}, parse_recipe("direct"), 2).passed);
  engines.make_backend = backends_on(Device::Kind::kHost);
  config.gemm1 = gemm1_row;
  EXPECT_TRUE(judge_budget({run("gaussian", config)}, parse_recipe("direct"), 2).passed);
}

}  // namespace
}  // namespace sluice::testing
