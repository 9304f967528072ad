// What a plan names for several layers is what a group of them takes: buffers once, experts each.
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "layer/group_fixture.h"
#include "sluice/lab/ranks.h"
#include "support/counting.h"

namespace sluice::testing {
namespace {

void expect_equal(const LayerGroupMemory& taken, const LayerGroupMemory& plan) {
  EXPECT_EQ(taken.num_layers, plan.num_layers);
  EXPECT_EQ(taken.codes_bytes, plan.codes_bytes);
  EXPECT_EQ(taken.scales_bytes, plan.scales_bytes);
  EXPECT_EQ(taken.prepared_bytes, plan.prepared_bytes);
  EXPECT_EQ(taken.exchange_bytes, plan.exchange_bytes);
  EXPECT_EQ(taken.scratch_bytes, plan.scratch_bytes);
  EXPECT_EQ(taken.total_bytes(), plan.total_bytes());
}

/// Both modes, one mode, capacities of their own, several dispatches in flight.
std::vector<LayerGroupConfig> configs() {
  const LayerGroupConfig both = group_config();
  LayerGroupConfig decode = both, prefill = both, uneven = both, deep = both;
  decode.normal = {};
  prefill.low_latency = {};
  uneven.low_latency = {.max_tokens_per_rank = 2, .max_m = 3};
  uneven.normal.max_tokens_per_rank = 40;
  deep.num_in_flight = 3;
  return {both, decode, prefill, uneven, deep};
}

TEST(GroupPlan, IsWhatAGroupTakesLayerByLayer) {
  const LayersOnDisk f32;
  const LayersOnDisk bf16(
      {.geometry = group_geometry(), .num_layers = 2, .scale_dtype = DType::kBFloat16});
  // The second layer shares everything, as does the third, whose rows of its own scale lie in
  // expert_y; the fourth needs a wire, the fifth scales of its groups.
  const std::array recipes{parse_recipe("direct"), parse_recipe("direct"),
                           parse_recipe("requant-static"), parse_recipe("bf16-static"),
                           parse_recipe("direct-bf16")};
  for (const LayerGroupConfig& config : configs()) {
    for (const int num_ranks : {1, 2, 4}) {
      auto transports = make_inproc_transports(num_ranks);
      on_every_rank(num_ranks, [&](int r) {
        CountingBackend backend({.num_threads = 1});
        CountingTransport transport(*transports[static_cast<std::size_t>(r)]);
        LayerGroup group = LayerGroup::create(config, transport, backend);
        std::vector<PlannedLayer> planned;
        std::vector<Layer> layers;
        for (std::size_t i = 0; i < recipes.size(); ++i) {
          SCOPED_TRACE(::testing::Message() << num_ranks << " ranks, layer " << i);
          const bool is_bf16 = i == 1;
          const LayersOnDisk& source = is_bf16 ? bf16 : f32;
          PlannedLayer layer{.scale_dtype = is_bf16 ? DType::kBFloat16 : DType::kFloat32};
          if (config.low_latency.max_tokens_per_rank > 0) layer.recipes.low_latency = recipes[i];
          if (config.normal.max_tokens_per_rank > 0) layer.recipes.normal = recipes[i];
          planned.push_back(layer);
          layers.push_back(group.add_layer(
              read_layer(source.checkpoint(), source.layer(static_cast<int>(i) % 2), r, num_ranks),
              layer.recipes));
          const LayerGroupMemory plan =
              LayerGroup::plan_memory(config, planned, Device::Kind::kHost, num_ranks);
          expect_equal(group.memory(), plan);
          EXPECT_EQ(backend.allocated_bytes + transport.window_bytes,
                    plan.exchange_bytes + plan.scratch_bytes);
        }
        const std::size_t all = group.memory().prepared_bytes;
        const std::size_t last = layers.back().weight_bytes();
        layers.pop_back();
        EXPECT_EQ(group.memory().prepared_bytes, all - last);
        EXPECT_EQ(group.memory().num_layers, static_cast<int>(recipes.size()) - 1);
      });
    }
  }
}

/// DeepSeek-R1 at EP8: 58 MoE layers of 256 experts, 128 tokens of each rank, one in flight.
class R1Plan : public ::testing::TestWithParam<Device::Kind> {
 protected:
  static constexpr std::size_t kRanks = 8, kTokens = 128, kHidden = 7168, kIntermediate = 2048;
  static constexpr std::size_t kLocal = 32, kRows = kLocal * kRanks * kTokens;
  static constexpr std::size_t kLayers = 58;

  static LayerGroupMemory plan(const Recipe& recipe, std::size_t layers = kLayers,
                               int num_in_flight = 0) {
    const LayerGroupConfig config{.geometry = preset_geometry("r1-layer"),
                                  .low_latency = {.max_tokens_per_rank = kTokens},
                                  .num_in_flight = num_in_flight};
    const std::vector<PlannedLayer> planned(
        layers, {.recipes = {.low_latency = recipe}, .scale_dtype = DType::kBFloat16});
    return LayerGroup::plan_memory(config, planned, GetParam(), kRanks);
  }
  static bool is_cuda() { return GetParam() == Device::Kind::kCuda; }
};

TEST_P(R1Plan, HoldsTheBuffersOfOneLayer) {
  for (const NamedRecipe& named : named_recipes()) {
    const LayerGroupMemory one = plan(named.recipe, 1), all = plan(named.recipe);
    EXPECT_EQ(all.exchange_bytes, one.exchange_bytes);
    EXPECT_EQ(all.scratch_bytes, one.scratch_bytes);
    EXPECT_EQ(all.prepared_bytes, kLayers * one.prepared_bytes);
  }
}

TEST_P(R1Plan, IsTheFormula) {
  // docs/exchange.md. Offsets within a slot are rounded up to 128 bytes, part by part.
  const std::size_t token = kHidden + kHidden / 128 * 4, home = 2 * kHidden;
  const std::size_t rounding = 10 * 128;
  const LayerGroupMemory direct = plan(parse_recipe("direct"));
  std::size_t exchange = 0, scratch = kRows * (kIntermediate + kIntermediate / 128 * 4);
  if (is_cuda()) {
    exchange = kRows * (token + home + 8) + 8 * kRanks * 256 + 16 * kRanks + 8 * kTokens * 8 +
               12 * kLocal + 2072 + 16;
  } else {
    exchange = 2 * (4 * kRanks * 256 + kRows * (token + 4) + kTokens * 8 * home) + kTokens * token;
    scratch += kRows * home;
  }
  EXPECT_GE(direct.exchange_bytes, exchange);
  EXPECT_LE(direct.exchange_bytes, exchange + 2 * rounding);
  EXPECT_EQ(direct.scratch_bytes, scratch);
  // What the receiver quantizes lies in the rows of expert_y; scales of groups take their own room.
  const LayerGroupMemory requantized = plan(parse_recipe("requant-static"));
  EXPECT_EQ(requantized.exchange_bytes, direct.exchange_bytes);
  EXPECT_EQ(requantized.scratch_bytes, scratch);
  EXPECT_EQ(plan(parse_recipe("bf16-static")).scratch_bytes, scratch);
  EXPECT_EQ(plan(parse_recipe("direct-bf16")).scratch_bytes, scratch + kRows * kHidden / 128 * 4);
}

TEST_P(R1Plan, TakesAtMost1100MegabytesBesideTheWeights) {
  for (const NamedRecipe& named : named_recipes()) {
    // On the CPU a second slot is the default. It spares a wait, and with it bf16 rows take 1.5 GB.
    const bool is_bf16 = named.recipe.wire == WireFormat::kBf16;
    const LayerGroupMemory m = plan(named.recipe, kLayers, is_bf16 ? 1 : 0);
    EXPECT_LE(m.exchange_bytes + m.scratch_bytes, 1'100'000'000u) << named.name;
    EXPECT_GE(m.exchange_bytes + m.scratch_bytes, 770'000'000u) << named.name;
    // 4-bit codes and bf16 scales of 44.0 million weights an expert, 58 times 32 experts.
    const std::size_t weights = kLayers * kLocal * 3 * kHidden * kIntermediate;
    EXPECT_EQ(m.codes_bytes + m.scales_bytes, weights / 2 + weights / 128 * 2);
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, R1Plan,
                         ::testing::Values(Device::Kind::kHost, Device::Kind::kCuda),
                         [](const auto& device) {
                           return device.param == Device::Kind::kHost ? "host" : "cuda";
                         });

TEST(GroupPlan, RefusesWhatAGroupWouldRefuse) {
  const auto refused = [](auto change) {
    LayerGroupConfig config = group_config();
    std::vector<PlannedLayer> layers(2);
    int num_ranks = 2;
    change(config, layers, num_ranks);
    try {
      (void)LayerGroup::plan_memory(config, layers, Device::Kind::kHost, num_ranks);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kInvalidArgument;
    }
    return false;
  };
  EXPECT_FALSE(refused([](auto&, auto&, auto&) {}));
  EXPECT_TRUE(refused([](auto&, auto&, int& ranks) { ranks = 3; }));
  EXPECT_TRUE(refused([](auto&, auto&, int& ranks) { ranks = 0; }));
  EXPECT_TRUE(refused([](auto& c, auto&, auto&) { c.normal = c.low_latency = {}; }));
  EXPECT_TRUE(refused([](auto& c, auto& layers, auto&) {
    c.normal = {};
    layers[1].recipes.normal = parse_recipe("direct");
  }));
  EXPECT_TRUE(refused([](auto&, auto& layers, auto&) { layers[1].group_size = 0; }));
}

}  // namespace
}  // namespace sluice::testing
