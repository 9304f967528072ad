// Ranks whose calls of a group's layers differ: another layer, another mode, another recipe, a call
// that one rank alone refused. Whatever they do, no output is wrong without an error.
#include <gmock/gmock.h>

#include <fmt/core.h>

#include <chrono>
#include <functional>

#include "layer/group_fixture.h"
#include "multirank/run_ranks.h"
#include "support/modes_and_wires.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int kRanks = 3;

class DifferentLayersTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    ModelGeometry geometry = group_geometry();
    geometry.num_experts = 12;
    files_ = new LayersOnDisk({.geometry = geometry, .num_layers = 2});
  }
  static void TearDownTestSuite() { delete files_; }

  struct Rank {
    int rank;
    LayerGroup& group;
    Layer a, b;
    Workload load;
    std::vector<std::uint16_t> y_a, y_b;  ///< What the layers give, in either mode.
  };
  /// body(rank) after right calls of both layers in both modes; every rank's failure.
  static std::vector<std::exception_ptr> after_right_calls(std::chrono::milliseconds timeout,
                                                           const ModeRecipes& recipes_b,
                                                           const std::function<void(Rank&)>& body) {
    return try_ranks(kRanks, [&](Transport& transport) {
      const auto backend = make_backend({.num_threads = 1});
      LayerGroupConfig config = group_config();
      config.geometry.num_experts = 12;
      config.peer_timeout = timeout;
      LayerGroup group = LayerGroup::create(config, transport, *backend);
      const int r = transport.rank();
      const ModeRecipes direct{.low_latency = parse_recipe("direct"),
                               .normal = parse_recipe("direct")};
      Rank rank{.rank = r,
                .group = group,
                .a = group.add_layer(files_->checkpoint(), files_->layer(0), direct),
                .b = group.add_layer(files_->checkpoint(), files_->layer(1), recipes_b),
                .load = make_workload({.num_experts = 12, .num_topk = 3, .hidden = 256, .seed = 7},
                                      r * kTokens, kTokens),
                .y_a = {},
                .y_b = {}};
      rank.y_a = forward(rank.a, Mode::kNormal, rank.load);
      rank.y_b = forward(rank.b, Mode::kNormal, rank.load);
      EXPECT_EQ(forward(rank.a, Mode::kLowLatency, rank.load), rank.y_a);
      EXPECT_EQ(forward(rank.b, Mode::kLowLatency, rank.load), rank.y_b);
      body(rank);
    });
  }
  static ModeRecipes direct() {
    return {.low_latency = parse_recipe("direct"), .normal = parse_recipe("direct")};
  }
  static LayersOnDisk* files_;
};
LayersOnDisk* DifferentLayersTest::files_ = nullptr;

/// Ranks 0 and 2 have a call that ends in `text_0` and the like; rank 1 another.
void expect_all_say(const std::vector<std::exception_ptr>& failures, const std::string& of_1,
                    const std::string& of_others) {
  for (std::size_t r = 0; r < failures.size(); ++r) {
    const auto failure = describe(failures[r]);
    ASSERT_TRUE(failure) << "rank " << r << " went on";
    EXPECT_EQ(failure->code, ErrorCode::kTransport) << failure->text;
    const std::string text =
        r == 1 ? fmt::format("dispatch for {}, rank 1 for {}: ranks must", of_others, of_1)
               : fmt::format("rank(s) 1 dispatch for {}, rank {} for {}: ranks must", of_1, r,
                             of_others);
    EXPECT_THAT(failure->text, HasSubstr(text));
    if (r != 1) {
      EXPECT_THAT(failure->ranks, ElementsAre(1)) << failure->text;
    } else {
      EXPECT_THAT(failure->ranks, ElementsAre(0, 2)) << failure->text;
    }
  }
}

TEST_F(DifferentLayersTest, AnotherLayerIsNamedBeforeItsRowsAreUsed) {
  for (const Mode mode : kModes) {
    for (const bool halves : {false, true}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << (halves ? ", in two halves" : ""));
      const auto start = std::chrono::steady_clock::now();
      std::string names[2];
      const auto failures = after_right_calls(20s, direct(), [&](Rank& rank) {
        if (rank.rank == 0) names[0] = rank.a.name(), names[1] = rank.b.name();
        Layer& layer = rank.rank == 1 ? rank.b : rank.a;
        if (!halves) return (void)forward(layer, mode, rank.load);
        OutputRows y(rank.load);
        Dispatched d = layer.dispatch_send(mode, rank.load.x_view(), rank.load.routing_view(), {});
        layer.finish(std::move(d), y.view(), {});
      });
      EXPECT_LT(std::chrono::steady_clock::now() - start, 15s);
      names[0] = gather_bytes(names[0])[0], names[1] = gather_bytes(names[1])[0];
      expect_all_say(failures, names[1], names[0]);
    }
  }
}

TEST_F(DifferentLayersTest, ACallThatOneRankRefusesShiftsNoOther) {
  for (const Mode mode : kModes) {
    for (const bool again : {true, false}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << (again ? ", again" : ", goes on"));
      const auto failures = after_right_calls(20s, direct(), [&](Rank& rank) {
        if (rank.rank == 1) {
          Workload bad = rank.load;
          bad.topk_idx[0] = 99;
          EXPECT_THROW((void)forward(rank.a, mode, bad), Error);
          if (!again) return (void)forward(rank.b, mode, rank.load);
        }
        // The others wait in this call for rank 1, which makes it now.
        EXPECT_EQ(forward(rank.a, mode, rank.load), rank.y_a);
        EXPECT_EQ(forward(rank.b, mode, rank.load), rank.y_b);
      });
      for (std::size_t r = 0; r < failures.size(); ++r) {
        EXPECT_EQ(failures[r] == nullptr, again) << "rank " << r;
        if (!again) {
          EXPECT_THAT(describe(failures[r])->text, HasSubstr("ranks must make the same calls"));
        }
      }
    }
  }
}

TEST_F(DifferentLayersTest, AnotherModeIsNamedAtTheTimeout) {
  std::string name;
  const auto failures =
      after_right_calls(ranks_are_processes() ? 1500ms : 1000ms, direct(), [&](Rank& rank) {
        if (rank.rank == 0) name = rank.a.name();
        (void)forward(rank.a, rank.rank == 1 ? Mode::kNormal : Mode::kLowLatency, rank.load);
      });
  name = gather_bytes(name)[0];
  for (std::size_t r = 0; r < failures.size(); ++r) {
    const auto failure = describe(failures[r]);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kTransport) << failure->text;
    EXPECT_THAT(failure->text, HasSubstr("still missing rank(s)"));
    EXPECT_THAT(failure->text,
                HasSubstr(fmt::format("{} for {} in {} mode",
                                      r == 1 ? "rank 1" : "rank(s) 1 dispatch", name, "normal")));
    EXPECT_THAT(failure->text, HasSubstr(name + " in low-latency mode with rows of"));
  }
}

TEST_F(DifferentLayersTest, AnotherWireIsNamedAtTheTimeout) {
  const ModeRecipes bf16{.low_latency = parse_recipe("direct-bf16"),
                         .normal = parse_recipe("direct-bf16")};
  for (const Mode mode : kModes) {
    const auto failures = after_right_calls(
        ranks_are_processes() ? 1500ms : 1000ms, bf16,
        [&](Rank& rank) { (void)forward(rank.rank == 1 ? rank.b : rank.a, mode, rank.load); });
    for (std::size_t r = 0; r < failures.size(); ++r) {
      const auto failure = describe(failures[r]);
      ASSERT_TRUE(failure);
      EXPECT_EQ(failure->code, ErrorCode::kTransport) << failure->text;
      EXPECT_THAT(failure->text, HasSubstr("with rows of bf16"));
      EXPECT_THAT(failure->text, HasSubstr("ranks must make the same calls in the same order"));
    }
  }
}

TEST_F(DifferentLayersTest, ARankThatIsGoneIsStillOneThatIsMissing) {
  const auto failures =
      after_right_calls(ranks_are_processes() ? 1500ms : 1000ms, direct(), [&](Rank& rank) {
        if (rank.rank != 1) (void)forward(rank.a, Mode::kNormal, rank.load);
      });
  for (const std::size_t r : {0, 2}) {
    EXPECT_EQ(describe(failures[r])->code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(describe(failures[r])->ranks, ElementsAre(1));
  }
}

TEST_F(DifferentLayersTest, AnotherCollectiveIsNamed) {
  std::string name;
  const auto failures = after_right_calls(20s, direct(), [&](Rank& rank) {
    if (rank.rank == 0) name = rank.a.name();
    if (rank.rank != 1) return (void)rank.a.counted_rows_of_all({});
    (void)rank.group.add_layer(files_->checkpoint(), files_->layer(1));
  });
  name = gather_bytes(name)[0];
  for (const auto& one : failures) {
    const auto failure = describe(one);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kTransport);
    EXPECT_THAT(failure->text, HasSubstr("rank 0 has 'counted_rows_of_all of " + name));
    EXPECT_THAT(failure->text, HasSubstr("rank 1 has 'add_layer'"));
    EXPECT_THAT(failure->text, HasSubstr("ranks must make the same calls in the same order"));
  }
}

TEST_F(DifferentLayersTest, CountsOfDifferentLayersAreNotAddedUp) {
  const auto failures = after_right_calls(20s, direct(), [&](Rank& rank) {
    EXPECT_EQ(rank.a.counted_rows_of_all({}).size(), 12u);
    (void)(rank.rank == 1 ? rank.b : rank.a).counted_rows_of_all({});
  });
  for (std::size_t r = 0; r < failures.size(); ++r) {
    const auto failure = describe(failures[r]);
    ASSERT_TRUE(failure) << "rank " << r;
    EXPECT_EQ(failure->code, ErrorCode::kTransport);
    EXPECT_THAT(failure->text, HasSubstr("ranks must make the same calls in the same order"));
  }
}

}  // namespace
}  // namespace sluice::testing
