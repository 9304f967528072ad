// Experts that do not arrive as they left, ranks that disagree or are lost while experts move:
// every rank names the culprit, and nobody uses the layer again.
#include <gmock/gmock.h>

#include <cstring>
#include <string>

#include "exchange/faulty_transport.h"
#include "layer/placed_fixture.h"
#include "multirank/run_ranks.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int kRanks = 4, kCulprit = 2;
constexpr std::size_t kExpertPart = 8192;  ///< Smaller puts are not of experts.

class RebalanceFaults : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { files_ = new LayersOnDisk; }
  static void TearDownTestSuite() { delete files_; }

  /// A rebalance in which every rank sends, with `faults` on rank 2; what each rank's threw. No
  /// rank may compute afterwards.
  static std::vector<std::exception_ptr> move_all(const Faults& faults, bool may_compute = false) {
    return try_ranks(
        kRanks,
        [&](Transport& transport) {
          const auto backend = make_backend({.num_threads = 1});
          LayerGroupConfig config = slots_config(12);
          config.peer_timeout = 20s;  // None of these faults is found by waiting.
          LayerGroup group = LayerGroup::create(config, transport, *backend);
          Layer layer =
              group.add_layer(files_->checkpoint(), files_->layer(0), recipes_of_layer(0));
          const auto compute = [&] {
            (void)forward(layer, Mode::kNormal, tokens_of(transport.rank()));
          };
          compute();
          try {
            (void)layer.rebalance(turned(), {});
          } catch (const Error& first) {
            if (may_compute) throw;
            try {
              compute();
              ADD_FAILURE() << "a half moved layer computes";
            } catch (const Error& second) {
              EXPECT_THAT(second.what(), HasSubstr("its experts are half moved"));
              EXPECT_THAT(second.what(), HasSubstr(first.what()));
              EXPECT_EQ(second.ranks(), first.ranks());
            }
            throw;
          }
        },
        [&](int rank, std::unique_ptr<Transport> transport) -> std::unique_ptr<Transport> {
          if (rank != kCulprit) return transport;
          return std::make_unique<FaultyTransport>(std::move(transport), faults);
        });
  }
  /// Every expert one rank on.
  static Placement turned() {
    const Placement from = Placement::even(8, kRanks, 12);
    std::vector<int> slots(from.slot_experts().begin(), from.slot_experts().end());
    std::rotate(slots.begin(), slots.begin() + 3, slots.end());
    return Placement::create(8, kRanks, slots);
  }
  static LayersOnDisk* files_;
};
LayersOnDisk* RebalanceFaults::files_ = nullptr;

/// Rank 2 sends to rank 1, which sees it; all name rank 2.
void expect_named(const std::vector<std::exception_ptr>& failures) {
  for (int r = 0; r < kRanks; ++r) {
    const auto failure = describe(failures[static_cast<std::size_t>(r)]);
    ASSERT_TRUE(failure) << "rank " << r;
    EXPECT_EQ(failure->code, ErrorCode::kTransport) << failure->text;
    EXPECT_THAT(failure->ranks, ElementsAre(kCulprit)) << failure->text;
    EXPECT_THAT(failure->text, HasSubstr("rebalance of model.layers."));
    EXPECT_THAT(failure->text, HasSubstr(r == 1 ? "but what arrived has checksum"
                                                : "gave up because of rank(s) 2"));
  }
}

TEST_F(RebalanceFaults, ATransferCutShort) {
  expect_named(move_all({.on_put = [](int, std::size_t, std::vector<std::byte>& data) {
    if (data.size() >= kExpertPart) data.resize(data.size() / 2);
    return true;
  }}));
}

// The scales are the last bytes of each matrix's memory: those of down are the end of an expert.
TEST_F(RebalanceFaults, AScaleThatDoesNotMove) {
  expect_named(move_all({.on_put = [](int, std::size_t, std::vector<std::byte>& data) {
    if (data.size() < kExpertPart) return true;
    float scale;
    for (std::size_t i = data.size() - sizeof(scale);; i -= sizeof(scale)) {
      std::memcpy(&scale, data.data() + i, sizeof(scale));
      if (scale == 0) continue;  // What fills the page.
      scale = 0;
      std::memcpy(data.data() + i, &scale, sizeof(scale));
      return true;
    }
  }}));
}

TEST_F(RebalanceFaults, AReplicaOfTheWrongExpert) {
  std::vector<std::byte> earlier;
  const auto failures = move_all({.on_put = [&](int, std::size_t, std::vector<std::byte>& data) {
    if (data.size() < kExpertPart) return true;
    if (earlier.size() == data.size()) data = earlier;
    if (earlier.empty()) earlier = data;
    return true;
  }});
  expect_named(failures);
}

TEST_F(RebalanceFaults, AnExpertThatIsNotSent) {
  expect_named(move_all({.on_put = [](int, std::size_t, std::vector<std::byte>& data) {
    return data.size() < kExpertPart;
  }}));
}

TEST_F(RebalanceFaults, ARankLostHalfWay) {
  const auto failures = move_all({.on_put = [](int, std::size_t, std::vector<std::byte>& data) {
    if (data.size() >= kExpertPart) throw Error(ErrorCode::kIo, "planted");
    return true;
  }});
  for (int r = 0; r < kRanks; ++r) {
    const auto failure = describe(failures[static_cast<std::size_t>(r)]);
    ASSERT_TRUE(failure) << "rank " << r;
    if (r == kCulprit) {
      EXPECT_THAT(failure->text, HasSubstr("planted"));
    } else {
      EXPECT_THAT(failure->ranks, ElementsAre(kCulprit)) << failure->text;
    }
  }
}

TEST_F(RebalanceFaults, AnotherPlacementOnOneRankIsNamed) {
  const auto failures = try_ranks(kRanks, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(slots_config(12), transport, *backend);
    Layer layer = group.add_layer(files_->checkpoint(), files_->layer(0), recipes_of_layer(0));
    const Placement before = layer.placement();
    try {
      (void)layer.rebalance(transport.rank() == kCulprit ? before : turned(), {});
      ADD_FAILURE() << "ranks have different maps";
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr("ranks disagree on new placement"));
      EXPECT_THAT(e.what(), HasSubstr("rank 2 has"));
    }
    // Nothing has moved.
    EXPECT_EQ(layer.placement(), before);
    (void)forward(layer, Mode::kNormal, tokens_of(transport.rank()));
    // At loading, too.
    (void)group.add_layer(files_->checkpoint(), files_->layer(1), recipes_of_layer(1),
                          {.placements = {transport.rank() == kCulprit ? before : turned()}});
  });
  for (const auto& failure : failures) {
    ASSERT_TRUE(describe(failure));
    EXPECT_THAT(describe(failure)->text, HasSubstr("ranks disagree on placement"));
    EXPECT_THAT(describe(failure)->text, HasSubstr("rank 2 has"));
  }
}

// One layer of a checkpoint that is there twice has one name: it is told by its number, and two
// groups by theirs.
TEST_F(RebalanceFaults, AnotherLayerOfTheSameNameIsRefusedBeforeAnythingMoves) {
  for (const bool one_group : {true, false}) {
    SCOPED_TRACE(one_group ? "of one group" : "of two groups");
    const auto failures = try_ranks(kRanks, [&](Transport& transport) {
      const auto backend = make_backend({.num_threads = 1});
      LayerGroup group = LayerGroup::create(slots_config(12), transport, *backend);
      LayerGroup other = LayerGroup::create(slots_config(12), transport, *backend);
      const auto add = [&](LayerGroup& to) {
        return to.add_layer(files_->checkpoint(), files_->layer(0), recipes_of_layer(0));
      };
      Layer first = add(group), second = add(one_group ? group : other);
      ASSERT_EQ(first.name(), second.name());
      const Placement before = first.placement();
      const Workload load = tokens_of(transport.rank());
      const auto expected = forward(first, Mode::kNormal, load);
      const bool is_culprit = transport.rank() == kCulprit;
      try {
        (void)(is_culprit ? second : first).rebalance(turned(), {});
        ADD_FAILURE() << "ranks move different layers";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::kTransport);
        EXPECT_THAT(e.what(), HasSubstr(first.name()));
        if (one_group) {
          EXPECT_THAT(e.what(), HasSubstr("(number 1 of the group)"));
          EXPECT_THAT(e.what(),
                      HasSubstr("rank 2 has 'rebalance of " + first.name() + " (number 2 of"));
        } else {
          EXPECT_THAT(e.what(),
                      HasSubstr("ranks disagree on the group of " + first.name() + ": rank 0 has"));
        }
      }
      EXPECT_EQ(first.placement(), before);
      EXPECT_EQ(second.placement(), before);
      // Neither is half moved.
      EXPECT_EQ(forward(first, Mode::kNormal, load), expected);
      EXPECT_EQ(forward(second, Mode::kNormal, load), expected);
      (void)first.rebalance(turned(), {});
      EXPECT_EQ(forward(first, Mode::kNormal, load), expected);
      // Counts and new layers of another group are no answer either.
      if (one_group) return;
      for (const bool counts : {true, false}) {
        try {
          if (counts) {
            (void)(is_culprit ? second : first).counted_rows_of_all({});
          } else {
            (void)add(is_culprit ? other : group);
          }
          ADD_FAILURE() << "ranks ask different groups";
        } catch (const Error& e) {
          EXPECT_EQ(e.code(), ErrorCode::kTransport);
          EXPECT_THAT(e.what(), HasSubstr("group"));
        }
      }
    });
    for (const auto& failure : failures) EXPECT_FALSE(describe(failure));
  }
}

TEST_F(RebalanceFaults, ReplicasThatDifferAreNamedAtLoading) {
  const auto failures = try_ranks(2, [&](Transport& transport) {
    const auto backend = make_backend({.num_threads = 1});
    LayerGroup group = LayerGroup::create(slots_config(10), transport, *backend);
    const Placement placement = Placement::create(8, 2, {0, 1, 2, 3, 4, 5, 6, 7, 2, 1});
    const ExpertWeights all = files_->checkpoint().load_experts(files_->layer(0), 0, 8);
    LayerSpec spec{.name = "mine", .weights = all, .placement = placement};
    spec.weights.experts.clear();
    for (const int e : placement.slot_experts(transport.rank())) {
      spec.weights.experts.push_back(all.experts[static_cast<std::size_t>(e)]);
    }
    // The scales of one matrix are another expert's.
    if (transport.rank() == 1) spec.weights.experts[3].down.scales = all.experts[3].down.scales;
    (void)group.add_layer(spec, recipes_of_layer(0));
  });
  for (const auto& failure : failures) {
    ASSERT_TRUE(describe(failure));
    EXPECT_EQ(describe(failure)->code, ErrorCode::kTransport);
    EXPECT_THAT(describe(failure)->text,
                HasSubstr("replicas of expert 2 differ: slot 2 of rank 0 has checksum"));
    EXPECT_THAT(describe(failure)->ranks, ElementsAre(0, 1));
  }
}

}  // namespace
}  // namespace sluice::testing
