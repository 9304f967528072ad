// The identity proof through real engines: it holds, and a planted second rounding breaks it.
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>

#include "accuracy_fixture.h"
#include "sluice/lab/synthetic.h"

namespace sluice::testing {
namespace {

class Identity : public ::testing::Test {
 protected:
  Identity() {
    ModelGeometry geometry = accuracy_geometry();
    geometry.intermediate = 128;
    write_synthetic_checkpoint({.geometry = geometry, .with_input_scales = false}, dir_);
    checkpoint_.emplace(Checkpoint::open(dir_));
    suites_ = {make_suite("outliers", geometry, 5, 1), make_suite("dead-expert", geometry, 6, 1)};
  }
  ~Identity() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }
  [[nodiscard]] EngineRanks engines(int ranks, Mode mode) const {
    return {.checkpoint = &*checkpoint_,
            .layer = checkpoint_->moe_layers().front(),
            .num_ranks = ranks,
            .mode = mode};
  }
  [[nodiscard]] IdentityProof prove(int ranks, Mode mode,
                                    const Gemm1Function& gemm1 = gemm1_row) const {
    return prove_identity(engines(ranks, mode), suites_, gemm1);
  }

  std::filesystem::path dir_ =
      std::filesystem::temp_directory_path() / ("sluice-identity-" + std::to_string(::getpid()));
  std::optional<Checkpoint> checkpoint_;
  std::vector<TokenSuite> suites_;
};

TEST_F(Identity, HoldsInBothModesOverAnyNumberOfRanks) {
  std::uint64_t first = 0;
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    for (const int ranks : {1, 2, 3, 6}) {
      const IdentityProof proof = prove(ranks, mode);
      EXPECT_TRUE(proof.passed()) << to_string(mode) << ' ' << ranks;
      EXPECT_EQ(proof.num_tokens, 11);
      if (first == 0) first = proof.direct;
      EXPECT_EQ(proof.direct, first);
    }
  }
}

TEST_F(Identity, ADefinitionThatRoundsTwiceDiffers) {
  const auto twice = [](const LayerRecipe&, const std::uint16_t* x, int hidden) {
    const LayerRecipe requant{parse_recipe("requant-static"), Mode::kLowLatency, /*s1=*/0.01f};
    return gemm1_row(requant, x, hidden);
  };
  const IdentityProof proof = prove(2, Mode::kLowLatency, twice);
  EXPECT_EQ(proof.direct, proof.direct_bf16);
  EXPECT_FALSE(proof.passed());
}

TEST_F(Identity, OneBitOfOneValueIsSeen) {
  const auto flipped = [](const LayerRecipe& recipe, const std::uint16_t* x, int hidden) {
    Gemm1Row row = gemm1_row(recipe, x, hidden);
    row.codes[17] ^= 1;
    return row;
  };
  EXPECT_FALSE(prove(2, Mode::kNormal, flipped).passed());
}

/// Empty entries are ordinary input: a batch of padding alone has no rows, and no proof fails.
TEST_F(Identity, TokensWithoutExpertsHaveNothingToCompare) {
  for (TokenSuite& suite : suites_) std::ranges::fill(suite.tokens.topk_idx, -1);
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    const IdentityProof proof = prove(3, mode);
    EXPECT_EQ(proof.num_rows, 0);
    EXPECT_EQ(proof.direct, 0U);
    EXPECT_TRUE(proof.passed());
  }
}

TEST(IdentityProof, EverythingMustAgreeAndExist) {
  IdentityProof proof;
  EXPECT_FALSE(proof.passed());
  proof.direct = proof.direct_bf16 = proof.definition = 7;
  EXPECT_TRUE(proof.passed());
  proof.direct_bf16 = 8;
  EXPECT_FALSE(proof.passed());
  proof = {.num_rows = 0};
  EXPECT_TRUE(proof.passed());
  proof.direct = proof.direct_bf16 = proof.definition = 7;  // Of rows that there are not.
  EXPECT_FALSE(proof.passed());
  proof = {.num_rows = 5};
  EXPECT_FALSE(proof.passed());
}

}  // namespace
}  // namespace sluice::testing
