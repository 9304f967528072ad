// Which rank has a slot: every slot has one place, and the place leads back to it.
#include <gtest/gtest.h>

#include <type_traits>

#include "exchange/slot_ranks.h"

namespace sluice {
namespace {

// Kernels take it by value.
static_assert(std::is_trivially_copyable_v<ExpertPlacement>);
static_assert(std::is_standard_layout_v<ExpertPlacement>);

struct Case {
  int num_ranks, num_local;
};

class SlotRanks : public ::testing::TestWithParam<Case> {
 protected:
  const int num_ranks_ = GetParam().num_ranks, num_local_ = GetParam().num_local;
  const ExpertPlacement placement_{num_ranks_ * num_local_, num_ranks_};
};

TEST_P(SlotRanks, SaysItsSizes) {
  EXPECT_EQ(placement_.num_experts(), num_ranks_ * num_local_);
  EXPECT_EQ(placement_.num_ranks(), num_ranks_);
  EXPECT_EQ(placement_.num_local(), num_local_);
}

// Counted here, so that the test shares no formula with what it tests.
TEST_P(SlotRanks, GivesEveryRankTheNextExperts) {
  int expert = 0;
  for (int rank = 0; rank < num_ranks_; ++rank) {
    for (int local = 0; local < num_local_; ++local, ++expert) {
      EXPECT_EQ(placement_.rank_of(expert), rank) << "expert " << expert;
      EXPECT_EQ(placement_.local_of(expert), local) << "expert " << expert;
      EXPECT_EQ(placement_.expert_of(rank, local), expert);
    }
  }
  EXPECT_EQ(expert, placement_.num_experts());
}

INSTANTIATE_TEST_SUITE_P(Shapes, SlotRanks,
                         ::testing::Values(Case{1, 1}, Case{1, 7}, Case{3, 7}, Case{7, 1},
                                           Case{5, 33}, Case{8, 32}, Case{64, 4}, Case{64, 64}),
                         [](const auto& shape) {
                           return std::to_string(shape.param.num_ranks) + "ranks" +
                                  std::to_string(shape.param.num_local);
                         });

// As a constant: what a kernel computes must not need the host.
constexpr ExpertPlacement kThreeRanks(21, 3);
static_assert(kThreeRanks.rank_of(6) == 0 && kThreeRanks.local_of(6) == 6);
static_assert(kThreeRanks.rank_of(7) == 1 && kThreeRanks.local_of(7) == 0);
static_assert(kThreeRanks.expert_of(2, 6) == 20);

}  // namespace
}  // namespace sluice
