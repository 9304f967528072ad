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

TEST(ForPiecesInParallel, EveryIndexComesOnceInPiecesOfTheSize) {
  for (const std::size_t count : {0, 1, 15, 16, 17, 1000}) {
    std::vector<std::atomic<int>> seen(count);
    std::atomic<std::size_t> num_short{0};
    for_pieces_in_parallel(count, 16, [&](std::size_t first, std::size_t end) {
      EXPECT_LT(first, end);
      EXPECT_EQ(first % 16, 0u);
      num_short += end - first < 16;
      for (std::size_t i = first; i < end; ++i) seen[i] += 1;
    });
    for (const std::atomic<int>& times : seen) EXPECT_EQ(times, 1);
    EXPECT_EQ(num_short, count % 16 == 0 ? 0u : 1u);
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
