// Where experts are changes no bit: permutations, replicas, empty slots, uneven ranks, before and
// after experts have moved.
#include <gmock/gmock.h>

#include <array>
#include <string>

#include "layer/placed_fixture.h"
#include "multirank/run_ranks.h"
#include "sluice/balance.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

class Rebalance : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { files_ = new LayersOnDisk; }
  static void TearDownTestSuite() { delete files_; }
  static LayersOnDisk* files_;
};
LayersOnDisk* Rebalance::files_ = nullptr;

/// 8 experts in slots of every kind; all of them have as many slots. Without a slot to spare these
/// are the identity and permutations.
std::vector<Placement> placements(int num_ranks, int slots) {
  std::vector<Placement> all{Placement::even(8, num_ranks, slots)};
  for (int replicas = 1; replicas <= (slots == 8 ? 2 : 4); ++replicas) {
    all.push_back(random_placement(8, num_ranks, slots, replicas,
                                   static_cast<std::uint64_t>(10 * num_ranks + replicas)));
  }
  return all;
}

TEST_F(Rebalance, NoPlacementChangesABit) {
  std::vector<int> which;
  for (int i = 0; i < kNumLayers; ++i) which.push_back(i);
  for (const int num_ranks : {1, 2, 3, 4, 5}) {
    std::vector<int> slot_counts{24 / num_ranks * num_ranks};
    if (8 % num_ranks == 0) slot_counts.push_back(8);
    run_ranks(num_ranks, [&](Transport& transport) {
      OnOneRank alone(*files_, which);
      const auto backend = make_backend({.num_threads = 1});
      for (const int num_slots : slot_counts) {
        const std::vector<Placement> all = placements(num_ranks, num_slots);
        LayerGroup group = LayerGroup::create(slots_config(num_slots), transport, *backend);
        for (std::size_t i = 0; i < which.size(); ++i) {
          // Loaded into one placement, moved through the others.
          const std::size_t first = i % all.size();
          Layer layer = group.add_layer(files_->checkpoint(), files_->layer(which[i]),
                                        recipes_of_layer(which[i]), {.placements = {all[first]}});
          for (std::size_t n = 0; n < all.size(); ++n) {
            const Placement& placement = all[(first + n) % all.size()];
            if (n > 0) (void)layer.rebalance(placement, {});
            EXPECT_EQ(layer.placement(), placement);
            for (const Mode mode : kModes) {
              const Workload load = tokens_of(transport.rank(), n);
              EXPECT_EQ(forward(layer, mode, load), alone.forward_of(i, mode, load))
                  << num_ranks << " ranks, " << num_slots << " slots, layer " << i << ", placement "
                  << n << ", " << to_string(mode);
            }
          }
        }
        group.check();
      }
    });
  }
}

// At first all at once, later few at a time with calls between.
TEST_F(Rebalance, InTheMiddleOfAThousandRounds) {
  run_ranks(4, [&](Transport& transport) {
    OnOneRank alone(*files_, {0});
    std::array<std::array<std::vector<std::uint16_t>, 4>, 2> expected;
    for (std::size_t m = 0; m < 2; ++m) {
      for (std::size_t s = 0; s < 4; ++s) {
        expected[m][s] = alone.forward_of(0, kModes[m], tokens_of(transport.rank(), s));
      }
    }
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(slots_config(12), transport, *backend);
    Layer layer = group.add_layer(files_->checkpoint(), files_->layer(0), recipes_of_layer(0));
    Placement wanted = layer.placement();
    int wrong = 0, most_received = 0;
    for (std::uint64_t round = 0; round < 1000; ++round) {
      if (round % 25 == 12) wanted = random_placement(8, 4, 12, 3, round);
      const bool at_once = round < 500;
      if (!(layer.placement() == wanted)) {
        const Placement to = at_once ? wanted : placement_toward(layer.placement(), wanted, 1);
        const auto moved = layer.rebalance(to, {}, {.keep_memory = !at_once});
        EXPECT_EQ(group.memory().moving_bytes, at_once ? 0 : moved.extra_bytes);
        if (!at_once) most_received = std::max(most_received, moved.num_received);
      }
      const std::size_t m = round % 2, s = round / 2 % 4;
      wrong += forward(layer, kModes[m], tokens_of(transport.rank(), s)) != expected[m][s];
    }
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(layer.placement(), wanted);
    EXPECT_EQ(most_received, 1);
    EXPECT_GT(layer.rebalance_counters().num_rebalances, 60u);
    (void)layer.rebalance(wanted, {});
    EXPECT_EQ(group.memory().moving_bytes, 0u);
  });
}

// 384 experts over 5 ranks: in both modes, before and after experts move and repeat.
TEST(Placed, ExpertsThatTheRanksDoNotDivide) {
  ModelGeometry geometry = group_geometry();
  geometry.num_experts = 384, geometry.hidden = 128;
  const LayersOnDisk files({.geometry = geometry, .num_layers = 1});
  LayerGroupConfig config = group_config();
  config.geometry = geometry;
  run_ranks(5, [&](Transport& transport) {
    const Workload load =
        make_workload({.num_experts = 384, .num_topk = 3, .hidden = 128, .seed = 3},
                      transport.rank() * kTokens, kTokens);
    const auto backend = make_backend({.num_threads = 1});
    const auto alone_transport = make_inproc_transports(1);
    LayerGroup alone = LayerGroup::create(config, *alone_transport.front(), *backend);
    LayerGroupConfig placed_config = config;
    placed_config.num_slots = 400;
    LayerGroup placed = LayerGroup::create(placed_config, transport, *backend);
    for (const int recipes : {0, 3}) {
      const auto add_to = [&](LayerGroup& group) {
        return group.add_layer(files.checkpoint(), files.layer(0), recipes_of_layer(recipes));
      };
      Layer whole = add_to(alone), layer = add_to(placed);
      for (std::uint64_t move = 0; move < 2; ++move) {
        if (move > 0) (void)layer.rebalance(random_placement(384, 5, 400, 4, 9), {});
        for (const Mode mode : kModes) {
          EXPECT_EQ(forward(layer, mode, load), forward(whole, mode, load))
              << "recipes " << recipes << ", move " << move << ", " << to_string(mode);
        }
      }
    }
    const Engine engine =
        Engine::create({.layer = files.layer(0), .max_tokens_per_rank = 8, .num_slots = 385},
                       files.checkpoint(), transport, *backend);
    EXPECT_EQ(engine.placement(), Placement::even(384, 5, 385));
  });
}

TEST_F(Rebalance, MovesWhatHasToMoveInBoundedMemory) {
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(slots_config(8), transport, *backend);
    Layer layer = group.add_layer(files_->checkpoint(), files_->layer(0), recipes_of_layer(0));
    const std::size_t expert = layer.weight_bytes() / 4;
    // Slots 3 and 4, of two ranks, change places; slots 0 and 1, of one rank, too.
    const auto moved = layer.rebalance(Placement::create(8, 2, {1, 0, 2, 4, 3, 5, 6, 7}), {});
    EXPECT_EQ(moved.num_sent, 1);
    EXPECT_EQ(moved.num_received, 1);
    EXPECT_EQ(moved.sent_bytes, expert);
    EXPECT_EQ(moved.received_bytes, expert);
    EXPECT_EQ(moved.num_copied, transport.rank() == 0 ? 3 : 0);  // One by way of what is aside.
    EXPECT_EQ(moved.extra_bytes, 2 * expert);
    EXPECT_GT(moved.num_rounds, 0);
    const auto nothing = layer.rebalance(layer.placement(), {});
    EXPECT_EQ(nothing.num_rounds + nothing.num_sent + nothing.num_copied, 0);

    const Placement turned = Placement::create(8, 2, {4, 5, 6, 7, 0, 1, 2, 3});
    (void)layer.rebalance(Placement::identity(8, 2), {});
    const int slow = layer.rebalance(turned, {}).num_rounds;
    (void)layer.rebalance(Placement::identity(8, 2), {});
    const auto fast = layer.rebalance(turned, {}, {.max_experts_held = 5});
    EXPECT_LT(fast.num_rounds, slow);
    EXPECT_EQ(fast.extra_bytes, 5 * expert);
    const RebalanceCounters& sum = layer.rebalance_counters();
    EXPECT_EQ(sum.num_rebalances, 5u);
    EXPECT_EQ(sum.num_sent, 1u + 1 + 4 + 4 + 4);
    EXPECT_EQ(sum.num_received, sum.num_sent);
    EXPECT_EQ(sum.sent_bytes, sum.num_sent * expert);
    EXPECT_EQ(sum.received_bytes, sum.num_received * expert);
    EXPECT_GT(sum.seconds, 0);
  });
}

TEST_F(Rebalance, WeightsOfTheCallerGoIntoTheirSlots) {
  run_ranks(2, [&](Transport& transport) {
    OnOneRank alone(*files_, {1});
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(slots_config(12), transport, *backend);
    const Placement placement = random_placement(8, 2, 12, 2, 77);
    const ExpertWeights all = files_->checkpoint().load_experts(files_->layer(1), 0, 8);
    LayerSpec spec{.name = "mine", .weights = all, .placement = placement};
    spec.weights.experts.clear();
    for (const int e : placement.slot_experts(transport.rank())) {
      spec.weights.experts.push_back(all.experts[e == kEmptySlot ? 0u : static_cast<unsigned>(e)]);
    }
    Layer layer = group.add_layer(spec, recipes_of_layer(1));
    const Workload load = tokens_of(transport.rank());
    for (const Mode mode : kModes) {
      EXPECT_EQ(forward(layer, mode, load), alone.forward_of(0, mode, load));
    }
  });
}

TEST_F(Rebalance, RefusesByName) {
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    const auto message = [](const auto& call) -> std::string {
      try {
        call();
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
        return e.what();
      }
      return "nothing";
    };
    LayerGroup fixed = LayerGroup::create(group_config(), transport, *backend);
    Layer still = fixed.add_layer(files_->checkpoint(), files_->layer(0));
    EXPECT_TRUE(still.placement().is_identity());
    EXPECT_THAT(message([&] { (void)still.rebalance(still.placement(), {}); }),
                HasSubstr("its group was made without num_slots"));
    LayerGroup group = LayerGroup::create(slots_config(12), transport, *backend);
    Layer layer = group.add_layer(files_->checkpoint(), files_->layer(0));
    EXPECT_THAT(message([&] { (void)layer.rebalance(Placement::identity(8, 2), {}); }),
                HasSubstr("8 experts in 8 slots of 2 ranks; the group has 8, 12 and 2"));
    EXPECT_THAT(
        message([&] { (void)layer.rebalance(layer.placement(), {}, {.max_experts_held = 1}); }),
        HasSubstr("max_experts_held 1 is less than 2"));
    EXPECT_THAT(message([&] { (void)LayerGroup::create(slots_config(7), transport, *backend); }),
                HasSubstr("num_slots 7 is no multiple of 2 ranks"));
    const Workload load = tokens_of(transport.rank());
    OutputRows y(load);
    Dispatched sent = layer.dispatch_send(Mode::kNormal, load.x_view(), load.routing_view(), {});
    const Placement before = layer.placement(), wanted = random_placement(8, 2, 12, 2, 1);
    EXPECT_THAT(message([&] { (void)layer.rebalance(wanted, {}); }),
                HasSubstr("1 call(s) are between dispatch_send() and finish()"));
    EXPECT_EQ(layer.placement(), before);
    layer.finish(std::move(sent), y.view(), {});  // The call is not lost.
    const auto bits = y.bits();
    {
      const Dispatched dropped =
          layer.dispatch_send(Mode::kNormal, load.x_view(), load.routing_view(), {});
    }
    (void)layer.rebalance(wanted, {});
    EXPECT_EQ(layer.placement(), wanted);
    EXPECT_EQ(forward(layer, Mode::kNormal, load), bits);
  });
}

// What a capacity refuses is named by the model's own number.
TEST_F(Rebalance, ACapacityNamesTheLogicalExpert) {
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroupConfig config = slots_config(8);
    config.low_latency.max_m = 4;
    LayerGroup group = LayerGroup::create(config, transport, *backend);
    Layer layer =
        group.add_layer(files_->checkpoint(), files_->layer(0), {},
                        {.placements = {Placement::create(8, 2, {7, 1, 2, 3, 4, 5, 6, 0})}});
    Workload load = tokens_of(transport.rank());
    for (std::size_t i = 0; i < load.topk_idx.size(); ++i) load.topk_idx[i] = i % 3 == 0 ? 7 : -1;
    try {
      (void)forward(layer, Mode::kLowLatency, load);
      ADD_FAILURE() << "more rows than max_m";
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr("expert 7 would receive 9 rows in slot 0, max_m is 4"));
    }
  });
}

}  // namespace
}  // namespace sluice::testing
