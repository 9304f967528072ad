// The local call: the bits of an engine over any number of ranks, whatever part of the experts is
// here, whatever the other entries say, and however calls share their memory.
#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "local_fixture.h"
#include "sluice/experts.h"
#include "sluice/quant.h"
#include "support/counting.h"

namespace sluice::testing {
namespace {

/// Every combination of fields that backends compute: those with a name, and the others.
std::vector<Recipe> all_recipes() {
  std::vector<Recipe> recipes;
  for (const WireFormat wire : {WireFormat::kBf16, WireFormat::kE4m3Group, WireFormat::kE4m3Pow2,
                                WireFormat::kE4m3Static, WireFormat::kE4m3Token}) {
    for (const Cast gemm1 : {Cast::kNone, Cast::kGroup, Cast::kGroupPow2, Cast::kStatic,
                             Cast::kStaticPow2, Cast::kToken}) {
      for (const Cast gemm2 : {Cast::kGroup, Cast::kStatic, Cast::kStaticPow2}) {
        const Recipe recipe{.wire = wire, .gemm1 = gemm1, .gemm2 = gemm2};
        try {
          check_recipe(recipe);
        } catch (const Error&) {
          continue;
        }
        recipes.push_back(recipe);
      }
    }
  }
  return recipes;
}

TEST_F(LocalExpertsTest, EveryRecipeGivesTheBitsOfAnEngineOverAnyNumberOfRanks) {
  const std::vector<std::vector<std::int64_t>> spreads{{11}, {4, 7}, {0, 3, 1, 7}};
  for (const Recipe& recipe : all_recipes()) {
    SCOPED_TRACE(to_string(recipe));
    LocalExperts layer = LocalExperts::create(config(), weights(), *backend_, recipe);
    const auto y = forward(layer, tokens());
    for (const auto& spread : spreads) {
      EXPECT_EQ(y, engine(recipe, spread)) << spread.size() << " ranks";
    }
  }
}

// What a dispatch brings is e4m3 already: the casts that are left give the same rows.
TEST_F(LocalExpertsTest, TokensInTheWireFormatGiveTheSameBits) {
  const Workload load = tokens();
  const std::int64_t hidden = geometry().hidden;
  int num_checked = 0;
  for (const Recipe& recipe : all_recipes()) {
    if (recipe.wire == WireFormat::kBf16) continue;
    SCOPED_TRACE(to_string(recipe));
    LocalExperts layer = LocalExperts::create(config(), weights(), *backend_, recipe);
    std::vector<std::uint8_t> codes(load.x.size());
    const std::int64_t per_row = scales_per_row(sent_cast(recipe.wire), hidden);
    std::vector<float> scales(static_cast<std::size_t>(kTokens * per_row));
    E4m3Rows out;
    out.pow2 = recipe.wire == WireFormat::kE4m3Pow2;
    out.per_token = recipe.wire == WireFormat::kE4m3Token;
    out.codes.data = codes.data(), out.codes.dtype = DType::kFloat8E4M3;
    out.codes.shape = {kTokens, hidden};
    TensorView x_scale;
    if (recipe.wire == WireFormat::kE4m3Static) {
      out.static_scale = layer.recipe().s1;
    } else {
      out.scale.data = scales.data(), out.scale.dtype = DType::kFloat32;
      out.scale.shape = {kTokens, per_row};
      x_scale = out.scale;
    }
    ExpertBatch rows;
    rows.x = load.x_view();
    quantize(*backend_, rows, out, {});
    std::vector<std::uint16_t> y(load.x.size(), kPoison);
    layer.forward(out.codes, load.routing_view(), view_of(y), {}, x_scale);
    EXPECT_EQ(y, forward(layer, load));
    ++num_checked;
  }
  EXPECT_GE(num_checked, 15);
}

TEST_F(LocalExpertsTest, PartsSkipWhatLivesElsewhere) {
  LocalExperts all = LocalExperts::create(config(), weights(), *backend_);
  for (const auto& [first, count] : {std::pair{0, 6}, {6, 17}, {23, 1}}) {
    SCOPED_TRACE(first);
    LocalExperts part = LocalExperts::create(config(), weights(first, count), *backend_);
    EXPECT_EQ(part.first_expert(), first);
    EXPECT_EQ(part.num_experts(), count);
    const Workload load = tokens();
    // Among all experts the others are left out by -1.
    Workload only = load;
    for (std::int32_t& e : only.topk_idx) e = e >= first && e < first + count ? e : -1;
    EXPECT_EQ(forward(part, load), forward(all, only));
    EXPECT_NE(forward(part, load), forward(all, load));
  }
}

TEST_F(LocalExpertsTest, EveryNumberThatIsNoExpertHereIsSkipped) {
  LocalExperts layer = LocalExperts::create(config(), weights(2, 20), *backend_);
  Workload load = tokens();
  std::vector<std::int64_t> idx(load.topk_idx.begin(), load.topk_idx.end());
  const std::int64_t sentinels[] = {-1,
                                    geometry().num_experts,
                                    geometry().num_experts + 1000,
                                    -7,
                                    std::numeric_limits<std::int64_t>::max(),
                                    std::numeric_limits<std::int64_t>::min(),
                                    std::int64_t{5} + (std::int64_t{1} << 32)};
  for (std::size_t i = 0; i < std::size(sentinels); ++i) {
    idx[3 * i] = sentinels[i], load.topk_idx[3 * i] = -1;
  }
  for (std::size_t k = 0; k < 4; ++k) {  // A token without any.
    idx[40 + k] = geometry().num_experts, load.topk_idx[40 + k] = -1;
  }
  std::vector<std::uint16_t> y(load.x.size(), kPoison);
  Routing routing = load.routing_view();
  routing.topk_idx = {idx.data(), DType::kInt64, routing.topk_idx.shape};
  layer.forward(load.x_view(), routing, view_of(y), {});
  EXPECT_EQ(y, forward(layer, load));
  const auto hidden = geometry().hidden;
  EXPECT_THAT(std::vector(y.end() - hidden, y.end()), ::testing::Each(0));
}

TEST_F(LocalExpertsTest, UnusualCalls) {
  LocalExperts layer = LocalExperts::create(config(), weights(), *backend_);
  EXPECT_THAT(forward(layer, tokens(0)), ::testing::IsEmpty());
  // One token has the bits that it has among others.
  const auto all = forward(layer, tokens());
  const auto hidden = static_cast<std::size_t>(geometry().hidden);
  for (std::size_t t = 0; t < kTokens; ++t) {
    const auto one = forward(layer, tokens(1, static_cast<std::int64_t>(t)));
    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + static_cast<long>(t * hidden)));
  }
  // Every entry to one expert, which then has more rows than there are tokens.
  Workload load = tokens();
  std::ranges::fill(load.topk_idx, 5);
  const auto repeated = forward(layer, load);
  const LayerOutcome ranks =
      run_layer(*checkpoint_, {.tokens = {kTokens},
                               .routed_scaling_factor = kFactor,
                               .max_m = kTokens * geometry().num_topk,
                               .edit = [](int, Workload& w) { std::ranges::fill(w.topk_idx, 5); }});
  EXPECT_EQ(repeated, ranks.all_y());
  // The output may take the place of the input.
  Workload in_place = tokens();
  layer.forward(in_place.x_view(), in_place.routing_view(), view_of(in_place.x), {});
  EXPECT_EQ(in_place.x, all);
}

// Tensor parallelism: every slice is the float64 layer of its own channels, and they add up.
TEST_F(LocalExpertsTest, SlicesOfExpertsAddUp) {
  for (const int group_size : {128, 32}) {
    const ModelGeometry g{.name = "wide",
                          .num_experts = 6,
                          .num_topk = 3,
                          .hidden = 256,
                          .intermediate = 512,
                          .group_size = group_size};
    const TemporaryCheckpoint files(
        {.geometry = g, .format = group_size == 32 ? "kimi-int4" : "w4afp8"});
    const Checkpoint checkpoint = Checkpoint::open(files.path());
    const auto all = [&] {
      return checkpoint.load_experts(checkpoint.moe_layers().front(), 0, g.num_experts);
    };
    const LocalGroupConfig config{.hidden = g.hidden, .intermediate = 512, .max_entries = 15};
    const Workload load =
        make_workload({.num_experts = 6, .num_topk = 3, .hidden = g.hidden, .seed = 3}, 0, 5);
    const auto run = [&](const ExpertWeights& weights, const Recipe& recipe) {
      LocalGroupConfig own = config;
      own.intermediate = weights.geometry.intermediate;
      LocalExperts layer = LocalExperts::create(own, weights, *backend_, recipe);
      std::vector<std::uint16_t> y(load.x.size(), kPoison);
      MutableTensorView view;
      view.data = y.data(), view.dtype = DType::kBFloat16, view.shape = load.x_view().shape;
      layer.forward(load.x_view(), load.routing_view(), view, {});
      const LayerReference reference(weights, layer.recipe(), 1.0f,
                                     error_model(Device::Kind::kHost));
      VerifyReport report;
      for (std::size_t t = 0; t < 5; ++t) {
        compare_row(
            reference.row(&load.x[t * 256], &load.topk_idx[t * 3], &load.topk_weights[t * 3], 3),
            &y[t * 256], static_cast<std::int64_t>(t), report);
      }
      EXPECT_TRUE(report.passed()) << report.worst_ratio;
      return y;
    };
    for (const char* name : {"direct", "static"}) {
      const Recipe recipe = parse_recipe(name);
      if (group_size == 32 && recipe != Recipe{}) continue;  // Published without static scales.
      const auto whole = run(all(), recipe);
      EXPECT_EQ(run(slice_experts(all(), 0, 1), recipe), whole);
      for (const int num_slices : {2, 4}) {
        std::vector<double> sum(whole.size());
        for (int slice = 0; slice < num_slices; ++slice) {
          const auto part = run(slice_experts(all(), slice, num_slices), recipe);
          for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += bf16_to_float(part[i]);
        }
        double error = 0, norm = 0;
        for (std::size_t i = 0; i < sum.size(); ++i) {
          const double y = bf16_to_float(whole[i]);
          error += (sum[i] - y) * (sum[i] - y), norm += y * y;
        }
        // bf16 rounds rows and sums to 2^-9: some of these for each slice.
        EXPECT_LT(std::sqrt(error / norm), 0x1p-7) << name << ", " << num_slices << " slices";
      }
    }
    expect_refused("intermediate 512 cut in 8: slices are multiples of 128",
                   [&] { (void)slice_experts(all(), 0, 8); });
    expect_refused("slice 2 is not in [0, 2)", [&] { (void)slice_experts(all(), 2, 2); });
  }
}

TEST_F(LocalExpertsTest, LayersOfAGroupShareItsScratch) {
  CountingBackend backend({.num_threads = 2});
  LocalGroup group = LocalGroup::create(config(), backend);
  EXPECT_EQ(backend.allocated_bytes, LocalGroup::scratch_bytes(config()));
  EXPECT_EQ(group.memory().scratch_bytes, LocalGroup::scratch_bytes(config()));
  const Recipe fixed = parse_recipe("requant-static");
  std::vector<LocalExperts> layers;
  layers.push_back(group.add_layer(weights(0, 12)));
  layers.push_back(group.add_layer(weights(12, 12), fixed));
  EXPECT_EQ(group.memory().num_layers, 2);
  EXPECT_EQ(group.memory().prepared_bytes, layers[0].weight_bytes() + layers[1].weight_bytes());
  // A layer of its own takes what says which rows its experts have.
  EXPECT_EQ(backend.allocated_bytes - group.memory().scratch_bytes, 2u * 12u * 12u);
  LocalExperts alone = LocalExperts::create(config(), weights(0, 12), *backend_);
  LocalExperts other = LocalExperts::create(config(), weights(12, 12), *backend_, fixed);
  for (int turn = 0; turn < 2; ++turn) {
    EXPECT_EQ(forward(layers[0], tokens()), forward(alone, tokens()));
    EXPECT_EQ(forward(layers[1], tokens()), forward(other, tokens()));
  }
  layers.pop_back();
  EXPECT_EQ(group.memory().num_layers, 1);
  EXPECT_EQ(group.memory().prepared_bytes, layers[0].weight_bytes());
}

TEST_F(LocalExpertsTest, RepackedExpertsAreShared) {
  const Experts experts = Experts::create(weights(), 1, *backend_);
  LocalGroup group = LocalGroup::create(config(), *backend_);
  const auto resolve = [](const char* name) {
    return resolve_recipe(parse_recipe(name), Mode::kNormal, DispatchDtype::kAuto,
                          weights().static_scales, "test");
  };
  LocalExperts direct = group.add_layer(experts, resolve("direct"));
  LocalExperts fixed = group.add_layer(experts, resolve("static"));
  EXPECT_EQ(group.memory().prepared_bytes, experts.weight_bytes());
  EXPECT_EQ(forward(direct, tokens()), engine(parse_recipe("direct"), {kTokens}));
  EXPECT_EQ(forward(fixed, tokens()), engine(parse_recipe("static"), {kTokens}));
  // As the part of a larger model: experts 0 .. 23 are numbered from 100 on.
  LocalExperts shifted = group.add_layer(experts, resolve("direct"), 100);
  Workload load = tokens();
  for (std::int32_t& e : load.topk_idx) e += 100;
  EXPECT_EQ(forward(shifted, load), forward(direct, tokens()));
}

TEST_F(LocalExpertsTest, ReserveMakesRoom) {
  LocalGroup group = LocalGroup::create(config(3), *backend_);
  LocalExperts layer = group.add_layer(weights());
  const auto three = forward(layer, tokens(3));
  group.reserve(1);  // Never less.
  EXPECT_EQ(group.config().max_entries, config(3).max_entries);
  EXPECT_THROW((void)forward(layer, tokens(4)), Error);
  group.reserve(config().max_entries);
  EXPECT_EQ(forward(layer, tokens()), engine({}, {kTokens}));
  EXPECT_EQ(forward(layer, tokens(3)), three);
  // A captured graph could still use the first.
  EXPECT_EQ(group.memory().scratch_bytes,
            LocalGroup::scratch_bytes(config(3)) + LocalGroup::scratch_bytes(config()));
}

TEST_F(LocalExpertsTest, WhatDoesNotFitIsRefused) {
  const auto make = [&](LocalGroupConfig c) { return LocalGroup::create(c, *backend_); };
  LocalGroupConfig wrong = config();
  wrong.hidden = 100;
  expect_refused("hidden 100 is not a positive multiple of 128", [&] { (void)make(wrong); });
  wrong = config(), wrong.max_entries = 0;
  expect_refused("max_entries 0", [&] { (void)make(wrong); });
  wrong = config(), wrong.intermediate = 256;
  expect_refused("intermediate 128, the group has 256",
                 [&] { (void)make(wrong).add_layer(weights()); });
  LocalGroup group = make(config());
  ExpertWeights unscaled = weights();
  unscaled.static_scales.reset();
  expect_refused("needs static activation scales",
                 [&] { (void)group.add_layer(unscaled, parse_recipe("static")); });
  EXPECT_EQ(group.memory().num_layers, 0);

  LocalExperts layer = group.add_layer(weights());
  // Exactly as many entries as there is room for, and one token more.
  (void)forward(layer, tokens(kTokens));
  expect_refused("12 tokens with 4 top-k entries each exceed max_entries 44",
                 [&] { (void)forward(layer, tokens(kTokens + 1)); });
  const Workload load = tokens();
  std::vector<std::uint16_t> y(load.x.size(), kPoison);
  Routing routing = load.routing_view();
  routing.topk_weights.dtype = DType::kBFloat16;
  expect_refused("topk_weights", [&] { layer.forward(load.x_view(), routing, view_of(y), {}); });
  routing = load.routing_view(), routing.topk_idx.dtype = DType::kFloat32;
  expect_refused("topk_idx is float32, expected int32 or int64",
                 [&] { layer.forward(load.x_view(), routing, view_of(y), {}); });
  expect_refused("x_scale is given", [&] {
    layer.forward(load.x_view(), load.routing_view(), view_of(y), {}, load.x_view());
  });
  LocalExperts bf16 = group.add_layer(weights(), parse_recipe("direct-bf16"));
  TensorView codes = load.x_view();
  codes.dtype = DType::kFloat8E4M3;
  expect_refused("recipe direct-bf16 begins with bfloat16",
                 [&] { bf16.forward(codes, load.routing_view(), view_of(y), {}); });
  const auto other = make_backend({.num_threads = 1});
  const Experts elsewhere = Experts::create(weights(), 1, *other);
  expect_refused("made for another backend",
                 [&] { (void)group.add_layer(elsewhere, layer.recipe()); });
  EXPECT_THAT(y, ::testing::Each(kPoison));
}

}  // namespace
}  // namespace sluice::testing
