// Work that several cores share: sluice/lab/parallel.h.
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "sluice/lab/parallel.h"

namespace sluice {
namespace {

TEST(ForEachInParallel, EveryIndexComesOnce) {
  for (const std::size_t count : {0, 1, 2, 1000}) {
    std::vector<std::atomic<int>> seen(count);
    for_each_in_parallel(count, [&](std::size_t i) { seen[i] += 1; });
    for (const std::atomic<int>& times : seen) EXPECT_EQ(times, 1);
  }
}

TEST(ForEachInParallel, TheSmallestThatFailedIsThrownWhenAllHaveRun) {
  for (int round = 0; round < 100; ++round) {
    std::atomic<int> num_run{0};
    try {
      for_each_in_parallel(50, [&](std::size_t i) {
        num_run += 1;
        if (i == 7 || i == 8 || i == 49) throw std::runtime_error(std::to_string(i));
      });
      ADD_FAILURE() << "nothing was thrown";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "7");
    }
    EXPECT_EQ(num_run, 50);
  }
}

}  // namespace
}  // namespace sluice
