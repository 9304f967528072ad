// Plans for moving experts, carried out on numbers: every slot ends with its expert, and nothing is
// read after it was overwritten.
#include "exchange/move_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "support/random_placement.h"

namespace sluice::testing {
namespace {

constexpr int kNothing = -2;

/// Contents of all slots, and of what each rank keeps aside. In a round a rank first sends, then it
/// copies, then it writes what has arrived.
class Machine {
 public:
  Machine(const Placement& from, const MovePlan& plan) : plan_(plan) {
    contents_.assign(from.slot_experts().begin(), from.slot_experts().end());
    contents_.resize(contents_.size() + static_cast<std::size_t>(from.num_ranks()), kNothing);
  }
  void run(const std::vector<ExpertMove>& moves, int max_per_round) {
    std::map<int, int> sends, receives;
    std::vector<int> arrived;
    for (const ExpertMove& m : moves) {
      const bool is_local = plan_.rank_of(m.from) == plan_.rank_of(m.to);
      arrived.push_back(is_local ? kNothing : at(m.from));
      if (is_local) continue;
      EXPECT_LE(++sends[plan_.rank_of(m.from)], max_per_round);
      if (!plan_.is_aside(m.to)) ++receives[plan_.rank_of(m.to)];
      EXPECT_LE(receives[plan_.rank_of(m.to)], max_per_round);
      EXPECT_FALSE(plan_.is_aside(m.from)) << "what is kept aside is for its own rank";
    }
    for (const ExpertMove& m : moves) {
      if (plan_.rank_of(m.from) == plan_.rank_of(m.to)) write(m, at(m.from));
    }
    for (std::size_t i = 0; i < moves.size(); ++i) {
      if (plan_.rank_of(moves[i].from) != plan_.rank_of(moves[i].to)) write(moves[i], arrived[i]);
    }
  }
  [[nodiscard]] int at(int place) const { return contents_[static_cast<std::size_t>(place)]; }

 private:
  void write(const ExpertMove& m, int expert) {
    EXPECT_EQ(expert, m.expert) << "from " << m.from << " to " << m.to;
    int& to = contents_[static_cast<std::size_t>(m.to)];
    EXPECT_TRUE(!plan_.is_aside(m.to) || to == kNothing) << "rank keeps two experts aside";
    to = expert;
    if (plan_.is_aside(m.from)) contents_[static_cast<std::size_t>(m.from)] = kNothing;
  }
  const MovePlan& plan_;
  std::vector<int> contents_;
};

int check_plan(const Placement& from, const Placement& to, int max_per_round) {
  const MovePlan plan = plan_moves(from, to, max_per_round);
  Machine machine(from, plan);
  int moves = 0;
  for (const auto& round : plan.rounds) {
    EXPECT_FALSE(round.empty());
    machine.run(round, max_per_round);
    moves += static_cast<int>(round.size());
  }
  for (int slot = 0; slot < to.num_slots(); ++slot) {
    if (to.expert_of(slot) == kEmptySlot) continue;
    EXPECT_EQ(machine.at(slot), to.expert_of(slot)) << slot;
  }
  return moves;
}

TEST(MovePlan, EverySlotEndsWithItsExpert) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const int ranks = 1 + static_cast<int>(seed % 8);
    const int experts = 3 + static_cast<int>(seed * 7 % 30);
    const int slots = (experts + static_cast<int>(seed % 11) + ranks - 1) / ranks * ranks;
    const int replicas = 1 + static_cast<int>(seed % 4);
    const Placement from = random_placement(experts, ranks, slots, replicas, 2 * seed);
    const Placement to = random_placement(experts, ranks, slots, 4, 2 * seed + 1);
    for (const int max_per_round : {1, 3}) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed << ", " << max_per_round);
      (void)check_plan(from, to, max_per_round);
    }
  }
}

TEST(MovePlan, NothingMovesBetweenEqualPlacements) {
  const Placement p = random_placement(16, 4, 24, 3, 1);
  EXPECT_TRUE(plan_moves(p, p, 1).rounds.empty());
}

TEST(MovePlan, TwoRanksChangePlacesInOneRound) {
  const Placement from = Placement::create(2, 2, {0, 1}), to = Placement::create(2, 2, {1, 0});
  EXPECT_EQ(plan_moves(from, to, 1).rounds.size(), 1u);
  EXPECT_EQ(check_plan(from, to, 1), 2);
}

TEST(MovePlan, ARingWithinARankTakesOneMoveMore) {
  const Placement from = Placement::create(3, 1, {0, 1, 2}),
                  to = Placement::create(3, 1, {1, 2, 0});
  EXPECT_EQ(check_plan(from, to, 1), 4);
}

TEST(MovePlan, AReplicaOfTheSameRankIsCopiedThere) {
  const Placement from = Placement::create(3, 2, {0, 1, 1, 2}),
                  to = Placement::create(3, 2, {0, 1, 2, 1});
  const MovePlan plan = plan_moves(from, to, 1);
  for (const auto& round : plan.rounds) {
    for (const ExpertMove& m : round) EXPECT_EQ(plan.rank_of(m.from), plan.rank_of(m.to));
  }
  (void)check_plan(from, to, 1);
}

TEST(MovePlan, OfARandomPermutationIsDoneInFewRounds) {
  const Placement from = Placement::identity(256, 8), to = random_placement(256, 8, 256, 1, 5);
  EXPECT_LE(plan_moves(from, to, 1).rounds.size(), 96u);  // 32 experts arrive on a rank.
  EXPECT_LE(plan_moves(from, to, 8).rounds.size(), 24u);
}

}  // namespace
}  // namespace sluice::testing
