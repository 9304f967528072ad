// Placements as values: what is refused, which slots an expert has, and that replicas share rows.
#include "sluice/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "sluice/error.h"

namespace sluice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <class Make>
void expect_refused(const Make& make, const char* text) {
  try {
    (void)make();
    ADD_FAILURE() << "expected: " << text;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_THAT(e.what(), HasSubstr(text));
  }
}

TEST(Placement, LeadsFromExpertsToSlotsAndBack) {
  const Placement p = Placement::create(4, 2, {3, 0, 1, 0, kEmptySlot, 2});
  EXPECT_EQ(p.num_experts(), 4);
  EXPECT_EQ(p.num_ranks(), 2);
  EXPECT_EQ(p.num_slots(), 6);
  EXPECT_EQ(p.slots_per_rank(), 3);
  EXPECT_THAT(p.slots_of(0), ElementsAre(1, 3));
  EXPECT_THAT(p.slots_of(3), ElementsAre(0));
  EXPECT_EQ(p.num_replicas(0), 2);
  EXPECT_EQ(p.rank_of(2), 0);
  EXPECT_EQ(p.rank_of(3), 1);
  EXPECT_THAT(p.slot_experts(1), ElementsAre(0, kEmptySlot, 2));
  EXPECT_FALSE(p.is_identity());
}

TEST(Placement, RefusesByNameValueAndLimit) {
  const auto create = [](int experts, int ranks, std::vector<int> slots) {
    return [=] { return Placement::create(experts, ranks, slots); };
  };
  expect_refused(create(0, 2, {}), "num_experts 0 is not positive");
  expect_refused(create(2, 0, {0, 1}), "num_ranks 0 is not positive");
  expect_refused(create(2, 2, {0, 1, 1}), "num_slots 3 is no multiple of 2 ranks");
  expect_refused(create(3, 1, {0, 1}), "num_slots 2 is less than 3 experts");
  expect_refused(create(2, 1, {0, 2}), "slot 1 holds expert 2, which is not in [-1, 2)");
  expect_refused(create(2, 1, {0, -2}), "slot 1 holds expert -2, which is not in [-1, 2)");
  expect_refused(create(3, 1, {0, 2, 0}), "expert 1 of 3 has no slot");
  expect_refused([] { return Placement::even(2, 1, Placement::kMaxSlots + 1); },
                 "num_slots 65537 exceeds 65536");
  expect_refused([] { return Placement::identity(384, 5); },
                 "num_slots 384 is no multiple of 5 ranks");
}

TEST(Placement, IsEvenOnAnyNumberOfRanks) {
  const Placement p = Placement::even(384, 5, 385);
  for (int rank = 0; rank < 5; ++rank) {
    const auto empty = std::ranges::count(p.slot_experts(rank), int{kEmptySlot});
    EXPECT_LE(empty, 1) << rank;
  }
  int expert = 0;  // In order, each once.
  for (const int e : p.slot_experts()) {
    if (e == kEmptySlot) continue;
    EXPECT_EQ(e, expert++);
  }
  EXPECT_EQ(expert, 384);
  EXPECT_TRUE(Placement::even(64, 8, 64).is_identity());
  EXPECT_EQ(Placement::even(64, 8, 64), Placement::identity(64, 8));
}

TEST(Placement, HasADigestThatTellsPlacementsApart) {
  const Placement one = Placement::create(2, 2, {0, 1, 1, 0});
  EXPECT_EQ(one.digest(), Placement::create(2, 2, {0, 1, 1, 0}).digest());
  for (const Placement& other :
       {Placement::create(2, 2, {0, 1, 0, 1}), Placement::create(2, 4, {0, 1, 1, 0}),
        Placement::create(2, 2, {0, 1, 1, kEmptySlot})}) {
    EXPECT_NE(one.digest(), other.digest());
    EXPECT_FALSE(one == other);
  }
}

/// Rows of each of `num_replicas` when `count` tokens, `stride` apart, all choose the expert.
std::vector<int> shares(int num_replicas, int source, int k, int count, int stride) {
  const Placement p = Placement::create(1, 1, std::vector<int>(num_replicas, 0));
  std::vector<int> rows(static_cast<std::size_t>(num_replicas));
  for (int i = 0; i < count; ++i) {
    ++rows[static_cast<std::size_t>(p.slot_of_row(0, source, i * stride, k))];
  }
  return rows;
}

TEST(Placement, SharesRowsAmongReplicas) {
  for (int replicas = 1; replicas <= 8; ++replicas) {
    for (const int stride : {1, 2, 3, 4, 7, 8, 64}) {
      for (const int source : {0, 1, 5}) {
        for (const int k : {0, 1, 7}) {
          const auto rows = shares(replicas, source, k, 512, stride);
          const auto [least, most] = std::ranges::minmax(rows);
          EXPECT_LE(most - least, 12) << replicas << " replicas, every " << stride << " tokens";
        }
      }
    }
  }
}

TEST(Placement, SharesOneTokenOfEachRank) {
  for (int replicas = 2; replicas <= 4; ++replicas) {
    const Placement p = Placement::create(1, 1, std::vector<int>(replicas, 0));
    std::vector<int> rows(static_cast<std::size_t>(replicas));
    for (int source = 0; source < 64; ++source) {
      ++rows[static_cast<std::size_t>(p.slot_of_row(0, source, 0, 0))];
    }
    const auto [least, most] = std::ranges::minmax(rows);
    EXPECT_LE(most - least, 6) << replicas;
  }
}

// The numbers themselves: a change of the function is a change of what ranks agree on.
TEST(Placement, ChoosesTheDocumentedReplica) {
  const Placement p = Placement::create(1, 1, {0, 0, 0});
  std::vector<int> slots;
  for (int token = 0; token < 8; ++token) slots.push_back(p.slot_of_row(0, 0, token, 0));
  EXPECT_THAT(slots, ElementsAre(0, 1, 0, 2, 1, 0, 2, 0));
  EXPECT_EQ(p.slot_of_row(0, 1, 0, 0), 2);  // 0.819
  EXPECT_EQ(p.slot_of_row(0, 0, 0, 1), 1);  // 0.550
}

}  // namespace
}  // namespace sluice
