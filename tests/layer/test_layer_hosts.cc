// The whole layer over several virtual hosts: against float64, and against one host, bit for bit.
#include <gmock/gmock.h>

#include "layer_fixture.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

class LayerHosts : public SmallLayerTest {};

constexpr Mode kModes[] = {Mode::kLowLatency, Mode::kNormal};

LayerCase case_of(int num_ranks, int num_hosts, Mode mode, const Recipe& recipe, int sum_parts) {
  LayerCase c{
      .tokens = std::vector<std::int64_t>(static_cast<std::size_t>(num_ranks), 12 / num_ranks),
      .mode = mode,
      .recipe = recipe};
  c.tokens.back() += 12 % num_ranks;
  c.hosts = Hosts::even(num_hosts, num_ranks);
  c.sum_parts = sum_parts;
  return c;
}

TEST_F(LayerHosts, EveryRecipeIsVerifiedAndHasTheBitsOfOneHost) {
  for (const auto& [name, recipe] : named_recipes()) {
    for (const int sum_parts : {1, 4}) {
      std::vector<std::uint16_t> first;
      for (const auto& [hosts, ranks] : {std::pair{1, 1}, {2, 2}, {2, 4}, {4, 4}, {4, 8}}) {
        for (const Mode mode : kModes) {
          SCOPED_TRACE(::testing::Message()
                       << name << ' ' << to_string(mode) << ", " << hosts << " hosts, " << ranks
                       << " ranks, parts " << sum_parts);
          const LayerCase c = case_of(ranks, hosts, mode, recipe, sum_parts);
          const LayerOutcome outcome = run_layer(*checkpoint_, c);
          if (first.empty()) {
            first = outcome.all_y();
            const VerifyReport report = verify_all(*checkpoint_, c, outcome);
            EXPECT_TRUE(report.passed()) << report.worst_ratio;
          }
          ASSERT_EQ(outcome.all_y(), first);
        }
      }
    }
  }
}

TEST_F(LayerHosts, DirectAndDirectBf16AreTheSame) {
  for (const Mode mode : kModes) {
    const LayerOutcome a = run_layer(*checkpoint_, case_of(4, 2, mode, parse_recipe("direct"), 0));
    const LayerOutcome b =
        run_layer(*checkpoint_, case_of(4, 2, mode, parse_recipe("direct-bf16"), 0));
    EXPECT_EQ(a.digest, b.digest);
    EXPECT_EQ(a.all_y(), b.all_y());
  }
}

// GEMM1 reads the same rows in the same places on any number of hosts.
TEST_F(LayerHosts, GemmInputIsThatOfOneHost) {
  for (const Mode mode : kModes) {
    const auto digest = [&](int hosts) {
      return run_layer(*checkpoint_, case_of(4, hosts, mode, Recipe{}, 0)).digest;
    };
    EXPECT_EQ(digest(2), digest(1));
    EXPECT_EQ(digest(4), digest(1));
  }
}

TEST_F(LayerHosts, RefusedByName) {
  const auto refused = [&](auto change) {
    LayerCase c = case_of(4, 2, Mode::kNormal, Recipe{}, 0);
    change(c);
    const auto failure = failure_of(try_layer(*checkpoint_, c), 0);
    return failure ? failure->text : std::string("(not refused)");
  };
  EXPECT_THAT(refused([](auto& c) { c.hosts = Hosts::even(2, 8); }),
              HasSubstr("hosts are of 8 ranks, there are 4"));
  EXPECT_THAT(refused([](auto& c) { c.sum_parts = 3; }),
              HasSubstr("sum_parts 3 of 2 hosts of 2 ranks"));
  EXPECT_THAT(refused([](auto& c) { c.sum_parts = 25; }), HasSubstr("sum_parts 25 is not in"));
}

// CUDA needs no device to refuse: plans do.
TEST_F(LayerHosts, PlansOfSeveralHosts) {
  const auto plan = [&](const Hosts& hosts, int sum_parts, Device::Kind device) {
    return Engine::plan_memory({.max_tokens_per_rank = 4, .hosts = hosts, .sum_parts = sum_parts},
                               checkpoint_->geometry(), DType::kBFloat16, device, 4)
        .exchange_bytes;
  };
  const Hosts one = Hosts::even(1, 4), two = Hosts::even(2, 4);
  for (const auto device : {Device::Kind::kHost, Device::Kind::kCuda}) {
    EXPECT_GT(plan(one, 0, device), 0u);
    for (const int parts : {0, 1}) EXPECT_GT(plan(two, parts, device), plan(one, 0, device));
  }
  const Hosts uneven = Hosts::create({0, 0, 0, 1});
  for (const auto& [hosts, parts] : {std::pair{one, 4}, {uneven, 1}}) {
    try {
      (void)plan(hosts, parts, Device::Kind::kCuda);
      ADD_FAILURE() << "not refused: " << hosts.to_string() << ", parts " << parts;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_THAT(error.what(), HasSubstr("the exchange in CUDA memory"));
    }
  }
}

}  // namespace
}  // namespace sluice::testing
