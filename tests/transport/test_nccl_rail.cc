// What is around NCCL, over a fake of it (fake_nccl.h, which is not NCCL): rails between hosts,
// waits that end, and whom errors name. Ranks are threads that meet over TCP, but one that is
// killed or stopped is a process.
#include <gmock/gmock.h>
#include <unistd.h>

#include <future>
#include <latch>
#include <list>
#include <thread>

#include "fake_nccl.h"
#include "support/child_process.h"
#include "tcp_ranks.h"
#include "transport/nccl_rail.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

constexpr auto kTimeout = 1'000ms;
/// What a failure may take beyond the timeout.
constexpr auto kBound = kTimeout + 2s;

/// A rail of one rank on each of `num_hosts` hosts.
NcclRailConfig rail_of(int num_hosts, int host, std::chrono::milliseconds timeout = kTimeout) {
  NcclRailConfig config{.host = host, .timeout = timeout};
  for (int h = 0; h < num_hosts; ++h) {
    config.members.push_back(h);
    config.hosts.push_back(std::string(1, static_cast<char>('a' + h)));
  }
  config.id[0] = std::byte{7};
  return config;
}

/// All hosts send each other rounds of bytes of many sizes, also none.
void exchange_rounds(NcclRail& rail, FakeStream& stream, int num_rounds) {
  const int n = rail.num_hosts(), self = rail.host();
  const auto size = [](int round) { return static_cast<std::size_t>(round % 4) * 1'000; };
  const auto fill = [](int from, int to, int round) {
    return static_cast<unsigned char>(17 * from + 5 * to + round);
  };
  for (int round = 0; round < num_rounds; ++round) {
    std::vector<std::vector<unsigned char>> out(static_cast<std::size_t>(n)), in(out.size());
    std::vector<NcclRail::Send> sends;
    std::vector<NcclRail::Receive> receives;
    for (int h = 0; h < n; ++h) {
      const auto i = static_cast<std::size_t>(h);
      out[i].assign(size(round), fill(self, h, round)), in[i].resize(size(round));
      if (h == self) continue;
      sends.push_back({h, out[i].data(), out[i].size()});
      receives.push_back({h, in[i].data(), in[i].size()});
    }
    rail.exchange(sends, receives, &stream);
    const auto deadline = Clock::now() + kLong;
    while (stream.done < stream.begun && Clock::now() < deadline) {
      rail.check();
      std::this_thread::sleep_for(1ms);
    }
    rail.check();
    for (int h = 0; h < n; ++h) {
      if (h == self) continue;
      EXPECT_TRUE(in[static_cast<std::size_t>(h)] ==
                  std::vector<unsigned char>(size(round), fill(h, self, round)))
          << "round " << round << " from host " << h;
    }
  }
}

/// A rank with a rail, whose operations are watched.
std::future<TcpOutcome> start_member(const TcpJob& job, FakeNccl& nccl, int host,
                                     std::function<void(NcclRail&, FakeStream&)> body,
                                     std::chrono::milliseconds timeout = kTimeout) {
  const auto with_link = [&job, &nccl, host, body = std::move(body), timeout](TcpLink& link) {
    const NcclApi api = nccl.api();
    FakeStream stream;
    NcclRail rail(api, link, rail_of(job.num_ranks, host, timeout));
    const int watch = rail.watch({&stream.begun, &stream.done}, [](const Error&) {});
    body(rail, stream);
    rail.stop_watching(watch);
  };
  return start_rank(job.config(host), kLong, with_link);
}

TEST(NcclRail, EveryByteArrives) {
  for (const int num_hosts : {2, 3, 4}) {
    const TcpJob job(num_hosts);
    FakeNccl nccl;
    std::vector<std::future<TcpOutcome>> ranks;
    for (int h = 0; h < num_hosts; ++h) {
      ranks.push_back(start_member(job, nccl, h, [](NcclRail& rail, FakeStream& stream) {
        exchange_rounds(rail, stream, 20);
      }));
    }
    for (auto& rank : ranks) EXPECT_EQ(rank.get().text, "");
    EXPECT_EQ(nccl.num_aborted, num_hosts);  // Each communicator has gone.
  }
}

void expect_named(const TcpOutcome& outcome, ErrorCode code, int victim, const std::string& text) {
  EXPECT_EQ(outcome.code, code) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr(text));
  EXPECT_THAT(outcome.ranks, ElementsAre(victim)) << outcome.text;
}

// Rank 1 is alive, but does not call.
TEST(NcclRail, ARankThatDoesNotConnectIsNamed) {
  const TcpJob job(2);
  FakeNccl nccl;
  std::promise<void> failed;
  auto one = start_rank(job.config(1), kLong, [&](TcpLink&) { failed.get_future().wait(); });
  auto zero = start_member(job, nccl, 0, [](NcclRail&, FakeStream&) {});
  const TcpOutcome outcome = zero.get();
  failed.set_value();
  expect_named(outcome, ErrorCode::kPeerTimeout, 1,
               "connecting the hosts on rank 0 of host a: after 1000 ms still missing rank 1 of "
               "host b, at operation 0 of 1");
  EXPECT_LT(outcome.took, kBound);
  EXPECT_EQ(nccl.num_aborted, 1);
  (void)one.get();
}

TEST(NcclRail, AnEndedProcessIsNamedAtOnce) {
  const TcpJob job(2);
  FakeNccl nccl;
  const ChildProcess one([&] {
    (void)std::make_unique<TcpLink>(job.config(1), kLong).release();
    _exit(0);
  });
  const TcpOutcome outcome = start_member(
                                 job, nccl, 0, [](NcclRail&, FakeStream&) {}, kLong)
                                 .get();
  expect_named(outcome, ErrorCode::kTransport, 1, "missing rank 1 of host b, whose process has");
  EXPECT_LT(outcome.took, 20s);  // Not at the timeout.
}

TEST(NcclRail, AStoppedProcessIsNamedWithinTheTimeoutAndTwoSeconds) {
  const TcpJob job(2);
  FakeNccl nccl;
  const ChildProcess one([&] {
    TcpLink link(job.config(1), kLong);
    link.set_progress(1);
    raise(SIGSTOP);
  });
  auto zero = start_rank(job.config(0), kLong, [&](TcpLink& link) {
    const NcclApi api = nccl.api();
    std::this_thread::sleep_for(600ms);  // Until rank 1 has said how far it is, and stopped.
    const NcclRail rail(api, link, rail_of(2, 0));
  });
  const TcpOutcome outcome = zero.get();
  expect_named(outcome, ErrorCode::kPeerTimeout, 1,
               "still missing rank 1 of host b, not heard of any more");
  EXPECT_LT(outcome.took, kBound + 600ms);
}

// The device waits: rank 1 leaves out the fourth operation, and goes on living.
TEST(NcclRail, AnOperationThatOneRankDoesNotBeginFailsOnTheOther) {
  const TcpJob job(2);
  FakeNccl nccl;
  std::promise<void> failed;
  auto one = start_member(job, nccl, 1, [&](NcclRail& rail, FakeStream& stream) {
    exchange_rounds(rail, stream, 3);
    failed.get_future().wait();
  });
  std::atomic<int> num_told{0};
  auto zero = start_member(job, nccl, 0, [&](NcclRail& rail, FakeStream& stream) {
    exchange_rounds(rail, stream, 3);
    const int watch = rail.watch({&stream.begun, &stream.done}, [&](const Error& error) {
      EXPECT_EQ(nccl.num_aborted, 0);  // Told before kernels end.
      EXPECT_THAT(error.ranks(), ElementsAre(1));
      num_told += 1;
    });
    const auto begin = Clock::now();
    std::byte byte{};
    // Nothing here waits for the device, and nobody calls the rail again.
    rail.exchange(std::vector<NcclRail::Send>{{1, &byte, 1}}, {}, &stream);
    while (num_told == 0 && Clock::now() < begin + kLong) std::this_thread::sleep_for(1ms);
    EXPECT_LT(Clock::now() - begin, kBound);
    rail.stop_watching(watch);
    EXPECT_THROW(rail.exchange({}, {}, &stream), Error);
    rail.check();
  });
  const TcpOutcome outcome = zero.get();
  failed.set_value();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.text, AllOf(HasSubstr("between the hosts on rank 0 of host a: after 1000 ms"),
                                  HasSubstr("still missing rank 1 of host b, at operation")));
  EXPECT_EQ(num_told, 1);
  EXPECT_EQ(one.get().text, "");
}

// It had nothing more to send, and its last bytes may still be on their way.
TEST(NcclRail, ARankThatLeavesInOrderIsMissedAfterTheTimeoutAlone) {
  const TcpJob job(2);
  FakeNccl nccl;
  auto one = start_member(job, nccl, 1, [](NcclRail&, FakeStream&) {});
  auto zero = start_member(job, nccl, 0, [&](NcclRail& rail, FakeStream& stream) {
    EXPECT_EQ(one.get().text, "");
    const auto begin = Clock::now();
    std::byte byte{};
    rail.exchange(std::vector<NcclRail::Send>{{1, &byte, 1}}, {}, &stream);
    try {
      while (Clock::now() < begin + kLong) {
        rail.check();
        std::this_thread::sleep_for(1ms);
      }
    } catch (const Error&) {
      // Not at once. The rail counts from its last look, which was before `begin`.
      EXPECT_GE(Clock::now() - begin, kTimeout / 2);
      throw;
    }
  });
  expect_named(zero.get(), ErrorCode::kPeerTimeout, 1,
               "after 1000 ms missing rank 1 of host b, which has left");
}

TEST(NcclRail, WhatNcclReportsLaterEndsTheRailAtOnce) {
  const TcpJob job(2);
  FakeNccl nccl;
  const auto body = [&](NcclRail& rail, FakeStream& stream) {
    exchange_rounds(rail, stream, 3);
    nccl.async_status = FakeNccl::kRemoteError;
    const auto begin = Clock::now();
    while (Clock::now() < begin + kLong) {
      rail.check();
      std::this_thread::sleep_for(1ms);
    }
  };
  auto zero = start_member(job, nccl, 0, body), one = start_member(job, nccl, 1, body);
  for (auto* rank : {&zero, &one}) {
    const TcpOutcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kTransport);
    EXPECT_THAT(outcome.text, AllOf(HasSubstr("NCCL says: remote process exited; said by the fake"),
                                    HasSubstr("of host ")));
    EXPECT_LT(outcome.took, kBound);
  }
}

// What a listener uses may go as soon as its watch has been stopped.
TEST(NcclRail, AWatchIsStoppedOnlyWhenItsListenerHasReturned) {
  const TcpJob job(2);
  FakeNccl nccl;
  std::latch both_watch(2);
  const auto body = [&](NcclRail& rail, FakeStream& stream) {
    std::promise<void> begun;
    std::atomic<bool> has_returned{false};
    const int watch = rail.watch({&stream.begun, &stream.done}, [&](const Error&) {
      begun.set_value();
      std::this_thread::sleep_for(200ms);
      has_returned = true;
    });
    both_watch.arrive_and_wait();
    nccl.async_status = FakeNccl::kRemoteError;
    begun.get_future().wait();
    rail.stop_watching(watch);
    EXPECT_TRUE(has_returned);
  };
  auto zero = start_member(job, nccl, 0, body), one = start_member(job, nccl, 1, body);
  EXPECT_EQ(zero.get().text + one.get().text, "");
}

// Every rank is there, and nothing moves: it is the network.
TEST(NcclRail, ANetworkThatMovesNothingIsSaidToBeThat) {
  const TcpJob job(2);
  FakeNccl nccl;
  nccl.holds_operations = true;
  const auto body = [](NcclRail& rail, FakeStream& stream) {
    exchange_rounds(rail, stream, 2);  // The second: sizes that are not nothing.
  };
  auto zero = start_member(job, nccl, 0, body), one = start_member(job, nccl, 1, body);
  const TcpOutcome first = zero.get(), second = one.get();
  // Whoever fails first leaves, and the other one may see that.
  const std::string said = "nothing moves between it and rank ";
  const TcpOutcome& earlier = first.text.find(said) != std::string::npos ? first : second;
  EXPECT_THAT(earlier.text, HasSubstr(said));
  EXPECT_EQ(earlier.code, ErrorCode::kTransport);
  EXPECT_LT(std::max(first.took, second.took), kBound);
}

TEST(NcclRail, AnAbortThatHangsIsNotWaitedFor) {
  const TcpJob job(2);
  // The thread that is left to itself uses it until it ends, so nobody destroys it.
  static auto& kept = *new std::list<FakeNccl>;
  FakeNccl& nccl = kept.emplace_back();
  nccl.abort_hangs = true;
  std::promise<void> failed;
  auto one = start_rank(job.config(1), kLong, [&](TcpLink&) { failed.get_future().wait(); });
  const TcpOutcome outcome = start_member(job, nccl, 0, [](NcclRail&, FakeStream&) {}).get();
  failed.set_value();
  EXPECT_THAT(outcome.ranks, ElementsAre(1)) << outcome.text;
  EXPECT_LT(outcome.took, kBound);
  nccl.abort_hangs = false;
  (void)one.get();
}

// NCCL must not go on in a process whose memory goes: one that ends waits a little.
TEST(NcclRail, AProcessThatEndsWaitsForAnAbortThatWasLeft) {
  const TcpJob job(1);
  int ends[2] = {};
  ASSERT_EQ(pipe(ends), 0);
  const auto begin = Clock::now();
  const ChildProcess process([&] {
    FakeNccl nccl;
    NcclApi api = nccl.api();
    api.abort = [&ends, abort = api.abort](NcclComm comm) {
      const int status = abort(comm);
      std::this_thread::sleep_for(1'500ms);  // The rail has left it after 800 ms.
      (void)!write(ends[1], "x", 1);
      return status;
    };
    auto link = std::make_unique<TcpLink>(job.config(0), kLong);
    auto rail = std::make_unique<NcclRail>(api, *link, rail_of(1, 0));
    rail.reset();
    link.reset();
    std::exit(0);
  });
  close(ends[1]);
  char end = 0;
  EXPECT_EQ(read(ends[0], &end, 1), 1) << "the abort had not returned";
  close(ends[0]);
  EXPECT_GE(Clock::now() - begin, 1'500ms);
  EXPECT_LT(Clock::now() - begin, kBound + 3s);
}

TEST(NcclRail, ARailThatGoesWaitsForNobody) {
  const TcpJob job(2);
  FakeNccl nccl;
  std::promise<void> gone;
  auto one = start_member(job, nccl, 1, [&](NcclRail&, FakeStream&) { gone.get_future().wait(); });
  auto zero = start_member(job, nccl, 0, [](NcclRail& rail, FakeStream& stream) {
    std::byte byte{};
    rail.exchange(std::vector<NcclRail::Send>{{1, &byte, 1}}, {}, &stream);
  });
  const TcpOutcome outcome = zero.get();
  gone.set_value();
  EXPECT_EQ(outcome.text, "");
  EXPECT_LT(outcome.took, kBound);
  EXPECT_EQ(one.get().text, "");
}

TEST(NcclRail, AfterAFailureANewGroupCanBeMade) {
  FakeNccl nccl;
  for (int round = 0; round < 2; ++round) {
    const TcpJob job(2);
    const auto body = [&](NcclRail& rail, FakeStream& stream) {
      exchange_rounds(rail, stream, 2);
      if (round == 1) return;
      nccl.async_status = FakeNccl::kRemoteError;
      const auto begin = Clock::now();
      while (Clock::now() < begin + kLong) {
        rail.check();
        std::this_thread::sleep_for(1ms);
      }
    };
    nccl.async_status = kNcclSuccess;
    auto zero = start_member(job, nccl, 0, body), one = start_member(job, nccl, 1, body);
    const std::string text = zero.get().text + one.get().text;
    if (round == 0) {
      EXPECT_THAT(text, HasSubstr("remote process exited"));
    } else {
      EXPECT_EQ(text, "");
    }
  }
}

}  // namespace
}  // namespace sluice::testing
