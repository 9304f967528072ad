// Moves in parts: few experts at a time, every expert always somewhere, and the end reached.
#include <gmock/gmock.h>

#include <algorithm>
#include <string>

#include "sluice/balance.h"
#include "sluice/error.h"
#include "support/random_placement.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

/// The most that one rank receives.
int most_received(const Placement& from, const Placement& to) {
  int most = 0;
  for (int r = 0; r < to.num_ranks(); ++r) {
    int received = 0;
    for (int slot = r * to.slots_per_rank(); slot < (r + 1) * to.slots_per_rank(); ++slot) {
      const int e = to.expert_of(slot);
      const std::span<const int> had = from.slot_experts(r);
      received += e != kEmptySlot && std::ranges::find(had, e) == had.end();
    }
    most = std::max(most, received);
  }
  return most;
}

struct Walk {
  int parts = 0, moves = 0;
};
/// All parts of a move, each of which must be valid, small enough, and a step.
Walk walk(Placement now, const Placement& to, int max_received) {
  Walk walk;
  while (!(now == to)) {
    const Placement next = placement_toward(now, to, max_received);
    EXPECT_LE(most_received(now, next), max_received);
    if (next == now || ++walk.parts > 2 * to.num_slots()) {
      ADD_FAILURE() << "it does not end";
      break;
    }
    walk.moves += count_moves(now, next);
    now = next;
  }
  return walk;
}

TEST(PlacementToward, EveryPartIsSmallAndTheLastOneIsTheEnd) {
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    const int ranks = 1 + static_cast<int>(seed % 8), experts = 4 + static_cast<int>(seed * 7 % 40);
    const int spare = static_cast<int>(seed / 8 % 3) * ranks;
    const int slots = (experts + ranks - 1) / ranks * ranks + spare;
    const auto some = [&](std::uint64_t n) {
      const int replicas = 1 + static_cast<int>((seed / 4 + n) % 4);
      return random_placement(experts, ranks, slots, replicas, 2 * seed + n);
    };
    const Placement from = some(0), to = some(1);
    for (const int max_received : {1, 2, 5}) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed << ", " << max_received);
      (void)walk(from, to, max_received);
    }
    EXPECT_EQ(placement_toward(from, to, slots), to) << "seed " << seed;
    EXPECT_EQ(placement_toward(from, from, 1), from);
  }
}

// A ring of all experts over all ranks, without a slot to spare: one expert goes round.
TEST(PlacementToward, ARingIsTurnedInParts) {
  const Placement from = Placement::identity(8, 4);
  const Placement to = Placement::create(8, 4, {7, 0, 1, 2, 3, 4, 5, 6});
  EXPECT_EQ(most_received(from, to), 1);
  EXPECT_EQ(walk(from, to, 1).moves, 4);
  // Two rings of four ranks, each rank in both.
  const Placement both = Placement::create(8, 4, {6, 7, 0, 1, 2, 3, 4, 5});
  EXPECT_EQ(walk(from, both, 2).parts, 1);
  const Walk parts = walk(from, both, 1);
  EXPECT_GT(parts.parts, 1);
  EXPECT_LE(parts.moves, 8 + parts.parts);
}

// What spare slots make possible: no expert travels twice.
TEST(PlacementToward, WithoutRingsNothingTravelsTwice) {
  const Placement from = Placement::create(4, 2, {0, 1, 2, 3, kEmptySlot, kEmptySlot});
  const Placement to = Placement::create(4, 2, {3, 1, kEmptySlot, 0, 2, 1});
  EXPECT_EQ(count_moves(from, to), 4);
  const Walk parts = walk(from, to, 1);
  EXPECT_EQ(parts.moves, 4);
  EXPECT_EQ(parts.parts, 3);
}

TEST(PlacementToward, RefusesByName) {
  const auto message = [](const Placement& from, const Placement& to, int max_received) {
    try {
      (void)placement_toward(from, to, max_received);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      return std::string(e.what());
    }
    return std::string("nothing");
  };
  const Placement even = Placement::even(4, 2, 6);
  EXPECT_THAT(message(even, even, 0), HasSubstr("max_received 0 is less than 1"));
  EXPECT_THAT(message(even, Placement::even(4, 2, 8), 1),
              HasSubstr("placements with 6 slots and with 8"));
  EXPECT_THAT(message(even, Placement::even(4, 1, 6), 1),
              HasSubstr("placements with 2 ranks and with 1"));
  EXPECT_THAT(message(even, Placement::even(5, 2, 6), 1),
              HasSubstr("placements with 4 experts and with 5"));
}

}  // namespace
}  // namespace sluice::testing
