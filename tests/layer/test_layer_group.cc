// Layers that share buffers give the bits of layers that have buffers of their own, whatever their
// recipes and in whatever order they are called.
#include <gmock/gmock.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "layer/group_fixture.h"
#include "multirank/run_ranks.h"
#include "support/disagreement.h"
#include "support/modes_and_wires.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class LayerGroupTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { files_ = new LayersOnDisk; }
  static void TearDownTestSuite() { delete files_; }
  static const Checkpoint& checkpoint() { return files_->checkpoint(); }
  static LayerSpec spec(int i, const Transport& transport) {
    return read_layer(checkpoint(), files_->layer(i), transport.rank(), transport.num_ranks());
  }
  /// Recipe i for the low-latency mode, another one for the normal mode.
  static ModeRecipes recipes(int i) {
    const auto all = named_recipes();
    const auto at = [&](int n) { return all[static_cast<std::size_t>(n) % all.size()].recipe; };
    return {.low_latency = at(i), .normal = at(i + 2)};
  }
  /// What layer i gives by itself: an Engine with the same recipes.
  static std::vector<std::uint16_t> alone(int i, Mode mode, const Workload& load,
                                          Transport& transport, Backend& backend) {
    Engine engine = Engine::create({.layer = files_->layer(i),
                                    .low_latency = recipes(i).low_latency,
                                    .normal = recipes(i).normal,
                                    .max_tokens_per_rank = kTokens,
                                    .routed_scaling_factor = 2.5f},
                                   checkpoint(), transport, backend);
    return forward(engine, mode, load);
  }
  static LayersOnDisk* files_;
};
LayersOnDisk* LayerGroupTest::files_ = nullptr;

TEST_F(LayerGroupTest, MixedRecipesGiveTheBitsOfSeparateEngines) {
  ASSERT_EQ(named_recipes().size(), static_cast<std::size_t>(kNumLayers));
  for (const int num_ranks : {1, 2, 4}) {
    run_ranks(num_ranks, [&](Transport& transport) {
      const auto backend = make_backend({.num_threads = 1});
      LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
      std::vector<Layer> layers;
      for (int i = 0; i < kNumLayers; ++i) {
        layers.push_back(group.add_layer(spec(i, transport), recipes(i)));
        // A layer is ready while others are still to come.
        (void)forward(layers.back(), Mode::kNormal, tokens_of(transport.rank(), 9));
      }
      std::vector<std::vector<std::uint16_t>> together;
      for (const std::uint64_t stream : {0u, 1u}) {
        for (int i = 0; i < kNumLayers; ++i) {
          for (const Mode mode : kModes) {
            together.push_back(forward(layers[static_cast<std::size_t>(i)], mode,
                                       tokens_of(transport.rank(), stream)));
          }
        }
      }
      std::size_t at = 0;
      for (const std::uint64_t stream : {0u, 1u}) {
        for (int i = 0; i < kNumLayers; ++i) {
          for (const Mode mode : kModes) {
            EXPECT_EQ(together[at++],
                      alone(i, mode, tokens_of(transport.rank(), stream), transport, *backend))
                << num_ranks << " ranks, layer " << i << ", " << to_string(mode);
          }
        }
      }
    });
  }
}

/// The same experts in memory of the caller's own.
struct CallersWeights {
  explicit CallersWeights(const ExpertWeights& from) : weights(from) {
    weights.storage.reset();
    for (Expert& expert : weights.experts) {
      for (QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
        for (TensorView* view : {&m->codes, &m->scales}) {
          const auto* bytes = view->as<std::byte>();
          auto& copy = memory.emplace_back(bytes, bytes + view->bytes());
          view->data = copy.data();
        }
      }
    }
  }
  ExpertWeights weights;
  std::vector<std::vector<std::byte>> memory;
};

TEST_F(LayerGroupTest, WeightsOfTheCallerGiveTheBitsOfTheCheckpoint) {
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
    const LayerSpec read = spec(1, transport);
    Layer from_checkpoint = group.add_layer(read, {.low_latency = parse_recipe("static")});
    auto own = std::make_unique<CallersWeights>(read.weights);
    Layer from_caller = group.add_layer({.name = "mine", .weights = own->weights},
                                        {.low_latency = parse_recipe("static")});
    own.reset();  // Not needed afterwards.
    EXPECT_EQ(from_caller.name(), "mine");
    for (const Mode mode : kModes) {
      const Workload load = tokens_of(transport.rank());
      EXPECT_EQ(forward(from_caller, mode, load), forward(from_checkpoint, mode, load));
    }
  });
}

TEST_F(LayerGroupTest, StaticScalesAreEachLayersOwn) {
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
    LayerSpec coarse = spec(0, transport);
    coarse.weights.static_scales = StaticScales{.s1 = 0.25f, .s2 = 0.5f};
    LayerSpec fine = coarse;
    fine.weights.static_scales = StaticScales{.s1 = 0.03f, .s2 = 0.5f};  // Other codes, other sums.
    const ModeRecipes is_static{.low_latency = parse_recipe("static")};
    Layer a = group.add_layer(coarse, is_static), b = group.add_layer(fine, is_static);
    EXPECT_EQ(a.recipe(Mode::kLowLatency).s1, 0.25f);
    EXPECT_EQ(b.recipe(Mode::kLowLatency).s1, 0.03f);
    const Workload load = tokens_of(transport.rank());
    const auto first = forward(a, Mode::kLowLatency, load);
    EXPECT_NE(forward(b, Mode::kLowLatency, load), first);
    EXPECT_EQ(forward(a, Mode::kLowLatency, load), first);
  });
}

TEST_F(LayerGroupTest, TwoLayersInFlightInEitherOrder) {
  LayerGroupConfig config = group_config();
  config.num_in_flight = 2;
  for (const int num_ranks : {1, 2}) {
    run_ranks(num_ranks, [&](Transport& transport) {
      const auto backend = make_backend({.num_threads = 1});
      LayerGroup group = LayerGroup::create(config, transport, *backend);
      const ModeRecipes is_static{.low_latency = parse_recipe("static"),
                                  .normal = parse_recipe("bf16-static")};
      Layer a = group.add_layer(spec(0, transport), is_static);
      Layer b = group.add_layer(spec(1, transport), is_static);
      const Workload first = tokens_of(transport.rank(), 0),
                     second = tokens_of(transport.rank(), 1);
      for (const Mode mode : kModes) {
        const auto expected_a = forward(a, mode, first), expected_b = forward(b, mode, second);
        for (const bool a_first : {true, false}) {
          OutputRows y_a(first), y_b(second);
          Dispatched of_a = a.dispatch_send(mode, first.x_view(), first.routing_view(), {});
          Dispatched of_b = b.dispatch_send(mode, second.x_view(), second.routing_view(), {});
          EXPECT_THROW((void)a.dispatch_send(mode, first.x_view(), first.routing_view(), {}),
                       Error);
          if (a_first) a.finish(std::move(of_a), y_a.view(), {});
          b.finish(std::move(of_b), y_b.view(), {});
          if (!a_first) a.finish(std::move(of_a), y_a.view(), {});
          EXPECT_EQ(y_a.bits(), expected_a) << to_string(mode);
          EXPECT_EQ(y_b.bits(), expected_b) << to_string(mode);
        }
      }
    });
  }
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
    return error.what();
  }
  return "(not refused)";
}

TEST_F(LayerGroupTest, AnotherLayersDispatchedIsRefusedAndTheGroupWorksOn) {
  run_ranks(1, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
    Layer a = group.add_layer(spec(0, transport)), b = group.add_layer(spec(1, transport));
    const Workload load = tokens_of(0);
    const auto expected = forward(a, Mode::kNormal, load);
    OutputRows y(load);
    const std::string text = refusal([&] {
      b.finish(a.dispatch_send(Mode::kNormal, load.x_view(), load.routing_view(), {}), y.view(),
               {});
    });
    EXPECT_THAT(text, HasSubstr(b.name()));
    EXPECT_THAT(text, HasSubstr("did not make"));
    EXPECT_EQ(forward(a, Mode::kNormal, load), expected);
  });
}

TEST_F(LayerGroupTest, LayersOutliveTheirGroup) {
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    std::optional<LayerGroup> group = LayerGroup::create(group_config(), transport, *backend);
    std::optional<Layer> gone = group->add_layer(spec(0, transport));
    Layer kept = group->add_layer(spec(1, transport));
    const Workload load = tokens_of(transport.rank());
    const auto expected = forward(kept, Mode::kLowLatency, load);
    gone.reset();
    EXPECT_EQ(group->memory().num_layers, 1);
    group.reset();
    EXPECT_EQ(forward(kept, Mode::kLowLatency, load), expected);
  });
}

TEST_F(LayerGroupTest, ADispatchedMayGoAfterItsLayerAndGroup) {
  run_ranks(1, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    const Workload load = tokens_of(0);
    std::optional<Dispatched> late;
    {
      LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
      Layer layer = group.add_layer(spec(0, transport), recipes(0));
      late = layer.dispatch_send(Mode::kLowLatency, load.x_view(), load.routing_view(), {});
    }
    late.reset();  // Its rows lie in a buffer of the exchange, to which it returns them.
  });
}

TEST_F(LayerGroupTest, AMatrixThatIsNotWhatTheGeometrySaysIsRefusedByName) {
  run_ranks(1, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
    const auto refusal = [&](const auto& change) -> std::string {
      LayerSpec changed = spec(0, transport);
      change(changed.weights.experts[1]);
      try {
        (void)group.add_layer(changed, recipes(0));
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        return error.what();
      }
      return "accepted";
    };
    EXPECT_THAT(refusal([](Expert& e) { e.down = e.gate; }), HasSubstr("expert 1 down"));
    EXPECT_THAT(refusal([](Expert& e) {
                  e.up.codes.shape = Shape{64, 128};
                }),
                HasSubstr("expert 1 up: codes"));
    EXPECT_THAT(refusal([](Expert& e) { e.gate.group_size = 32; }),
                HasSubstr("expert 1 gate: scales"));
    EXPECT_THAT(refusal([](Expert& e) { e.gate.scales.dtype = DType::kInt32; }),
                HasSubstr("expert 1 gate: scales are int32"));
    // Nothing is left behind, and the group works on.
    EXPECT_EQ(group.memory().exchange_bytes, 0u);
    Layer layer = group.add_layer(spec(0, transport), recipes(0));
    (void)forward(layer, Mode::kNormal, tokens_of(0));
  });
}

TEST_F(LayerGroupTest, RanksThatDifferInTheGroupAreNamed) {
  const auto disagree = [](const char* field, auto change) {
    expect_disagreement(try_ranks(3,
                                  [&](Transport& transport) {
                                    const auto backend = make_backend({.num_threads = 1});
                                    LayerGroupConfig config = group_config();
                                    config.geometry.num_experts = 12;
                                    if (transport.rank() == 1) change(config);
                                    (void)LayerGroup::create(config, transport, *backend);
                                  }),
                        field);
  };
  disagree("num_experts", [](auto& c) { c.geometry.num_experts = 24; });
  disagree("num_topk", [](auto& c) { c.geometry.num_topk = 2; });
  disagree("hidden", [](auto& c) { c.geometry.hidden = 128; });
  disagree("intermediate", [](auto& c) { c.geometry.intermediate = 256; });
  disagree("low-latency max_tokens_per_rank",
           [](auto& c) { c.low_latency.max_tokens_per_rank = 6; });
  disagree("low-latency max_m", [](auto& c) { c.low_latency.max_m = 6; });
  disagree("normal max_tokens_per_rank", [](auto& c) { c.normal.max_tokens_per_rank = 0; });
  disagree("routed_scaling_factor", [](auto& c) { c.routed_scaling_factor = 1; });
  disagree("num_in_flight", [](auto& c) { c.num_in_flight = 1; });
}

TEST_F(LayerGroupTest, RanksThatDifferInALayerAreNamedAndTheGroupWorksOn) {
  struct Case {
    const char* field;
    std::function<void(LayerSpec&, ModeRecipes&)> change;
  };
  const Case cases[] = {
      {"layer", [](auto& s, auto&) { s.name = "another"; }},
      {"activation",
       [](auto& s, auto&) { s.weights.geometry.activation = parse_activation("swiglu:limit=10"); }},
      {"checkpoint identity (config and headers)", [](auto& s, auto&) { s.identity += 1; }},
      {"low-latency recipe", [](auto&, auto& r) { r.low_latency = parse_recipe("direct"); }},
      {"normal recipe", [](auto&, auto& r) { r.normal = parse_recipe("direct-bf16"); }},
      {"low-latency recipe", [](auto& s, auto&) { s.weights.static_scales->s1 *= 2; }},
      {"low-latency recipe", [](auto& s, auto&) { s.weights.static_scales->s2 *= 2; }}};
  run_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(group_config(), transport, *backend);
    const ModeRecipes is_static{.low_latency = parse_recipe("static")};
    for (const Case& c : cases) {
      LayerSpec mine = spec(2, transport);
      ModeRecipes recipes = is_static;
      if (transport.rank() == 1) c.change(mine, recipes);
      std::exception_ptr failure;
      try {
        (void)group.add_layer(mine, recipes);
      } catch (...) {
        failure = std::current_exception();
      }
      expect_disagreement({failure}, c.field);
      EXPECT_EQ(group.memory().num_layers, 0);
      EXPECT_EQ(group.memory().exchange_bytes, 0u);
    }
    Layer layer = group.add_layer(spec(0, transport), recipes(0));
    const Workload load = tokens_of(transport.rank());
    EXPECT_EQ(forward(layer, Mode::kNormal, load),
              alone(0, Mode::kNormal, load, transport, *backend));
  });
}

TEST_F(LayerGroupTest, WhatAGroupCannotHoldIsRefused) {
  const auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  const auto refused = [&](auto change) {
    LayerGroupConfig config = group_config();
    change(config);
    return refusal([&] { (void)LayerGroup::create(config, *transports[0], *backend); });
  };
  EXPECT_THAT(refused([](auto& c) { c.low_latency = c.normal = {}; }), HasSubstr("neither mode"));
  EXPECT_THAT(refused([](auto& c) { c.normal.max_tokens_per_rank = -1; }),
              HasSubstr("normal max_tokens_per_rank -1"));
  EXPECT_THAT(refused([](auto& c) { c.normal.max_m = 3; }), HasSubstr("max_m 3"));
  EXPECT_THAT(refused([](auto& c) { c.low_latency = {.max_m = 3}; }), HasSubstr("max_m 3"));
  EXPECT_THAT(refused([](auto& c) { c.geometry.hidden = 100; }), HasSubstr("hidden 100"));
  EXPECT_THAT(refused([](auto& c) { c.geometry.intermediate = 100; }),
              HasSubstr("intermediate 100"));
  EXPECT_THAT(refused([](auto& c) { c.num_in_flight = 9; }), HasSubstr("num_in_flight 9"));
  EXPECT_THAT(refused([](auto& c) { c.num_in_flight = -1; }), HasSubstr("num_in_flight -1"));
}

TEST_F(LayerGroupTest, LayersThatDoNotFitTheGroupAreRefused) {
  const auto transports = make_inproc_transports(1);
  const auto backend = make_backend({.num_threads = 1});
  LayerGroupConfig config = group_config();
  config.normal = {};
  LayerGroup group = LayerGroup::create(config, *transports[0], *backend);
  const auto refused = [&](auto change) {
    LayerSpec s = spec(0, *transports[0]);
    ModeRecipes r;
    change(s, r);
    return refusal([&] { (void)group.add_layer(s, r); });
  };
  EXPECT_THAT(refused([](auto&, auto& r) { r.normal = parse_recipe("static"); }),
              HasSubstr("recipe static is for normal mode"));
  EXPECT_THAT(refused([](auto& s, auto&) { s.weights.first_expert = 2; }),
              HasSubstr("experts [2, 10), rank 0 has experts [0, 8)"));
  EXPECT_THAT(refused([](auto& s, auto&) { s.weights.experts.pop_back(); }),
              HasSubstr("experts [0, 7)"));
  EXPECT_THAT(refused([](auto& s, auto&) { s.weights.geometry.hidden = 512; }),
              HasSubstr("hidden 512"));
  EXPECT_THAT(refused([](auto& s, auto&) { s.weights.geometry.intermediate = 512; }),
              HasSubstr("intermediate 512"));
  EXPECT_THAT(refusal([&] { (void)read_layer(checkpoint(), 99, 0, 1); }), HasSubstr("layer 99"));
  EXPECT_THAT(refusal([&] { (void)read_layer(checkpoint(), files_->layer(0), 0, 3); }),
              HasSubstr("3 ranks"));
  EXPECT_THAT(refusal([&] { (void)read_layer(checkpoint(), files_->layer(0), 2, 2); }),
              HasSubstr("rank 2"));
  Layer layer = group.add_layer(spec(0, *transports[0]));
  const Workload load = tokens_of(0);
  EXPECT_THAT(refusal([&] { (void)forward(layer, Mode::kNormal, load); }),
              HasSubstr("without a recipe for normal mode"));
}

}  // namespace
}  // namespace sluice::testing
