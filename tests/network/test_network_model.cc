// Spread of tokens over hosts, bytes by formula, and laws of the model.
#include "sluice/lab/network_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <set>

#include "sluice/error.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// Every set of num_topk experts out of num_topk_groups groups, all weighted as a router without
/// preferences does: groups first, then experts.
void expect_as_enumerated(const RoutingRule& rule, const Placement& placement, int num_hosts) {
  const int ranks_per_host = placement.num_ranks() / num_hosts;
  const int per_group = rule.num_experts / rule.num_groups;
  std::vector<double> hosts(static_cast<std::size_t>(num_hosts)), single = hosts;
  std::vector<double> ranks(static_cast<std::size_t>(placement.num_ranks()));
  double all = 0;
  for (unsigned groups = 0; groups < 1u << rule.num_groups; ++groups) {
    if (std::popcount(groups) != rule.num_topk_groups) continue;
    for (unsigned set = 0; set < 1u << rule.num_experts; ++set) {
      if (std::popcount(set) != rule.num_topk) continue;
      std::vector<int> experts;
      for (int e = 0; e < rule.num_experts; ++e) {
        if ((set >> e & 1) != 0) experts.push_back(e);
      }
      if (std::ranges::any_of(experts, [&](int e) { return (groups >> (e / per_group) & 1) == 0; }))
        continue;
      // Every choice of replicas, weighted alike.
      std::vector<std::vector<int>> choices = {{}};
      for (const int e : experts) {
        std::vector<std::vector<int>> longer;
        std::vector<int> slots;
        for (int s = 0; s < placement.num_slots(); ++s) {
          if (placement.slot_experts()[static_cast<std::size_t>(s)] == e) slots.push_back(s);
        }
        for (const auto& choice : choices) {
          for (const int s : slots) longer.push_back(choice), longer.back().push_back(s);
        }
        choices = std::move(longer);
      }
      for (const auto& choice : choices) {
        const double weight = 1.0 / static_cast<double>(choices.size());
        std::multiset<int> on_hosts;
        std::set<int> on_ranks;
        for (const int s : choice) {
          on_ranks.insert(placement.rank_of(s));
          on_hosts.insert(placement.rank_of(s) / ranks_per_host);
        }
        for (int h = 0; h < num_hosts; ++h) {
          if (on_hosts.count(h) > 0) hosts[static_cast<std::size_t>(h)] += weight;
          if (on_hosts.count(h) == 1) single[static_cast<std::size_t>(h)] += weight;
        }
        for (const int r : on_ranks) ranks[static_cast<std::size_t>(r)] += weight;
      }
      all += 1;
    }
  }
  const TokenSpread spread = even_spread(rule, placement, num_hosts);
  for (std::size_t h = 0; h < hosts.size(); ++h) {
    EXPECT_NEAR(spread.hosts[h], hosts[h] / all, 1e-12) << "host " << h;
    EXPECT_NEAR(spread.one_entry[h], single[h] / all, 1e-12) << "host " << h;
  }
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    EXPECT_NEAR(spread.ranks[r], ranks[r] / all, 1e-12) << "rank " << r;
  }
  EXPECT_NEAR(std::accumulate(spread.slots.begin(), spread.slots.end(), 0.0), rule.num_topk, 1e-12);
}

TEST(TokenSpread, AsEveryChoiceOfARouterSays) {
  expect_as_enumerated({.num_experts = 12, .num_topk = 3}, Placement::even(12, 6, 12), 3);
  expect_as_enumerated({.num_experts = 12, .num_topk = 4, .num_groups = 4, .num_topk_groups = 2},
                       Placement::even(12, 4, 12), 2);
  // Hosts cut groups, groups cut hosts.
  expect_as_enumerated({.num_experts = 12, .num_topk = 3, .num_groups = 2, .num_topk_groups = 1},
                       Placement::even(12, 3, 12), 3);
  expect_as_enumerated({.num_experts = 12, .num_topk = 3, .num_groups = 6, .num_topk_groups = 4},
                       Placement::even(12, 4, 12), 4);
  // Replicas, also two on one host, and an empty slot.
  expect_as_enumerated({.num_experts = 6, .num_topk = 2},
                       Placement::create(6, 4, {0, 1, 2, 0, 0, 3, 4, 5, kEmptySlot, 1, 2, 3}), 2);
  expect_as_enumerated({.num_experts = 6, .num_topk = 3, .num_groups = 3, .num_topk_groups = 2},
                       Placement::even(6, 6, 12), 3);
}

TEST(TokenSpread, OneHostNeedsEveryTokenOnce) {
  const TokenSpread spread =
      even_spread({.num_experts = 256, .num_topk = 8}, Placement::even(256, 8, 256), 1);
  EXPECT_NEAR(spread.hosts_per_token(), 1, 1e-12);
  EXPECT_NEAR(spread.one_entry[0], 0, 1e-12);
  EXPECT_NEAR(spread.ranks_per_token(), 5.29, 0.005);  // 8 (1 - C(224, 8) / C(256, 8))
}

/// What `sluice run --routing uniform` sends: counted, against the formula.
TEST(TokenSpread, AsAWorkloadSays) {
  const int ranks = 32, hosts = 4, tokens = 128;
  const Workload load =
      make_workload({.num_experts = 256, .num_topk = 8, .hidden = 128}, 0, ranks * tokens);
  const Placement placement = Placement::even(256, ranks, 256);
  const TokenSpread counted = count_spread(load.topk_idx, 8, tokens, placement, hosts);
  const TokenSpread exact = even_spread({.num_experts = 256, .num_topk = 8}, placement, hosts);
  EXPECT_NEAR(counted.hosts_per_token(), exact.hosts_per_token(), 5 * counted.standard_error);
  EXPECT_NEAR(counted.ranks_per_token(), exact.ranks_per_token(), 0.05);
  for (std::size_t h = 0; h < 4; ++h) {
    EXPECT_NEAR(counted.one_entry[h], exact.one_entry[h], 0.03);
  }
  EXPECT_GT(counted.standard_error, 0);
  EXPECT_EQ(exact.standard_error, 0);
}

TEST(TokenSpread, SampledRoutingHasTheSharesThatWereCounted) {
  std::vector<std::int64_t> rows(64);
  for (std::size_t e = 0; e < rows.size(); ++e) rows[e] = 1000 / static_cast<int>(e / 4 + 1);
  const RoutingRule rule{.num_experts = 64, .num_topk = 6};
  const int tokens = 20000;
  const auto topk = sample_routing(rule, rows, tokens, 7);
  EXPECT_EQ(topk, sample_routing(rule, rows, tokens, 7));
  std::vector<double> seen(64);
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
    std::set<int> experts;
    for (std::size_t i = 0; i < 6; ++i) {
      experts.insert(topk[t * 6 + i]), seen[static_cast<std::size_t>(topk[t * 6 + i])] += 1;
    }
    ASSERT_EQ(experts.size(), 6u) << "token " << t;
  }
  const double all = std::accumulate(rows.begin(), rows.end(), 0.0);
  for (std::size_t e = 0; e < rows.size(); ++e) {
    const double want = 6.0 * static_cast<double>(rows[e]) / all;
    EXPECT_NEAR(seen[e] / tokens, want, 5 * std::sqrt(want * (1 - want) / tokens))
        << "expert " << e;
  }
}

/// The gate of DeepSeek-V3 takes the groups with the two best scores, which it then uses more often
/// than groups taken alike.
TEST(TokenSpread, GroupsWithTheBestScoresAreUsed) {
  RoutingRule rule{.num_experts = 256, .num_topk = 8, .num_groups = 8, .num_topk_groups = 4};
  const Placement placement = Placement::even(256, 64, 256);
  const std::vector<std::int64_t> rows(256, 10);
  const auto topk = sample_routing(rule, rows, 20000, 1);
  const TokenSpread sampled = count_spread(topk, 8, 100, placement, 8);
  EXPECT_LE(sampled.hosts_per_token(), 4);
  EXPECT_GT(sampled.hosts_per_token(), even_spread(rule, placement, 8).hosts_per_token() + 0.2);
  for (std::size_t t = 0; t < 20000; ++t) {
    std::set<int> groups;
    for (std::size_t i = 0; i < 8; ++i) groups.insert(topk[t * 8 + i] / 32);
    ASSERT_LE(groups.size(), 4u);
  }
  // All groups taken: no limit at all.
  rule.num_topk_groups = 8;
  const TokenSpread all = count_spread(sample_routing(rule, rows, 20000, 1), 8, 100, placement, 8);
  const TokenSpread exact = even_spread({.num_experts = 256, .num_topk = 8}, placement, 8);
  EXPECT_NEAR(all.hosts_per_token(), exact.hosts_per_token(), 5 * all.standard_error);
  EXPECT_NEAR(even_spread(rule, placement, 8).hosts_per_token(), exact.hosts_per_token(), 1e-9);
}

TEST(TokenSpread, RefusesByName) {
  const Placement p = Placement::even(16, 4, 16);
  const auto refused = [&](const RoutingRule& rule, int hosts, const char* message) {
    EXPECT_THAT([&] { (void)even_spread(rule, p, hosts); },
                ThrowsMessage<Error>(HasSubstr(message)));
  };
  refused({.num_experts = 16, .num_topk = 17}, 1, "num_topk 17 is not in 1 .. num_experts 16");
  refused({.num_experts = 16, .num_topk = 2}, 3, "num_hosts 3 does not divide num_ranks 4");
  refused({.num_experts = 16, .num_topk = 2, .num_groups = 3}, 2, "num_groups 3 does not divide");
  refused({.num_experts = 16, .num_topk = 5, .num_groups = 4, .num_topk_groups = 1}, 2,
          "num_topk 5: 1 of 4 groups have 4 experts");
  refused({.num_experts = 8, .num_topk = 2}, 2, "the placement has 16 experts, the routing 8");
  EXPECT_THAT([&] { (void)sample_routing({.num_experts = 3, .num_topk = 2}, {}, 1, 1); },
              ThrowsMessage<Error>(HasSubstr("rows of 0 experts")));
  const std::vector<std::int64_t> one_sided = {90, 10, 0};
  EXPECT_THAT(
      [&] { (void)sample_routing({.num_experts = 3, .num_topk = 2}, one_sided, 1, 1); },
      ThrowsMessage<Error>(HasSubstr("expert 0 has 90 of 100 rows; with top-2 that is more than")));
  const std::vector<std::int32_t> wrong = {0, 16};
  EXPECT_THAT([&] { (void)count_spread(wrong, 2, 1, p, 2); },
              ThrowsMessage<Error>(HasSubstr("topk_idx[0, 1] is 16; there are 16 experts")));
}

ClusterLayer r1(int hosts, int tokens, Mode mode = Mode::kLowLatency) {
  return {.geometry = preset_geometry("r1-layer"),
          .mode = mode,
          .num_hosts = hosts,
          .num_ranks = 8 * hosts,
          .tokens_per_rank = tokens};
}

TokenSpread r1_spread(int hosts) {
  const int slots = std::max(256, 8 * hosts);
  return even_spread({.num_experts = 256, .num_topk = 8}, Placement::even(256, 8 * hosts, slots),
                     hosts);
}

/// By hand, for two hosts of eight ranks: docs/clusters.md has the formulas.
TEST(NetworkModel, BytesOfTwoHosts) {
  const MachineModel machine = machine_preset("h200-ib400");
  const TokenSpread spread = r1_spread(2);
  const double missed = std::exp(std::lgamma(129) - std::lgamma(121) + std::lgamma(249) -
                                 std::lgamma(257));  // C(128, 8) / C(256, 8)
  const double one = 8 * 128 *
                     std::exp(std::lgamma(129) - std::lgamma(8) - std::lgamma(122) -
                              std::lgamma(257) + std::lgamma(9) + std::lgamma(249)) /
                     8;
  EXPECT_NEAR(spread.hosts[0], 1 - missed, 1e-9);
  EXPECT_NEAR(spread.one_entry[1], one, 1e-9);
  // 7168 codes, 56 scales, the token, 8 slots and 8 weights: 7460, in pieces of 16 bytes 7472.
  const StepPrediction low = predict_dispatch(machine, r1(2, 128), spread);
  EXPECT_DOUBLE_EQ(low.network_bytes, 1040 + 128 * 7472);  // 4 + 4 * 256 in pieces of 16
  // Rows that come home follow a header of 16 bytes.
  EXPECT_DOUBLE_EQ(predict_combine(machine, r1(2, 128), spread).network_bytes,
                   16 + 128 * 2 * 14336);
  const ClusterLayer normal = r1(2, 4096, Mode::kNormal);
  EXPECT_NEAR(predict_dispatch(machine, normal, spread).network_bytes,
              16 + 4096 * (1 - missed) * 7472, 1e-3);
  EXPECT_NEAR(predict_combine(machine, normal, spread).network_bytes,
              16 + 4096 * (2 * (1 - missed) - one) * 14336, 1e-3);
  ClusterLayer entries = normal;
  entries.sum_parts = 1;  // Every row by itself: half of the eight entries are on the other host.
  EXPECT_NEAR(predict_combine(machine, entries, spread).network_bytes, 16 + 4096 * 4 * 14336, 1e-3);
  const LayerPrediction layer = predict_layer(machine, normal, spread);
  EXPECT_NEAR(layer.bytes_per_host,
              8 * (layer.dispatch.network_bytes + layer.combine.network_bytes), 1e-3);
}

TEST(NetworkModel, OneHostNeedsNoNetwork) {
  const TokenSpread spread = r1_spread(1);
  const LayerPrediction with = predict_layer(machine_preset("h200-ib400"), r1(1, 128), spread);
  const LayerPrediction without = predict_layer(machine_preset("h200-nvlink"), r1(1, 128), spread);
  EXPECT_EQ(with.layer_us, without.layer_us);
  EXPECT_EQ(with.bytes_per_host, 0);
  EXPECT_THAT([&] { (void)predict_layer(machine_preset("h200-nvlink"), r1(2, 128), r1_spread(2)); },
              ThrowsMessage<Error>(HasSubstr("network_gbytes_per_s is 0, num_hosts 2")));
}

TEST(NetworkModel, SharesAddUpAndRatesScale) {
  for (const int hosts : {1, 2, 8, 32}) {
    const TokenSpread spread = r1_spread(hosts);
    for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
      for (const int tokens : {1, 16, 128, 4096}) {
        const MachineModel machine = machine_preset("h200-ib400");
        const ClusterLayer layer = r1(hosts, tokens, mode);
        const LayerPrediction p = predict_layer(machine, layer, spread);
        const TimeShares& s = p.shares;
        EXPECT_NEAR(
            s.latency_us + s.network_us + s.link_us + s.memory_us + s.weights_us + s.products_us,
            p.layer_us, 1e-6 * p.layer_us)
            << hosts << " hosts, " << tokens << " tokens";
        // The bound is the largest of the sums, so that two halves do not lose to a third.
        const double experts = s.weights_us + s.products_us, inside = s.link_us + s.memory_us;
        const double largest = std::max({s.latency_us, s.network_us, inside, experts});
        const bool is_weights = s.weights_us >= s.products_us, is_link = s.link_us >= s.memory_us;
        EXPECT_EQ(p.bound,
                  largest == experts  ? is_weights ? "experts (weights)" : "experts (products)"
                  : largest == inside ? is_link ? "inside a host (link)" : "inside a host (memory)"
                  : largest == s.network_us ? "network"
                                            : "latency");
        MachineModel faster = machine;
        faster.network_gbytes_per_s *= 2;
        EXPECT_DOUBLE_EQ(predict_dispatch(faster, layer, spread).network_us * 2,
                         p.dispatch.network_us);
        EXPECT_LE(predict_layer(faster, layer, spread).layer_us, p.layer_us);
        MachineModel side_by_side = machine;
        side_by_side.overlap = 1;
        const LayerPrediction q = predict_layer(side_by_side, layer, spread);
        const TimeShares& o = q.shares;
        EXPECT_NEAR(
            o.latency_us + o.network_us + o.link_us + o.memory_us + o.weights_us + o.products_us,
            q.layer_us, 1e-6 * q.layer_us);
      }
    }
  }
}

// What a calibration over hosts takes for the network is not what else a dispatch takes.
TEST(NetworkModel, ACalibratedLatencyCountsOtherFixedTimesOnce) {
  MachineModel machine = machine_preset("h200-ib400");
  machine.network_latency_us = 23, machine.network_peer_us = 0.5;
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    ClusterLayer layer = r1(4, 64, mode);
    layer.num_ranks = 4;
    const RoutingRule rule{.num_experts = 256, .num_topk = 8};
    const TokenSpread spread = even_spread(rule, Placement::identity(256, 4), 4);
    const double fixed = (predict_dispatch(machine, layer, spread).latency_us +
                          predict_combine(machine, layer, spread).latency_us) /
                         2;
    EXPECT_GT(fixed, 23 + 6) << to_string(mode);
    EXPECT_NEAR(network_latency_of(machine, mode, 4, fixed), 23, 1e-9) << to_string(mode);
    EXPECT_EQ(network_latency_of(machine, mode, 4, 1), 0) << "less than the others are";
  }
  EXPECT_THAT([&] { (void)network_latency_of(machine, Mode::kNormal, 1, 30); },
              ThrowsMessage<Error>(HasSubstr("num_hosts 1")));
}

TEST(NetworkModel, APieceWithLessRoomSendsLess) {
  const MachineModel machine = machine_preset("h200-ib400");
  ClusterLayer layer = r1(32, 128);
  const double whole = predict_dispatch(machine, layer, r1_spread(32)).network_bytes;
  layer.piece_tokens = 64;
  EXPECT_NEAR(predict_dispatch(machine, layer, r1_spread(32)).network_bytes / whole, 0.5, 0.01);
  layer.piece_tokens = 129;
  EXPECT_THAT([&] { (void)predict_dispatch(machine, layer, r1_spread(32)); },
              ThrowsMessage<Error>(
                  HasSubstr("piece_tokens 129 is not in 30 .. 128: of 128 tokens, 29.1 need")));
  layer.piece_tokens = 29;  // Fewer than a piece has on average.
  EXPECT_THAT([&] { (void)predict_dispatch(machine, layer, r1_spread(32)); },
              ThrowsMessage<Error>(HasSubstr("piece_tokens 29 is not in 30 .. 128")));
  layer.piece_tokens = 64, layer.mode = Mode::kNormal;
  EXPECT_THAT([&] { (void)predict_dispatch(machine, layer, r1_spread(32)); },
              ThrowsMessage<Error>(HasSubstr("mode normal, num_hosts 32")));
  layer.piece_tokens = 0, layer.mode = Mode::kLowLatency, layer.sum_parts = 48;
  EXPECT_THAT([&] { (void)predict_dispatch(machine, layer, r1_spread(32)); },
              ThrowsMessage<Error>(HasSubstr("sum_parts 48 does not divide 256 expert slots")));
}

TEST(NetworkModel, UnevenExpertsMakeTheSlowestRankSlower) {
  const MachineModel machine = machine_preset("h200-nvlink");
  TokenSpread spread = r1_spread(1);
  const LayerPrediction even = predict_layer(machine, r1(1, 1024), spread);
  for (std::size_t s = 0; s < 32; ++s) spread.slots[s] *= 2, spread.slots[s + 32] = 0;
  const LayerPrediction uneven = predict_layer(machine, r1(1, 1024), spread);
  EXPECT_GT(uneven.stage_us, 1.8 * even.stage_us);
  EXPECT_GT(uneven.dispatch.link_us, 1.9 * even.dispatch.link_us);
}

TEST(NetworkModel, SensitivitiesAreWhatOtherMachinesTake) {
  const MachineModel machine = machine_preset("h200-ib400");
  const TokenSpread spread = r1_spread(8);
  const ClusterLayer layer = r1(8, 4096, Mode::kNormal);
  const double now = predict_layer(machine, layer, spread).layer_us;
  const auto all = sensitivities(machine, layer, spread);
  ASSERT_FALSE(all.empty());
  double before = HUGE_VAL;
  for (const Sensitivity& s : all) {
    MachineModel other = machine;
    set_parameter(other, s.parameter->name, machine.*s.parameter->value * 1.3);
    EXPECT_DOUBLE_EQ(predict_layer(other, layer, spread).layer_us, now + s.more_us);
    const double largest = std::max(std::fabs(s.less_us), std::fabs(s.more_us));
    EXPECT_LE(largest, before);
    before = largest;
  }
}

TEST(NetworkModel, RefusesRecipesAndWeightsWithoutATable) {
  ClusterLayer layer = r1(1, 16);
  EXPECT_THAT([&] { (void)predict_stage(machine_preset("deepep-ll-h200"), layer, r1_spread(1)); },
              ThrowsMessage<Error>(HasSubstr("has no measured experts' stage of")));
  for (const NamedRecipe& named : named_recipes()) {
    layer.recipe = named.recipe;
    EXPECT_GT(predict_layer(machine_preset("h200-nvlink"), layer, r1_spread(1)).layer_us, 100)
        << named.name;
  }
}

}  // namespace
}  // namespace sluice
