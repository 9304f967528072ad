// The whole layer against float64: every recipe, both modes, 1 to 8 ranks, and the ugly cases by
// name.
#include <gmock/gmock.h>

#include "layer_fixture.h"

namespace sluice::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Layer : public SmallLayerTest {
 protected:
  static void expect_right(const LayerCase& c) {
    const LayerOutcome outcome = run_layer(*checkpoint_, c);
    const VerifyReport report = verify_all(*checkpoint_, c, outcome);
    EXPECT_TRUE(report.num_rows == 0 || report.passed())
        << report.num_wrong << " wrong; worst: token " << report.worst_token << " element "
        << report.worst_element << " is " << report.worst_actual << ", float64 "
        << report.worst_expected << ", bound " << report.worst_bound;
  }
};

constexpr Mode kModes[] = {Mode::kLowLatency, Mode::kNormal};

/// `total` tokens over `num_ranks`, as uneven as a remainder makes them.
std::vector<std::int64_t> spread(std::int64_t total, int num_ranks) {
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(num_ranks), total / num_ranks);
  tokens.back() += total % num_ranks;
  return tokens;
}

TEST_F(Layer, EveryRecipeInBothModesOverAnyNumberOfRanks) {
  for (const auto& [name, recipe] : named_recipes()) {
    std::vector<std::uint16_t> first;
    for (const Mode mode : kModes) {
      for (const int num_ranks : {1, 2, 3, 4, 8}) {
        SCOPED_TRACE(::testing::Message() << name << ' ' << to_string(mode) << " R=" << num_ranks);
        const LayerCase c{.tokens = spread(11, num_ranks), .mode = mode, .recipe = recipe};
        const LayerOutcome outcome = run_layer(*checkpoint_, c);
        if (first.empty()) {
          first = outcome.all_y();
          const VerifyReport report = verify_all(*checkpoint_, c, outcome);
          EXPECT_TRUE(report.passed()) << report.worst_ratio;
          EXPECT_EQ(report.num_rows, 11);
        }
        // The same bits for the same tokens, whatever the mode and however many ranks.
        EXPECT_EQ(outcome.all_y(), first);
      }
    }
  }
}

TEST_F(Layer, DirectAndDirectBf16FeedGemm1TheSameBytes) {
  for (const Mode mode : kModes) {
    for (const int num_ranks : {1, 3, 4}) {
      const LayerOutcome fp8 = run_layer(
          *checkpoint_,
          {.tokens = spread(13, num_ranks), .mode = mode, .recipe = parse_recipe("direct")});
      const LayerOutcome bf16 = run_layer(
          *checkpoint_,
          {.tokens = spread(13, num_ranks), .mode = mode, .recipe = parse_recipe("direct-bf16")});
      EXPECT_NE(fp8.digest, 0u);
      EXPECT_EQ(fp8.digest, bf16.digest);
      EXPECT_EQ(fp8.all_y(), bf16.all_y());
      // ... and re-quantizing does not.
      const LayerOutcome twice =
          run_layer(*checkpoint_, {.tokens = spread(13, num_ranks),
                                   .mode = mode,
                                   .recipe = parse_recipe("requant-static")});
      EXPECT_NE(twice.digest, fp8.digest);
    }
  }
}

TEST_F(Layer, StaticAndBf16StaticFeedGemm1TheSameBytes) {
  const LayerOutcome fp8 =
      run_layer(*checkpoint_, {.tokens = {3, 4}, .recipe = parse_recipe("static")});
  const LayerOutcome bf16 =
      run_layer(*checkpoint_, {.tokens = {3, 4}, .recipe = parse_recipe("bf16-static")});
  EXPECT_EQ(fp8.digest, bf16.digest);
  EXPECT_EQ(fp8.all_y(), bf16.all_y());
}

// Fields are what a recipe is: combinations without a name run, and are as right as the others.
TEST_F(Layer, RecipesWithoutANameRunByTheirFields) {
  for (const Recipe& recipe : {Recipe{WireFormat::kE4m3Group, Cast::kNone, Cast::kStatic},
                               Recipe{WireFormat::kE4m3Static, Cast::kNone, Cast::kGroup},
                               Recipe{WireFormat::kE4m3Pow2, Cast::kNone, Cast::kGroup},
                               Recipe{WireFormat::kE4m3Pow2, Cast::kStatic, Cast::kStaticPow2},
                               Recipe{WireFormat::kE4m3Token, Cast::kNone, Cast::kStatic},
                               Recipe{WireFormat::kBf16, Cast::kToken, Cast::kGroup},
                               Recipe{WireFormat::kBf16, Cast::kGroupPow2, Cast::kGroup},
                               Recipe{WireFormat::kBf16, Cast::kStaticPow2, Cast::kGroup}}) {
    SCOPED_TRACE(to_string(recipe));
    for (const NamedRecipe& row : named_recipes()) ASSERT_NE(recipe, row.recipe);
    for (const Mode mode : kModes) {
      expect_right({.tokens = {3, 4}, .mode = mode, .recipe = recipe});
    }
    const std::optional<Recipe> other = twin(recipe);
    if (!other) continue;
    const LayerOutcome mine = run_layer(*checkpoint_, {.tokens = {3, 4}, .recipe = recipe});
    const LayerOutcome theirs = run_layer(*checkpoint_, {.tokens = {3, 4}, .recipe = *other});
    EXPECT_EQ(mine.digest, theirs.digest);
    EXPECT_EQ(mine.all_y(), theirs.all_y());
  }
}

TEST_F(Layer, ARecipeThatNothingComputesIsRefusedByItsFields) {
  const Recipe recipe{WireFormat::kE4m3Group, Cast::kGroupPow2, Cast::kGroup};
  const auto failure = failure_of(try_layer(*checkpoint_, {.recipe = recipe}), 0);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kUnsupported);
  EXPECT_THAT(failure->text, ::testing::HasSubstr("gemm1 group-pow2"));
}

TEST_F(Layer, AnOverriddenWireChangesNoBit) {
  const LayerOutcome plain = run_layer(*checkpoint_, {.tokens = {3, 4}});
  const LayerOutcome wide =
      run_layer(*checkpoint_, {.tokens = {3, 4}, .dispatch_dtype = DispatchDtype::kBf16});
  EXPECT_EQ(wide.recipe.wire, WireFormat::kBf16);
  EXPECT_EQ(plain.all_y(), wide.all_y());
}

TEST_F(Layer, NoTokensOnSomeRank) {
  for (const Mode mode : kModes) expect_right({.tokens = {0, 5, 0}, .mode = mode});
}

TEST_F(Layer, NoTokensAnywhere) {
  for (const Mode mode : kModes) {
    const LayerOutcome outcome =
        run_layer(*checkpoint_, {.tokens = {0, 0, 0, 0}, .mode = mode, .max_tokens_per_rank = 4});
    for (const auto& stats : outcome.stats) EXPECT_EQ(stats.flops, 0u);
  }
}

TEST_F(Layer, NoTokensOnSomeRankWithEveryRecipe) {
  for (const auto& [name, recipe] : named_recipes()) {
    for (const Mode mode : kModes) {
      expect_right({.tokens = {2, 0}, .mode = mode, .recipe = recipe});
    }
  }
}

TEST_F(Layer, OneToken) {
  for (const Mode mode : kModes) expect_right({.tokens = {1}, .mode = mode});
}

TEST_F(Layer, EveryTokenToOneExpert) {
  for (const Mode mode : kModes) {
    expect_right({.tokens = {7, 6}, .mode = mode, .routing = RoutingKind::kOneExpert});
  }
}

TEST_F(Layer, AllSlotsEmpty) {
  for (const Mode mode : kModes) {
    const LayerCase c{.tokens = {3, 2}, .mode = mode, .edit = [](int, Workload& load) {
                        std::ranges::fill(load.topk_idx, -1);
                      }};
    const LayerOutcome outcome = run_layer(*checkpoint_, c);
    for (const std::uint16_t bits : outcome.all_y()) ASSERT_EQ(bits, 0);
  }
}

TEST_F(Layer, CapacityExactlyMetAndExceededByOne) {
  // 5 + 4 tokens, all to expert 0: nine rows.
  const LayerCase met{.tokens = {5, 4}, .max_m = 9, .routing = RoutingKind::kOneExpert};
  expect_right(met);
  LayerCase exceeded = met;
  exceeded.max_m = 8;
  const LayerOutcome outcome = try_layer(*checkpoint_, exceeded);
  for (int rank = 0; rank < 2; ++rank) {
    const auto failure = failure_of(outcome, rank);
    ASSERT_TRUE(failure) << "rank " << rank << " was not told";
    EXPECT_EQ(failure->code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(failure->text, HasSubstr("9"));
    EXPECT_THAT(failure->text, HasSubstr("8"));
  }
}

TEST_F(Layer, MoreTokensThanTheCapacityIsRefused) {
  const LayerOutcome outcome = try_layer(*checkpoint_, {.tokens = {5}, .max_tokens_per_rank = 4});
  const auto failure = failure_of(outcome, 0);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(failure->text, HasSubstr("5"));
  EXPECT_THAT(failure->text, HasSubstr("4"));
}

TEST_F(Layer, RoutedScalingFactorIsAppliedOnce) {
  for (const Mode mode : kModes) {
    expect_right({.tokens = {3, 3}, .mode = mode, .routed_scaling_factor = 2.5f});
    // Four is exact in every format: the output must be exactly four times as large.
    const LayerOutcome one = run_layer(*checkpoint_, {.tokens = {3, 3}, .mode = mode});
    const LayerOutcome four =
        run_layer(*checkpoint_, {.tokens = {3, 3}, .mode = mode, .routed_scaling_factor = 4.0f});
    const auto a = one.all_y(), b = four.all_y();
    for (std::size_t i = 0; i < a.size(); ++i) {
      if ((a[i] & 0x7f80) != 0) {
        ASSERT_EQ(b[i], a[i] + (2 << 7)) << i;
      }
    }
  }
}

TEST_F(Layer, ATokensBitsDependOnNoOtherToken) {
  for (const Mode mode : kModes) {
    const LayerOutcome many = run_layer(*checkpoint_, {.tokens = {40}, .mode = mode});
    const LayerOutcome few = run_layer(*checkpoint_, {.tokens = {1}, .mode = mode});
    const auto a = many.all_y(), b = few.all_y();
    EXPECT_TRUE(std::equal(b.begin(), b.end(), a.begin()));
  }
}

TEST_F(Layer, ThreadsChangeNoBit) {
  const LayerOutcome one = run_layer(*checkpoint_, {.tokens = {17}});
  const LayerOutcome two = run_layer(*checkpoint_, {.tokens = {17}, .num_threads = 2});
  EXPECT_EQ(one.all_y(), two.all_y());
}

TEST_F(Layer, ExchangingTwoSlotsChangesNothing) {
  // Two terms add commutatively: their slots may be exchanged.
  const auto keep_two = [](int, Workload& load) {
    for (std::size_t i = 0; i < load.topk_idx.size(); ++i) {
      if (i % 4 >= 2) load.topk_idx[i] = -1;
    }
  };
  const auto swapped = [&](int r, Workload& load) {
    keep_two(r, load);
    for (std::size_t i = 0; i < load.topk_idx.size(); i += 4) {
      std::swap(load.topk_idx[i], load.topk_idx[i + 1]);
      std::swap(load.topk_weights[i], load.topk_weights[i + 1]);
    }
  };
  for (const Mode mode : kModes) {
    EXPECT_EQ(run_layer(*checkpoint_, {.tokens = {5, 4}, .mode = mode, .edit = keep_two}).all_y(),
              run_layer(*checkpoint_, {.tokens = {5, 4}, .mode = mode, .edit = swapped}).all_y());
  }
}

// --- What must be caught. ---

TEST_F(Layer, AWrongElementIsCaught) {
  const LayerCase c{.tokens = {6, 5}};
  LayerOutcome outcome = run_layer(*checkpoint_, c);
  ASSERT_TRUE(verify_all(*checkpoint_, c, outcome).passed());
  // Eight steps of bf16 on one element of one row, about 3 % of its value.
  std::uint16_t* y = outcome.y[1].data();
  std::size_t largest = 0;
  for (std::size_t i = 0; i < 384; ++i) {
    if ((y[i] & 0x7fff) > (y[largest] & 0x7fff)) largest = i;
  }
  y[largest] = static_cast<std::uint16_t>(y[largest] + 8);
  const VerifyReport report = verify_all(*checkpoint_, c, outcome);
  EXPECT_EQ(report.num_wrong, 1);
  EXPECT_EQ(report.worst_token, 6);
  EXPECT_EQ(report.worst_element, static_cast<std::int64_t>(largest));
}

TEST_F(Layer, ARowOfAnotherTokenIsCaught) {
  const LayerCase c{.tokens = {6, 5}};
  LayerOutcome outcome = run_layer(*checkpoint_, c);
  auto& y = outcome.y[0];
  std::copy(y.begin(), y.begin() + 384, y.begin() + 3 * 384);
  EXPECT_FALSE(verify_all(*checkpoint_, c, outcome).passed());
}

TEST_F(Layer, ASwappedWeightIsCaught) {
  // Rank 1's experts come from a checkpoint of another seed; headers and scales' sizes are the
  // same.
  const TemporaryCheckpoint other({.geometry = small_geometry(), .seed = 2});
  const Checkpoint swapped = Checkpoint::open(other.path());
  const LayerCase c{.tokens = {6}, .recipe = parse_recipe("direct")};
  const LayerOutcome outcome = run_layer(swapped, c);
  EXPECT_FALSE(verify_all(*checkpoint_, c, outcome).passed());
}

/// Three ranks refuse, and name who differs from the others and in what.
void expect_all_name(const LayerOutcome& outcome, const char* rank, const char* field) {
  for (int r = 0; r < 3; ++r) {
    const auto failure = failure_of(outcome, r);
    ASSERT_TRUE(failure) << r;
    EXPECT_EQ(failure->code, ErrorCode::kTransport);
    EXPECT_THAT(failure->text, AllOf(HasSubstr(rank), HasSubstr(field)));
  }
}

TEST_F(Layer, AScaleOfARanksOwnIsRefusedBeforeAnythingIsSent) {
  const TemporaryCheckpoint other({.geometry = small_geometry(), .seed = 2});
  const LayerOutcome outcome = try_layer(*checkpoint_, {.tokens = {2, 2, 2},
                                                        .recipe = parse_recipe("static"),
                                                        .own_checkpoint = {{1, other.path()}}});
  expect_all_name(outcome, "rank 1", "checkpoint identity (config and headers)");
}

TEST_F(Layer, RanksWithDifferentCapacitiesAreRefusedByName) {
  const LayerOutcome outcome =
      try_layer(*checkpoint_, {.tokens = {2, 2, 2}, .own_max_tokens = {{2, 7}}});
  expect_all_name(outcome, "rank 2", "max_tokens_per_rank");
}

TEST_F(Layer, ExpertsNotDivisibleByRanksIsRefused) {
  const LayerOutcome outcome = try_layer(*checkpoint_, {.tokens = {1, 1, 1, 1, 1}});
  const auto failure = failure_of(outcome, 0);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(failure->text, HasSubstr("24"));
  EXPECT_THAT(failure->text, HasSubstr("5"));
}

TEST_F(Layer, AModeWithoutRecipeIsRefused) {
  auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  Engine engine = Engine::create({.layer = checkpoint_->moe_layers().front(),
                                  .normal = std::nullopt,
                                  .max_tokens_per_rank = 1},
                                 *checkpoint_, *transports[0], *backend);
  EXPECT_THROW((void)engine.recipe(Mode::kNormal), Error);
}

TEST(LayerWithoutScales, StaticRecipesAreRefusedDirectOnesRun) {
  const TemporaryCheckpoint files({.geometry = small_geometry(), .with_input_scales = false});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  const LayerCase direct{.tokens = {3}};
  EXPECT_TRUE(verify_all(checkpoint, direct, run_layer(checkpoint, direct)).passed());
  const auto failure =
      failure_of(try_layer(checkpoint, {.tokens = {3}, .recipe = parse_recipe("bf16-static")}), 0);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kUnsupported);
  EXPECT_THAT(failure->text, HasSubstr("bf16-static"));
  EXPECT_THAT(failure->text, HasSubstr("input_scale"));
}

TEST(LayerWithBf16Scales, AgreesWithFloat64) {
  const TemporaryCheckpoint files({.geometry = small_geometry(), .scale_dtype = DType::kBFloat16});
  const Checkpoint checkpoint = Checkpoint::open(files.path());
  for (const Mode mode : kModes) {
    const LayerCase c{.tokens = {3, 4}, .mode = mode};
    EXPECT_TRUE(verify_all(checkpoint, c, run_layer(checkpoint, c)).passed());
  }
}

// R1's own width, k = 32, few tokens: hidden 7168 and 3584.
TEST(LayerWide, RealWidthsAndManySlots) {
  for (const int hidden : {3584, 7168}) {
    const TemporaryCheckpoint files({.geometry = {.name = "wide",
                                                  .num_experts = 40,
                                                  .num_topk = 32,
                                                  .hidden = hidden,
                                                  .intermediate = 128}});
    const Checkpoint checkpoint = Checkpoint::open(files.path());
    for (const Mode mode : kModes) {
      const LayerCase c{.tokens = {1, 2}, .mode = mode};
      const VerifyReport report = verify_all(checkpoint, c, run_layer(checkpoint, c));
      EXPECT_TRUE(report.passed()) << hidden << ": " << report.worst_ratio;
    }
  }
}

}  // namespace
}  // namespace sluice::testing
