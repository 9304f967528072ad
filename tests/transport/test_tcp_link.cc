// Collectives over TCP, and whom the ranks blame when one of them breaks off: that rank, and never
// one that has only not come yet. Every test makes the order of events itself.
#include <gmock/gmock.h>
#include <sys/socket.h>

#include <atomic>
#include <barrier>
#include <future>
#include <optional>
#include <thread>

#include "support/child_process.h"
#include "tcp_ranks.h"
#include "transport/blame.h"
#include "transport/tcp_channel.h"
#include "transport/tcp_join.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Lt;

constexpr int kRanks = 4;

void gather(TcpLink& link) {
  (void)link.gather({}, "all_gather", kLong);
}

std::vector<std::byte> part_of(int rank, int round) {
  // Also none, and more than a socket holds.
  const std::size_t size = round == 0 ? 0 : round == 1 ? 3'000'000 : static_cast<std::size_t>(rank);
  std::vector<std::byte> bytes(size);
  for (std::size_t i = 0; i < size; ++i)
    bytes[i] = static_cast<std::byte>(i * 7 + 13 * rank + round);
  return bytes;
}

TEST(TcpLink, EveryRankGetsEveryPart) {
  const TcpJob job(kRanks);
  std::vector<std::future<TcpOutcome>> ranks;
  for (int r = 0; r < kRanks; ++r) {
    ranks.push_back(start_rank(job.config(r), kLong, [r](TcpLink& link) {
      EXPECT_EQ(link.rank(), r);
      EXPECT_EQ(link.num_ranks(), kRanks);
      for (int round = 0; round < 50; ++round) {
        const auto all = link.gather(part_of(r, round), "all_gather", kLong);
        ASSERT_EQ(all.size(), kRanks);
        for (int s = 0; s < kRanks; ++s) {
          EXPECT_TRUE(all[static_cast<std::size_t>(s)] == part_of(s, round)) << round << " " << s;
        }
      }
    }));
  }
  for (auto& rank : ranks) EXPECT_EQ(rank.get().text, "");
}

TEST(TcpLink, OneRankIsAGroupToo) {
  const TcpJob job(1);
  auto only = start_rank(job.config(0), kLong, [](TcpLink& link) {
    EXPECT_THAT(link.gather(part_of(3, 2), "all_gather", kLong), ElementsAre(part_of(3, 2)));
  });
  EXPECT_EQ(only.get().text, "");
}

void expect_blame(const TcpOutcome& outcome, ErrorCode code, int victim, const std::string& why) {
  EXPECT_EQ(outcome.code, code) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr("missing rank(s) " + std::to_string(victim) + why));
  EXPECT_THAT(outcome.ranks, ElementsAre(victim)) << outcome.text;
}

// The system resets a connection that is closed with bytes that nobody has read, and drops what it
// has not sent yet: here, the end of a collective and word of rank 0's leaving.
TEST(TcpLink, ALinkThatGoesIsHeardToTheEndByARankThatKeepsTalking) {
  // It is in the hands of the system at once, but does not arrive before somebody reads.
  const std::vector<std::byte> big(1'000'000, std::byte{7});
  for (int round = 0; round < 5; ++round) {
    const TcpJob job(2);
    auto zero = start_rank(job.config(0), kLong,
                           [&](TcpLink& link) { (void)link.gather(big, "all_gather", kLong); });
    TcpChannel one(join_over_tcp(job.config(1), kLong));
    one.post(TcpMessage::kPart, 1);
    std::vector<std::pair<TcpMessage, std::uint64_t>> heard;
    const auto hear = [&](TcpMessage kind, std::uint64_t number, const auto& bytes) {
      heard.emplace_back(kind, number);
      // As a rank does: it begins the second collective when the first one is over.
      if (kind == TcpMessage::kAll && number == 1) one.post(TcpMessage::kPart, 2);
      EXPECT_TRUE(number != 2 || bytes.size() > big.size()) << bytes.size();
    };
    while (heard.empty() && one.send_some() && one.receive_some(hear)) {
    }
    const auto silence_ends = std::chrono::steady_clock::now() + 20ms;
    do {
      one.post(TcpMessage::kBeat, heard.size());
      if (!one.send_some()) break;
    } while (std::chrono::steady_clock::now() < silence_ends || one.receive_some(hear));
    one.close();
    EXPECT_THAT(heard, ElementsAre(std::pair(TcpMessage::kAll, 1), std::pair(TcpMessage::kAll, 2),
                                   std::pair(TcpMessage::kGone, 0)));
    EXPECT_EQ(zero.get().text, "");
  }
}

// Rank 0 of 2048 would otherwise hold what all ranks gave 2048 times.
TEST(TcpChannel, AMessageToManyIsInMemoryOnce) {
  int ends[2][2] = {};
  for (auto& pair : ends) ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
  TcpChannel a{FileDescriptor(ends[0][0])}, b{FileDescriptor(ends[1][0])};
  const FileDescriptor far_a(ends[0][1]);
  TcpChannel far_b{FileDescriptor(ends[1][1])};
  const auto bytes = part_of(3, 2);
  const TcpChannel::Message message = TcpChannel::make_message(TcpMessage::kAll, 5, bytes);
  a.post(message), b.post(message);
  EXPECT_EQ(message.use_count(), 3);
  EXPECT_TRUE(b.send_some());
  EXPECT_EQ(message.use_count(), 2);
  int num_heard = 0;
  EXPECT_TRUE(far_b.receive_some([&](TcpMessage kind, std::uint64_t number, const auto& payload) {
    EXPECT_TRUE(kind == TcpMessage::kAll && number == 5 && payload == bytes);
    num_heard += 1;
  }));
  EXPECT_EQ(num_heard, 1);
}

// Whoever hears it would otherwise never come to the other connections.
TEST(TcpChannel, APeerWhoNeverStopsTalkingIsHeardInTurns) {
  int ends[2] = {};
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  TcpChannel near{FileDescriptor(ends[0])}, far{FileDescriptor(ends[1])};
  std::uint64_t num_said = 0;
  const auto say_one = [&] {
    far.post(TcpMessage::kBeat, ++num_said, part_of(1, 2));
    EXPECT_TRUE(far.send_some());
  };
  std::uint64_t num_heard = 0;
  const auto answer = [&](TcpMessage, std::uint64_t number, const auto&) {
    EXPECT_EQ(number, ++num_heard);
    if (num_said < 1000) say_one();  // Before the hearer looks for more.
  };
  for (int i = 0; i < 3; ++i) say_one();
  for (std::uint64_t turn = 1; turn <= 4; ++turn) {
    EXPECT_TRUE(near.receive_some(answer));
    EXPECT_EQ(num_heard, 3 * turn);
  }
  // The end behind what had come is not left for another turn.
  far.close();
  EXPECT_FALSE(near.receive_some([&](TcpMessage, std::uint64_t, const auto&) { num_heard += 1; }));
  EXPECT_EQ(num_heard, num_said);
}

class TcpRanks {
 public:
  [[nodiscard]] auto leave(int rank) const { return start_rank(job_.config(rank), kLong); }
  [[nodiscard]] auto gather(int rank, const std::shared_future<void>& cue) const {
    return start_rank(job_.config(rank), kLong, [cue](TcpLink& link) {
      if (cue.valid()) cue.wait();
      testing::gather(link);
    });
  }
  void end(int rank) const {
    // Its process ends with a link that nobody closed.
    (void)std::make_unique<TcpLink>(job_.config(rank), kLong).release();
    _exit(0);
  }
  static bool has_failed(const TcpOutcome& outcome) { return !outcome.text.empty(); }
  static void expect_blame(const TcpOutcome& outcome, ErrorCode code, int victim, const char* why) {
    testing::expect_blame(outcome, code, victim, why);
    EXPECT_LT(outcome.took, 10s);  // At once, not at the timeout.
  }

 private:
  TcpJob job_{kRanks};
};

TEST(TcpLink, ARankThatLeavesIsNamedAndALateOneIsNot) {
  blame_each<TcpRanks>(Fate::kLeaves);
}

TEST(TcpLink, AnEndedProcessIsNamedAndALateRankIsNot) {
  blame_each<TcpRanks>(Fate::kEnds);
}

/// Rank `victim` is stopped before a collective that the others begin.
void stop_one(int victim) {
  SCOPED_TRACE(victim);
  const TcpJob job(kRanks);
  const ChildProcess child([&] {
    TcpLink link(job.config(victim), kLong);
    raise(SIGSTOP);
    gather(link);
  });
  std::vector<std::future<TcpOutcome>> ranks;
  for (int r = 0; r < kRanks; ++r) {
    if (r == victim) continue;
    ranks.push_back(start_rank(job.config(r), kLong, [](TcpLink& link) {
      const auto begin = std::chrono::steady_clock::now();
      try {
        (void)link.gather({}, "all_gather", 1s);
      } catch (const Error&) {
        EXPECT_THAT(std::chrono::steady_clock::now() - begin, Lt(1s + 2s));
        EXPECT_THROW(gather(link), Error);  // Out of step from now on.
        throw;
      }
    }));
  }
  for (auto& rank : ranks) {
    const TcpOutcome outcome = rank.get();
    expect_blame(outcome, ErrorCode::kPeerTimeout, victim, "");
    EXPECT_THAT(outcome.text, HasSubstr("all_gather number 0 on rank "));
  }
}

TEST(TcpLink, AStoppedRankIsNamedWithinTheTimeoutAndTwoSeconds) {
  stop_one(2);
  stop_one(0);
}

// Rank 3 is stopped, and rank 1 waits for it elsewhere: the others blame rank 3 alone, and who asks
// whom they gave up for learns the same.
TEST(TcpLink, ARankThatIsLateIsNotBlamedBesideOneThatIsSilent) {
  const TcpJob job(kRanks);
  const ChildProcess child([&] {
    TcpLink link(job.config(3), kLong);
    raise(SIGSTOP);
  });
  std::promise<void> done;
  auto one = start_rank(job.config(1), kLong, [&](TcpLink& link) {
    done.get_future().wait();
    EXPECT_THAT(link.gone(), ElementsAre(3));
  });
  std::vector<std::future<TcpOutcome>> ranks;
  std::barrier<> both(2);
  for (const int r : {0, 2}) {
    ranks.push_back(start_rank(job.config(r), kLong, [&](TcpLink& link) {
      try {
        (void)link.gather({}, "all_gather", 2s);
      } catch (const Error&) {
        both.arrive_and_wait();
        std::this_thread::sleep_for(200ms);  // Until rank 1 has heard of it.
        if (link.rank() == 0) done.set_value();
        std::this_thread::sleep_for(200ms);
        throw;
      }
    }));
  }
  for (auto& rank : ranks) expect_blame(rank.get(), ErrorCode::kPeerTimeout, 3, "");
  EXPECT_EQ(one.get().text, "");
}

// Rank 3 waits less long than the others, for rank 2, which comes after that.
TEST(TcpLink, WhomARankGaveUpForIsNamedByTheOthersToo) {
  const TcpJob job(kRanks);
  std::promise<void> gave_up;
  const std::shared_future<void> cue = gave_up.get_future().share();
  auto zero = start_rank(job.config(0), kLong, gather);
  auto one = start_rank(job.config(1), kLong, gather);
  auto two = start_rank(job.config(2), kLong, [cue](TcpLink& link) {
    cue.wait();
    gather(link);
  });
  auto three = start_rank(job.config(3), kLong, [](TcpLink& link) {
    (void)link.gather({}, "all_gather", 2s);  // Enough for ranks 0 and 1 to come.
  });
  const TcpOutcome third = three.get();
  expect_blame(third, ErrorCode::kPeerTimeout, 2, "");
  EXPECT_THAT(third.text, HasSubstr("after 2000 ms still missing"));
  expect_blame(zero.get(), ErrorCode::kPeerTimeout, 2, ", which did not come in time");
  expect_blame(one.get(), ErrorCode::kPeerTimeout, 2, ", which did not come in time");
  gave_up.set_value();
  const TcpOutcome second = two.get();  // It cannot blame itself.
  EXPECT_THAT(second.text, HasSubstr(", which gave up this rank"));
}

TEST(TcpLink, RanksKnowHowFarTheOthersAreAndWhoIsSilent) {
  const TcpJob job(3);
  const ChildProcess stopped([&] {
    TcpLink link(job.config(2), kLong);
    link.set_progress(5);
    gather(link);
    raise(SIGSTOP);
  });
  std::atomic<int> num_asked{0};
  const auto body = [&](TcpLink& link) {
    link.set_progress(static_cast<std::uint64_t>(10 + link.rank()));
    gather(link);
    std::this_thread::sleep_for(2s);
    const auto members = link.ask(1s);
    ASSERT_TRUE(members);
    ASSERT_EQ(members->size(), 3u);
    EXPECT_EQ((*members)[0].progress, 10u);
    EXPECT_EQ((*members)[1].progress, 11u);
    EXPECT_EQ((*members)[2].progress, 5u);
    EXPECT_LT((*members)[1].silent_ms, 1500u);
    EXPECT_GT((*members)[2].silent_ms, 1500u);
    EXPECT_THAT(link.gone(), IsEmpty());
    num_asked += 1;
    gather(link);
  };
  auto zero = start_rank(job.config(0), kLong, body), one = start_rank(job.config(1), kLong, body);
  while (num_asked < 2 && zero.wait_for(0s) != std::future_status::ready) {
    std::this_thread::sleep_for(5ms);
  }
  stopped.send(SIGKILL);
  expect_blame(zero.get(), ErrorCode::kTransport, 2, ", whose process has ended");
  expect_blame(one.get(), ErrorCode::kTransport, 2, ", whose process has ended");
}

}  // namespace
}  // namespace sluice::testing
