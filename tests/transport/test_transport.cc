// What every transport promises: data before flags, bounded waits that name who is missing, and
// collectives that refuse ranks which ask for different things.
#include <gmock/gmock.h>

#include <cstring>
#include <future>
#include <numeric>

#include "multirank/run_ranks.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kTimeout = 20'000ms;
using Clock = std::chrono::steady_clock;

/// Bytes that tell round, source and place.
std::vector<std::byte> pattern(std::size_t bytes, int round, int source) {
  std::vector<std::byte> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    data[i] = static_cast<std::byte>(i * 31 + static_cast<std::size_t>(round * 7 + source * 13));
  }
  return data;
}

TEST(Transport, WindowsAreZeroAlignedAndOfTheAskedSize) {
  run_ranks(3, [](Transport& transport) {
    const auto window = transport.make_window(1000, 5, kTimeout);
    EXPECT_EQ(window->bytes(), 1000u);
    EXPECT_EQ(window->num_flags(), 5);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(window->local()) % 128, 0u);
    EXPECT_THAT(std::span(window->local(), 1000), Each(std::byte{0}));
    for (int f = 0; f < 5; ++f) EXPECT_EQ(window->flag(f), 0u);
  });
}

TEST(Transport, AFlagIsSeenOnlyAfterTheDataBeforeIt) {
  constexpr int kRanks = 4, kRounds = 300;
  // Larger than any message, so that data and flag travel apart; and odd.
  constexpr std::size_t kBytes = 300'001;
  run_ranks(kRanks, [](Transport& transport) {
    const int r = transport.rank();
    const auto window = transport.make_window(kBytes * kRanks, 2 * kRanks, kTimeout);
    for (int round = 1; round <= kRounds; ++round) {
      const std::size_t bytes =
          round % 10 == 0 ? kBytes : 1 + static_cast<std::size_t>(round) % 700;
      const auto data = pattern(bytes, round, r);
      for (int peer = 0; peer < kRanks; ++peer) {
        window->put(peer, kBytes * static_cast<std::size_t>(r), data);
        window->signal(peer, r, static_cast<std::uint64_t>(round));
      }
      std::vector<int> flags(kRanks);
      std::iota(flags.begin(), flags.end(), 0);
      const auto epoch = static_cast<std::uint64_t>(round);
      ASSERT_TRUE(window->wait_flags(flags, epoch, Clock::now() + kTimeout).empty());
      for (int source = 0; source < kRanks; ++source) {
        const auto expected = pattern(bytes, round, source);
        ASSERT_EQ(std::memcmp(window->local() + kBytes * static_cast<std::size_t>(source),
                              expected.data(), bytes),
                  0)
            << "round " << round << " from rank " << source;
      }
      // Nobody writes the next round before everybody has read this one.
      for (int peer = 0; peer < kRanks; ++peer) window->signal(peer, kRanks + r, epoch);
      for (int& f : flags) f += kRanks;
      ASSERT_TRUE(window->wait_flags(flags, epoch, Clock::now() + kTimeout).empty());
    }
  });
}

TEST(Transport, AWaitEndsAtItsDeadlineAndReturnsWhatIsMissing) {
  run_ranks(2, [](Transport& transport) {
    const auto window = transport.make_window(64, 3, kTimeout);
    window->signal(1 - transport.rank(), 1, 4);
    const int flags[] = {0, 1, 2};
    const auto start = Clock::now();
    EXPECT_THAT(window->wait_flags(flags, 4, start + 300ms), ElementsAre(0, 2));
    EXPECT_GE(Clock::now() - start, 300ms);
    EXPECT_LT(Clock::now() - start, 1300ms);
    EXPECT_EQ(window->flag(1), 4u);
    (void)transport.all_gather({}, kTimeout);
  });
}

TEST(Transport, AFlagNeverFalls) {
  run_ranks(2, [](Transport& transport) {
    const auto window = transport.make_window(64, 2, kTimeout);
    const int peer = 1 - transport.rank();
    for (const std::uint64_t epoch : {5, 3, 0}) window->signal(peer, 0, epoch);
    window->signal(peer, 1, 1);
    const int last = 1;
    ASSERT_TRUE(window->wait_flags({&last, 1}, 1, Clock::now() + kTimeout).empty());
    EXPECT_EQ(window->flag(0), 5u);
  });
}

TEST(Transport, APutPastTheEndIsRefused) {
  run_ranks(2, [](Transport& transport) {
    const auto window = transport.make_window(64, 1, kTimeout);
    const std::vector<std::byte> data(10);
    for (const std::size_t offset : {std::size_t{55}, std::size_t{65}, ~std::size_t{0}}) {
      try {
        window->put(1, offset, data);
        ADD_FAILURE() << offset << " was taken";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_THAT(error.what(), HasSubstr("window of 64"));
      }
    }
    if (transport.rank() == 0) window->put(1, 54, data);
  });
}

TEST(Transport, GatherIsOrderedByRankForAnySize) {
  run_ranks(3, [](Transport& transport) {
    for (const std::size_t bytes : {0u, 1u, 17u, 400'000u}) {
      const auto all = transport.all_gather(pattern(bytes, 1, transport.rank()), kTimeout);
      ASSERT_EQ(all.size(), 3u);
      for (int r = 0; r < 3; ++r) ASSERT_EQ(all[static_cast<std::size_t>(r)], pattern(bytes, 1, r));
    }
  });
}

TEST(Transport, AnAbsentRankIsNamed) {
  const auto failures = try_ranks(4, [](Transport& transport) {
    if (transport.rank() == 2) return;
    (void)transport.all_gather({}, 2s);  // enough for the others to come, on a busy machine too
  });
  for (const int r : {0, 1, 3}) {
    const auto failure = describe(failures[static_cast<std::size_t>(r)]);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(failure->text, HasSubstr("all_gather"));
    EXPECT_THAT(failure->text, HasSubstr("missing rank(s) 2"));
    EXPECT_THAT(failure->ranks, ElementsAre(2));
  }
}

TEST(Transport, ARankThatGathersOtherBytesIsNamed) {
  const auto failures = try_ranks(3, [](Transport& transport) {
    (void)transport.all_gather(pattern(transport.rank() == 1 ? 8 : 17, 1, 0), kTimeout);
  });
  for (const auto& f : failures) {
    const auto failure = describe(f);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kTransport);
    EXPECT_THAT(failure->text, HasSubstr("rank 1 brought 8"));
    EXPECT_THAT(failure->text, HasSubstr("different builds"));
  }
}

TEST(Transport, WindowsOfDifferentSizesAreRefusedOnEveryRank) {
  const auto failures = try_ranks(3, [](Transport& transport) {
    (void)transport.make_window(transport.rank() == 1 ? 128 : 64, 2, kTimeout);
  });
  for (const auto& f : failures) {
    const auto failure = describe(f);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kTransport);
    EXPECT_THAT(failure->text, HasSubstr("rank 0 asks for 64 bytes"));
    EXPECT_THAT(failure->text, HasSubstr("rank 1 for 128 bytes"));
  }
}

// Ranks as threads: one of them makes the window of all.
TEST(Transport, AWindowThatDoesNotFitIsRefusedOnEveryRankAndASmallerOneIsMade) {
  const auto transports = make_inproc_transports(3);
  std::vector<std::future<void>> ranks;
  for (const auto& transport : transports) {
    ranks.push_back(std::async(std::launch::async, [&transport] {
      const auto start = Clock::now();
      try {
        (void)transport->make_window(std::size_t{1} << 60, 1, kTimeout);
        ADD_FAILURE() << "rank " << transport->rank() << " has a window of 2^60 bytes";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
        EXPECT_THAT(error.what(), HasSubstr("a window of 1152921504606846976 bytes"));
      }
      EXPECT_LT(Clock::now() - start, kTimeout / 2);
      EXPECT_EQ(transport->make_window(100, 1, kTimeout)->bytes(), 100u);
    }));
  }
  for (auto& rank : ranks) rank.get();
}

TEST(Transport, BytesAreCountedForEachPeer) {
  run_ranks(3, [](Transport& transport) {
    const auto window = transport.make_window(4096, 1, kTimeout);
    const auto mine = static_cast<std::size_t>(transport.rank()) * 128;
    for (int peer = 0; peer < 3; ++peer) {
      for (int i = 0; i <= peer; ++i) window->put(peer, mine, std::vector<std::byte>(100));
    }
    EXPECT_THAT(transport.counters().bytes_put, ElementsAre(100, 200, 300));
    EXPECT_THAT(transport.counters().puts, ElementsAre(1, 2, 3));
  });
}

TEST(Transport, AWindowMayGoWhileItsPeersStillSignalIt) {
  run_ranks(2, [](Transport& transport) {
    for (std::uint64_t i = 1; i <= 50; ++i) {
      const auto window = transport.make_window(4096, 1, kTimeout);
      window->put(1 - transport.rank(), 0, std::vector<std::byte>(4096, std::byte{1}));
      window->signal(1 - transport.rank(), 0, i);
    }
  });
}

// A receiver that is busy elsewhere holds nobody up until far more than one message is under way.
TEST(Transport, ManyPutsToARankThatDoesNotLook) {
  run_ranks(2, [](Transport& transport) {
    constexpr std::size_t kBytes = 32 << 20;
    const auto window = transport.make_window(kBytes, 1, kTimeout);
    if (transport.rank() == 0) {
      const auto data = pattern(kBytes, 3, 0);
      for (std::size_t at = 0; at < kBytes; at += 1 << 20) {
        window->put(1, at, std::span(data).subspan(at, 1 << 20));
      }
      window->signal(1, 0, 1);
    } else {
      std::this_thread::sleep_for(50ms);
      const int flag = 0;
      ASSERT_TRUE(window->wait_flags({&flag, 1}, 1, Clock::now() + kTimeout).empty());
      const auto expected = pattern(kBytes, 3, 0);
      EXPECT_EQ(std::memcmp(window->local(), expected.data(), kBytes), 0);
    }
    (void)transport.all_gather({}, kTimeout);
  });
}

}  // namespace
}  // namespace sluice::testing
