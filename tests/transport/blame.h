// blame.h - one rank breaks off before a collective: the others blame it, and nobody who has only
// not come yet.
#pragma once

#include <gtest/gtest.h>

#include <future>
#include <optional>
#include <utility>
#include <vector>

#include "sluice/error.h"
#include "support/child_process.h"

namespace sluice::testing {

enum class Fate { kLeaves, kEnds };

/// Rank `victim` meets its fate before a collective to which rank `late` comes last, when the
/// others have failed. What a transport does in its own way is Ranks':
///
///   leave(rank), gather(rank, cue)   a rank on a thread, which joins and leaves, or gathers once
///                                    `cue`, if it is valid, is set; the future of its outcome
///   end(rank)                        joins, in a process that ends without a goodbye
///   has_failed(outcome), expect_blame(outcome, code, victim, why)
template <class Ranks>
void blame_one(Ranks ranks, int num_ranks, int victim, int late, Fate fate) {
  const bool ends = fate == Fate::kEnds;
  SCOPED_TRACE(::testing::Message() << "rank " << victim << (ends ? " ends" : " leaves")
                                    << ", rank " << late << " is late");
  std::optional<ChildProcess> child;
  if (ends) child.emplace([&] { ranks.end(victim); });
  std::promise<void> others_failed;
  const std::shared_future<void> cue = others_failed.get_future().share();
  std::vector<decltype(ranks.leave(victim))> early;
  decltype(ranks.leave(victim)) last;
  for (int r = 0; r < num_ranks; ++r) {
    if (r == victim) {
      if (!ends) early.push_back(ranks.leave(r));
    } else if (r == late) {
      last = ranks.gather(r, cue);
    } else {
      early.push_back(ranks.gather(r, {}));
    }
  }
  std::vector<decltype(last.get())> outcomes;
  for (auto& rank : early) outcomes.push_back(rank.get());
  others_failed.set_value();
  outcomes.push_back(last.get());
  int num_failed = 0;
  for (const auto& outcome : outcomes) {
    if (!ranks.has_failed(outcome)) continue;  // The victim that left.
    ++num_failed;
    ranks.expect_blame(outcome, ends ? ErrorCode::kTransport : ErrorCode::kPeerTimeout, victim,
                       ends ? ", whose process has ended" : ", which left before this collective");
  }
  EXPECT_EQ(num_failed, num_ranks - 1);
}

/// For ranks 0 to 3, each of them as the victim. `Ranks` are made anew each time.
template <class Ranks>
void blame_each(Fate fate) {
  for (const auto& [victim, late] : {std::pair(2, 3), {3, 1}, {0, 2}, {1, 3}}) {
    blame_one(Ranks(), 4, victim, late, fate);
  }
}

}  // namespace sluice::testing
