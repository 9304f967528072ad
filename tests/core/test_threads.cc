// The pool of threads of one rank, and which cores each rank of a machine gets.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "core/threads.h"
#include "sluice/error.h"

namespace sluice {
namespace {

std::vector<int> cores(int count) {
  std::vector<int> all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), 10);  // Not 0: a core's number is not its position.
  return all;
}

TEST(CoreShare, IsEvenDisjointAndWhole) {
  for (const int num_cores : {1, 2, 7, 16, 61}) {
    for (int num_ranks = 1; num_ranks <= num_cores; ++num_ranks) {
      std::vector<int> joined;
      for (int r = 0; r < num_ranks; ++r) {
        const std::vector<int> share = core_share(cores(num_cores), r, num_ranks);
        EXPECT_GE(static_cast<int>(share.size()), num_cores / num_ranks);
        EXPECT_LE(static_cast<int>(share.size()), (num_cores + num_ranks - 1) / num_ranks);
        joined.insert(joined.end(), share.begin(), share.end());
      }
      EXPECT_EQ(joined, cores(num_cores)) << num_ranks << " ranks";
    }
  }
}

TEST(CoreShare, IsNeverEmpty) {
  for (int r = 0; r < 9; ++r) EXPECT_EQ(core_share(cores(2), r, 9).size(), 1u);
}

TEST(CoreShare, RefusesARankThatIsNotThere) {
  EXPECT_THROW((void)core_share(cores(4), 2, 2), Error);
  EXPECT_THROW((void)core_share(cores(4), -1, 2), Error);
}

TEST(ThreadPool, RunsOnEveryThreadOnce) {
  for (const int n : {1, 2, 5}) {
    ThreadPool pool(n, available_cores());
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(n));
    for (int round = 0; round < 200; ++round) {
      pool.run([&](int thread) { ++calls[static_cast<std::size_t>(thread)]; });
    }
    for (const std::atomic<int>& count : calls) EXPECT_EQ(count.load(), 200);
  }
}

TEST(ThreadPool, DoesEveryTaskOnce) {
  ThreadPool pool(3, available_cores());
  for (const std::int64_t num_tasks : {0, 1, 2, 1000}) {
    std::vector<std::atomic<int>> done(static_cast<std::size_t>(num_tasks));
    pool.for_each_task(num_tasks, [&](std::int64_t task, int thread) {
      EXPECT_GE(thread, 0);
      EXPECT_LT(thread, 3);
      ++done[static_cast<std::size_t>(task)];
    });
    for (const std::atomic<int>& count : done) EXPECT_EQ(count.load(), 1);
  }
}

TEST(ThreadPool, ThrowsWhatTheLowestThreadThrewAfterAllReturned) {
  ThreadPool pool(4, available_cores());
  std::atomic<int> returned{0};
  try {
    pool.run([&](int thread) {
      ++returned;
      if (thread == 1 || thread == 3) throw std::runtime_error("thread " + std::to_string(thread));
    });
    FAIL() << "nothing was thrown";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "thread 1");
  }
  EXPECT_EQ(returned.load(), 4);
  pool.run([&](int) { ++returned; });  // And works on.
  EXPECT_EQ(returned.load(), 8);
}

TEST(ThreadPool, RefusesNoThreads) {
  EXPECT_THROW(ThreadPool(0, available_cores()), Error);
}

}  // namespace
}  // namespace sluice
