// Waits for ranks that do not come, ended by the caller; and transports in a child of fork(). Ranks
// are threads here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <thread>

#include "sluice/interrupt.h"
#include "sluice/transport.h"
#include "support/child_process.h"
#include "tcp_ranks.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Lt;

/// What `wait` throws when it is no longer wanted after 200 ms, and when.
TcpOutcome interrupted(const std::function<void()>& wait) {
  const auto begin = Clock::now();
  int num_asked = 0;
  TcpOutcome outcome;
  try {
    const Interruptible waits([&] { return ++num_asked, Clock::now() - begin >= 200ms; });
    wait();
  } catch (const Error& error) {
    outcome = {error.code(), error.what(), error.ranks(), {}};
  }
  outcome.took = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin);
  // About every 50 ms: not once, and not all the time.
  EXPECT_GE(num_asked, 1);
  EXPECT_LE(num_asked, 10);
  return outcome;
}

void expect_interrupted(const TcpOutcome& outcome) {
  EXPECT_EQ(outcome.code, ErrorCode::kInterrupted) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr("interrupted while it waited for other ranks"));
  EXPECT_THAT(outcome.ranks, IsEmpty());
  EXPECT_THAT(outcome.took, Lt(10s));
}

/// Of a job of this test's own, over ipc, as threads.
std::vector<std::unique_ptr<Transport>> ipc_transports(int num_ranks) {
  const std::string job = "interrupt" + std::to_string(getpid()) +
                          ::testing::UnitTest::GetInstance()->current_test_info()->name();
  std::vector<std::future<std::unique_ptr<Transport>>> coming;
  for (int r = 0; r < num_ranks; ++r) {
    coming.push_back(std::async(std::launch::async, [=] {
      return make_ipc_transport(
          {.job = job, .secret = "of this test alone", .rank = r, .num_ranks = num_ranks}, kLong);
    }));
  }
  std::vector<std::unique_ptr<Transport>> all;
  for (auto& one : coming) all.push_back(one.get());
  return all;
}

/// Both ranks' windows.
std::vector<std::unique_ptr<Window>> windows_of(
    const std::vector<std::unique_ptr<Transport>>& ranks) {
  auto other = std::async(std::launch::async, [&] { return ranks[1]->make_window(64, 1, kLong); });
  std::vector<std::unique_ptr<Window>> windows;
  windows.push_back(ranks[0]->make_window(64, 1, kLong));
  windows.push_back(other.get());
  return windows;
}

void wait_for_flag(Window& window) {
  const int flag = 0;
  (void)window.wait_flags(std::span(&flag, 1), 1, Clock::now() + kLong);
}

bool is_refused(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code() == ErrorCode::kInvalidArgument &&
           std::string(error.what()).find("which was forked from it") != std::string::npos;
  }
  return false;
}

TEST(Interrupt, EndsWaitsOfThreads) {
  const auto ranks = make_inproc_transports(2);
  const auto windows = windows_of(ranks);
  expect_interrupted(interrupted([&] { wait_for_flag(*windows[0]); }));
  expect_interrupted(interrupted([&] { (void)ranks[0]->all_gather({}, kLong); }));
}

TEST(Interrupt, EndsWaitsOverIpcAndTheOthersLearnWhy) {
  const auto ranks = ipc_transports(3);
  const auto windows = windows_of(ipc_transports(2));
  expect_interrupted(interrupted([&] { wait_for_flag(*windows[0]); }));
  const TcpOutcome outcome = interrupted([&] { (void)ranks[0]->all_gather({}, kLong); });
  expect_interrupted(outcome);
  EXPECT_THAT(outcome.text, HasSubstr("all_gather number 0 on rank 0"));
  for (const std::size_t r : {1, 2}) {
    try {
      (void)ranks[r]->all_gather({}, kLong);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerTimeout);
      EXPECT_THAT(error.what(), HasSubstr("missing rank(s) 0, whose call was interrupted"));
      EXPECT_THAT(error.ranks(), ::testing::ElementsAre(0));
    }
  }
  try {
    (void)ranks[0]->all_gather({}, kLong);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("this transport failed earlier"));
  }
}

TEST(Interrupt, EndsTheStartOfATransport) {
  expect_interrupted(interrupted([] {
    (void)make_ipc_transport({.job = "alone" + std::to_string(getpid()),
                              .secret = "of this test alone",
                              .rank = 0,
                              .num_ranks = 2},
                             kLong);
  }));
  expect_interrupted(interrupted([] {
    (void)make_ipc_transport({.job = "nobody" + std::to_string(getpid()),
                              .secret = "of this test alone",
                              .rank = 1,
                              .num_ranks = 2},
                             kLong);
  }));
  const TcpJob job(2);
  expect_interrupted(interrupted([&] { const TcpLink link(job.config(1), kLong); }));
}

TEST(Interrupt, EndsCollectivesOverTcpAndTheOthersLearnWhy) {
  const TcpJob job(3);
  std::promise<void> is_over;
  const auto over = is_over.get_future().share();
  auto zero = start_rank(job.config(0), kLong,
                         [](TcpLink& link) { (void)link.gather({}, "all_gather", kLong); });
  auto two = start_rank(job.config(2), kLong, [over](TcpLink& link) {
    over.wait();
    (void)link.gather({}, "all_gather", kLong);
  });
  {
    TcpLink one(job.config(1), kLong);
    expect_interrupted(interrupted([&] { (void)one.gather({}, "all_gather", kLong); }));
    const auto expect_named = [](const TcpOutcome& outcome) {
      EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
      EXPECT_THAT(outcome.text, HasSubstr("missing rank(s) 1, whose call was interrupted"));
    };
    expect_named(zero.get());  // Which waited, too.
    is_over.set_value();
    expect_named(two.get());
    EXPECT_THROW((void)one.gather({}, "all_gather", kLong), Error);
  }
}

TEST(Interrupt, AsksNobodyDuringAShortWait) {
  const auto ranks = make_inproc_transports(1);
  const Interruptible waits([] { return true; });
  EXPECT_EQ(ranks[0]->all_gather({}, kLong).size(), 1u);
}

TEST(Fork, TransportsAreRefusedInAChild) {
  const auto threads = make_inproc_transports(2), processes = ipc_transports(2);
  const auto windows = windows_of(processes);
  EXPECT_TRUE(holds_in_child([&] {
    return is_refused([&] { (void)threads[0]->all_gather({}, kLong); }) &&
           is_refused([&] { (void)processes[0]->all_gather({}, kLong); }) &&
           is_refused([&] { windows[0]->signal(1, 0, 7); }) &&
           is_refused([&] { windows[0]->put(1, 0, {}); }) &&
           is_refused([&] { wait_for_flag(*windows[0]); });
  }));
  EXPECT_EQ(windows[1]->flag(0), 0u);
}

TEST(Fork, DestructionInAChildTellsNobody) {
  auto ranks = ipc_transports(2);
  auto threads = make_inproc_transports(2);
  auto windows = windows_of(ranks);
  const TcpJob job(2);
  auto one = start_rank(job.config(1), kLong,
                        [](TcpLink& link) { (void)link.gather({}, "all_gather", kLong); });
  auto link = std::make_unique<TcpLink>(job.config(0), kLong);
  // One that a thread waits for at the moment.
  auto waiting = std::async(std::launch::async, [&] { (void)threads[1]->all_gather({}, kLong); });
  std::this_thread::sleep_for(50ms);
  EXPECT_TRUE(holds_in_child([&] {
    windows.clear(), ranks.clear(), threads.clear(), link.reset();
    return true;
  }));
  (void)threads[0]->all_gather({}, kLong);
  waiting.get();
  (void)link->gather({}, "all_gather", kLong);
  EXPECT_EQ(one.get().text, "");
  auto other = std::async(std::launch::async, [&] { return ranks[1]->all_gather({}, kLong); });
  EXPECT_EQ(ranks[0]->all_gather({}, kLong).size(), 2u);
  EXPECT_EQ(other.get().size(), 2u);
}

/// The child of a rank has its connections, and must not keep it alive in the eyes of the others.
TEST(Fork, ARankThatEndsIsMissedAlthoughAChildLivesOn) {
  const std::string name = "ends" + std::to_string(getpid());
  const auto config = [&](int rank) {
    return IpcConfig{.job = name, .secret = "of this test alone", .rank = rank, .num_ranks = 2};
  };
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const ChildProcess rank([&] {
    const auto transport = make_ipc_transport(config(1), kLong);
    const pid_t child = fork();
    if (child == 0) {
      alarm(30);
      pause();
      _exit(0);
    }
    (void)!write(ends[1], &child, sizeof child);
    (void)transport->all_gather({}, kLong);
    kill(getpid(), SIGKILL);
  });
  const auto transport = make_ipc_transport(config(0), kLong);
  pid_t child = 0;
  ASSERT_EQ(read(ends[0], &child, sizeof child), static_cast<ssize_t>(sizeof child));
  (void)transport->all_gather({}, kLong);
  const auto begin = Clock::now();
  try {
    (void)transport->all_gather({}, kLong);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("missing rank(s) 1, whose process has ended"));
  }
  EXPECT_THAT(Clock::now() - begin, Lt(20s));
  kill(child, SIGKILL);
  close(ends[0]), close(ends[1]);
}

}  // namespace
}  // namespace sluice::testing
