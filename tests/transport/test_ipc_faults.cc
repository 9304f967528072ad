// Whom the ranks of an ipc job blame when one of them breaks off: that rank, and never one that has
// only not come yet. Ranks are threads here, but one whose process ends is a process.
//
// Every test makes the order of events itself: a late rank comes after the others have failed.
#include <gmock/gmock.h>

#include <functional>
#include <future>
#include <memory>
#include <numeric>
#include <optional>

#include "multirank/run_ranks.h"
#include "support/child_process.h"
#include "transport/blame.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Clock = std::chrono::steady_clock;

constexpr int kRanks = 4;
/// Names the job for child processes, too.
const pid_t kThisProcess = getpid();
/// Longer than any wait of these tests lasts, unless it is to end at its timeout.
constexpr auto kLong = 60'000ms;

std::unique_ptr<Transport> join(int rank) {
  const auto* const test = ::testing::UnitTest::GetInstance()->current_test_info();
  return make_ipc_transport({.job = std::string(test->name()) + std::to_string(kThisProcess),
                             .secret = "of this test alone",
                             .rank = rank,
                             .num_ranks = kRanks},
                            kLong);
}

using Body = std::function<void(Transport&)>;

/// A rank on a thread of its own; what it threw.
std::future<std::optional<Failure>> start(int rank, Body body) {
  return std::async(std::launch::async, [rank, body = std::move(body)] {
    return describe(try_rank(rank, join(rank), body, {}));
  });
}

void gather(Transport& transport) {
  (void)transport.all_gather({}, kLong);
}

/// What is to be seen of a rank that failed because of rank `victim` alone.
void expect_blame(const std::optional<Failure>& failure, ErrorCode code, int victim,
                  const std::string& why) {
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, code) << failure->text;
  EXPECT_THAT(failure->text, HasSubstr("missing rank(s) " + std::to_string(victim) + why));
  EXPECT_THAT(failure->ranks, ElementsAre(victim)) << failure->text;
}

struct IpcRanks {
  static auto leave(int rank) {
    return start(rank, [](Transport&) {});
  }
  static auto gather(int rank, const std::shared_future<void>& cue) {
    return start(rank, [cue](Transport& transport) {
      if (cue.valid()) cue.wait();
      testing::gather(transport);
    });
  }
  static void end(int rank) { (void)join(rank).release(); }
  static bool has_failed(const std::optional<Failure>& outcome) { return outcome.has_value(); }
  static void expect_blame(const std::optional<Failure>& outcome, ErrorCode code, int victim,
                           const char* why) {
    testing::expect_blame(outcome, code, victim, why);
  }
};

TEST(IpcFaults, ARankThatLeavesIsNamedAndALateOneIsNot) {
  blame_each<IpcRanks>(Fate::kLeaves);
}

TEST(IpcFaults, AnEndedProcessIsNamedAndALateRankIsNot) {
  blame_each<IpcRanks>(Fate::kEnds);
}

// Rank 3 waits less long than the others, for rank 2, which comes after that.
TEST(IpcFaults, WhomARankGaveUpForIsNamedByTheOthersToo) {
  std::promise<void> gave_up;
  const std::shared_future<void> cue = gave_up.get_future().share();
  auto zero = start(0, gather), one = start(1, gather);
  auto two = start(2, [cue](Transport& transport) {
    cue.wait();
    gather(transport);
  });
  auto three = start(3, [](Transport& transport) {
    (void)transport.all_gather({}, 3'000ms);  // Enough for ranks 0 and 1 to come.
  });
  const auto third = three.get();
  gave_up.set_value();
  expect_blame(third, ErrorCode::kPeerTimeout, 2, "");
  EXPECT_THAT(third->text, HasSubstr("after 3000 ms still missing"));
  expect_blame(zero.get(), ErrorCode::kPeerTimeout, 2, ", which did not come in time");
  expect_blame(one.get(), ErrorCode::kPeerTimeout, 2, ", which did not come in time");
  // It cannot blame itself.
  expect_blame(two.get(), ErrorCode::kPeerTimeout, 0, ", which gave up this rank");
}

/// Rank r's flag r at every rank becomes 1.
void signal_all(Window& window, int rank) {
  for (int peer = 0; peer < kRanks; ++peer) window.signal(peer, rank, 1);
}

/// Waits until the flags [0, kRanks) are 1.
void wait_all(Window& window) {
  std::vector<int> flags(kRanks);
  std::iota(flags.begin(), flags.end(), 0);
  EXPECT_THAT(window.wait_flags(flags, 1, Clock::now() + kLong), IsEmpty());
}

TEST(IpcFaults, AWaitForFlagsNamesTheEndedProcessAndNotTheLateRank) {
  const ChildProcess two([] {
    const auto transport = join(2);
    (void)transport->make_window(64, kRanks, kLong).release();
    _exit(0);
  });
  std::promise<void> others_failed;
  const std::shared_future<void> cue = others_failed.get_future().share();
  std::vector<std::future<std::optional<Failure>>> ranks;
  for (const int r : {0, 1, 3}) {
    ranks.push_back(start(r, [r, cue](Transport& transport) {
      const auto window = transport.make_window(64, kRanks, kLong);
      if (r == 3) cue.wait();
      signal_all(*window, r);
      wait_all(*window);
    }));
  }
  const auto zero = ranks[0].get(), one = ranks[1].get();
  others_failed.set_value();
  for (const auto& failure : {zero, one, ranks[2].get()}) {
    expect_blame(failure, ErrorCode::kTransport, 2, ": process has ended");
  }
}

TEST(IpcFaults, ARankThatLeavesDoesNotEndTheWaitForALateOne) {
  std::promise<void> left;
  const std::shared_future<void> cue = left.get_future().share();
  std::vector<std::future<std::optional<Failure>>> ranks;
  for (int r = 0; r < kRanks; ++r) {
    ranks.push_back(start(r, [r, cue](Transport& transport) {
      const auto window = transport.make_window(64, kRanks, kLong);
      if (r == 3) cue.wait();
      signal_all(*window, r);
      if (r != 2) wait_all(*window);
    }));
  }
  EXPECT_FALSE(ranks[2].get());
  left.set_value();
  for (const int r : {0, 1, 3}) {
    const auto failure = ranks[static_cast<std::size_t>(r)].get();
    EXPECT_FALSE(failure) << failure->text;
  }
}

}  // namespace
}  // namespace sluice::testing
