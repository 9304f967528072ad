// The balancer: what a placement must be, that it is as good as it can be where that is known, and
// what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "balance/traces.h"
#include "sluice/balance.h"
#include "sluice/error.h"

namespace sluice {
namespace {

using Rows = std::vector<std::int64_t>;

double fullest(const Rows& rows, const Placement& placement) {
  return max_over_mean(expected_rows(rows, placement));
}

/// The numbers asked for, and no rank with two replicas of an expert.
void expect_valid(const Placement& placement, int num_experts, const BalanceConfig& c) {
  EXPECT_EQ(placement.num_experts(), num_experts);
  EXPECT_EQ(placement.num_ranks(), c.num_ranks);
  EXPECT_EQ(placement.num_slots(), c.num_slots);
  for (int r = 0; r < c.num_ranks; ++r) {
    const std::span<const int> slots = placement.slot_experts(r);
    std::multiset<int> mine(slots.begin(), slots.end());
    mine.erase(kEmptySlot);
    EXPECT_EQ(mine.size(), std::set<int>(mine.begin(), mine.end()).size()) << "rank " << r;
  }
}

TEST(Balance, SpreadsOneHotExpertOverAllRanks) {
  const Rows rows{800, 10, 10, 10, 10, 10, 10, 10};
  const BalanceConfig config{.num_ranks = 4, .num_slots = 12};
  const Placement placement = balance(rows, config);
  expect_valid(placement, 8, config);
  // Four are spare. Expert 0 takes three and is then on every rank; the last goes to expert 1.
  EXPECT_EQ(placement.num_replicas(0), 4);
  EXPECT_EQ(placement.num_replicas(1), 2);
  EXPECT_LT(fullest(rows, placement), 1.02);
}

TEST(Balance, WithoutFreeSlotsItPacks) {
  const Rows rows{9, 8, 7, 3, 2, 1};
  const Placement placement = balance(rows, {.num_ranks = 3, .num_slots = 6});
  EXPECT_THAT(expected_rows(rows, placement), ::testing::Each(10.0));
}

// Heaviest first ends with 3 + 2 + 2 beside 3 + 2 + 0; only an exchange finds the even split.
TEST(Balance, ExchangesReachWhatPackingDoesNot) {
  const Rows rows{3, 3, 2, 2, 2, 0};
  const Placement placement = balance(rows, {.num_ranks = 2, .num_slots = 6});
  EXPECT_THAT(expected_rows(rows, placement), ::testing::Each(6.0));
}

TEST(Balance, AnyNumberOfExpertsFitsAnyNumberOfRanks) {
  for (const auto& [experts, ranks] : {std::pair{384, 5}, {60, 7}, {1, 3}, {5, 8}}) {
    const int slots_per_rank = (experts + ranks - 1) / ranks;
    const BalanceConfig config{.num_ranks = ranks, .num_slots = ranks * slots_per_rank};
    const Rows rows = traces::zipf(static_cast<std::size_t>(experts), 1, 0.9, 5).front();
    expect_valid(balance(rows, config), experts, config);
  }
}

TEST(Balance, ExpertsWithoutRowsGetOneSlot) {
  const Placement placement = balance(Rows(6, 0), {.num_ranks = 3, .num_slots = 12});
  EXPECT_EQ(std::ranges::count(placement.slot_experts(), kEmptySlot), 6);
  EXPECT_EQ(max_over_mean(expected_rows(Rows(6, 0), placement)), 0);
}

TEST(Balance, KeepsExpertsAndTheirReplicasOnOneHost) {
  const BalanceConfig config{.num_ranks = 16, .num_slots = 320, .num_hosts = 2, .num_groups = 8};
  const Rows rows = traces::zipf(256, 1, 1.0, 3).front();
  const Placement placement = balance(rows, config);
  expect_valid(placement, 256, config);
  std::map<int, std::set<int>> hosts_of_group;
  for (int s = 0; s < placement.num_slots(); ++s) {
    if (placement.expert_of(s) >= 0) hosts_of_group[placement.expert_of(s) / 32].insert(s / 160);
  }
  EXPECT_EQ(hosts_of_group.size(), 8u);
  for (const auto& [group, hosts] : hosts_of_group) EXPECT_EQ(hosts.size(), 1u) << group;
}

TEST(Balance, TheSameTwice) {
  const Rows rows = traces::zipf(256, 1, 0.8, 3).front();
  const BalanceConfig config{.num_ranks = 8, .num_slots = 288};
  EXPECT_EQ(balance(rows, config), balance(rows, config));
}

TEST(Balance, KeepsPlacesOfAnEarlierPlacement) {
  const traces::Trace trace = traces::drifting(256, 8, 3);
  for (const int hosts : {1, 2}) {
    const BalanceConfig config{.num_ranks = 8, .num_slots = 288, .num_hosts = hosts};
    const Placement first = balance(trace[0], config);
    // The same rows: nothing moves, whatever the slots of the ranks were.
    EXPECT_EQ(balance(trace[0], config, first), first);
    std::vector<int> slots(first.slot_experts().begin(), first.slot_experts().end());
    std::ranges::rotate(slots, slots.begin() + 144);  // The ranks of one host for the other's.
    std::ranges::reverse(slots.begin(), slots.begin() + 36);
    const Placement turned = Placement::create(256, 8, slots);
    EXPECT_EQ(balance(trace[0], config, turned), turned);
    // Other rows: as good as without, and fewer experts travel.
    const Placement anew = balance(trace[4], config);
    const Placement kept = balance(trace[4], config, first);
    expect_valid(kept, 256, config);
    EXPECT_NEAR(fullest(trace[4], kept), fullest(trace[4], anew), 1e-12);
    EXPECT_LT(count_moves(first, kept), count_moves(first, anew));
    for (int s = 0; s < kept.num_slots(); ++s) {  // Who stays on a rank keeps the slot.
      const std::span<const int> before = first.slot_experts(s / 36);
      if (kept.expert_of(s) >= 0 && std::ranges::find(before, kept.expert_of(s)) != before.end()) {
        EXPECT_EQ(kept.expert_of(s), first.expert_of(s));
      }
    }
  }
}

TEST(Balance, CountsMoves) {
  const auto moves = [](std::vector<int> from, std::vector<int> to) {
    return count_moves(Placement::create(4, 2, std::move(from)),
                       Placement::create(4, 2, std::move(to)));
  };
  EXPECT_EQ(moves({0, 1, -1, 2, 3, -1}, {1, 0, 0, 3, -1, 2}), 0);
  EXPECT_EQ(moves({0, 1, 2, 3}, {0, 2, 1, 3}), 2);
  EXPECT_EQ(moves({0, 1, 2, 3}, {0, 1, 2, 2, 3, 0}), 2);  // More slots than before.
  EXPECT_THROW((void)moves({0, 1, 2, 3}, {0, 1, 2}), Error);
}

TEST(Balance, MaxOverMean) {
  EXPECT_DOUBLE_EQ(max_over_mean(std::vector<double>{3, 1, 1, 1}), 2);
  EXPECT_DOUBLE_EQ(max_over_mean(std::vector<double>{5, 0, 0, 0}), 4);
  EXPECT_EQ(max_over_mean(std::vector<double>{}), 0);
  for (const double bad : {std::nan(""), HUGE_VAL, -1.0}) {
    try {
      (void)max_over_mean(std::vector<double>{1, bad});
      ADD_FAILURE() << bad << " is accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_THAT(error.what(), ::testing::HasSubstr("values[1] = "));
    }
  }
}

/// The message of what balancing throws; it must be kInvalidArgument.
std::string refusal(const Rows& rows, const BalanceConfig& config, const Placement& previous = {}) {
  try {
    (void)balance(rows, config, previous);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "not refused";
}

TEST(Balance, RefusesByFieldAndValue) {
  using ::testing::HasSubstr;
  const Rows rows(8, 1);
  const BalanceConfig good{.num_ranks = 4, .num_slots = 8};
  EXPECT_EQ(refusal(rows, good), "not refused");
  EXPECT_THAT(refusal({}, good), HasSubstr("rows of no experts"));
  EXPECT_THAT(refusal({1, -2}, good), HasSubstr("expert 1 has -2 rows"));
  EXPECT_THAT(refusal(rows, {.num_ranks = 0, .num_slots = 8}),
              HasSubstr("0 ranks are not in [1, 4096]"));
  EXPECT_THAT(refusal(rows, {.num_ranks = 4097, .num_slots = 2 * 4097}),
              HasSubstr("4097 ranks are not in [1, 4096]"));
  EXPECT_THAT(refusal(rows, {.num_ranks = 4, .num_slots = 10}),
              HasSubstr("10 slots are no multiple of 4 ranks"));
  EXPECT_THAT(refusal(rows, {.num_ranks = 2, .num_slots = 6}),
              HasSubstr("6 slots are fewer than 8 experts"));
  EXPECT_THAT(refusal(rows, {.num_ranks = 4, .num_slots = 8, .num_hosts = 3}),
              HasSubstr("3 hosts do not divide 4 ranks"));
  EXPECT_THAT(refusal(rows, {.num_ranks = 4, .num_slots = 8, .num_groups = 3}),
              HasSubstr("3 groups do not divide 8 experts"));
  // Three groups of four over two hosts: one of them has eight experts, and six slots.
  EXPECT_THAT(
      refusal(Rows(12, 1), {.num_ranks = 2, .num_slots = 12, .num_hosts = 2, .num_groups = 3}),
      HasSubstr("a host has up to 2 of 4 experts, and 12 slots give it 6"));
  EXPECT_THAT(refusal(rows, good, Placement::even(8, 4, 12)),
              HasSubstr("previous placement: num_slots 12, expected 8"));
  EXPECT_THAT(refusal(rows, good, Placement::even(7, 4, 8)), HasSubstr("num_experts 7"));
  EXPECT_THAT(refusal(rows, good, Placement::even(8, 2, 8)), HasSubstr("num_ranks 2"));
  EXPECT_THROW((void)expected_rows(rows, Placement::identity(4, 2)), Error);
}

}  // namespace
}  // namespace sluice
