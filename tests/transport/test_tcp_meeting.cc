// Who may join a job over TCP, who may not, and what the ranks say of those that never came. Ranks
// are threads here, but one that is killed or stopped is a process.
#include <gmock/gmock.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "support/child_process.h"
#include "tcp_ranks.h"
#include "transport/handshake.h"
#include "transport/tcp_join.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ContainsRegex;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Clock = std::chrono::steady_clock;

FileDescriptor connect_until(const std::string& address) {
  for (;;) {
    Connected connected = connect_over_tcp(address, Clock::now() + 5s);
    if (connected.socket) return std::move(connected.socket);
    std::this_thread::sleep_for(5ms);
  }
}

TEST(TcpMeeting, RanksMeetInAnyOrderAndAsOftenAsTheyLike) {
  const TcpJob job(4);
  for (int round = 0; round < 20; ++round) {
    std::vector<std::future<TcpOutcome>> ranks;
    for (int i = 0; i < 4; ++i) ranks.push_back(start_rank(job.config((i + round) % 4), kLong));
    for (auto& rank : ranks) EXPECT_EQ(rank.get().text, "");
  }
}

TEST(TcpMeeting, ARankThatNeverComesIsNamedByAll) {
  const TcpJob job(4);
  // Time enough for rank 2 to come, also where a thread waits long for a processor.
  auto zero = start_rank(job.config(0), 2s), two = start_rank(job.config(2), 2s);
  for (auto* rank : {&zero, &two}) {
    const TcpOutcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(outcome.text, AllOf(HasSubstr("start of the tcp group on rank"),
                                    HasSubstr("missing rank(s) 1 3")));
    EXPECT_THAT(outcome.ranks, ElementsAre(1, 3)) << outcome.text;
    EXPECT_LT(outcome.took, 2s + 2s);
  }
}

// A rank whose own timeout passes long before rank 0's asks rank 0 who is missing.
TEST(TcpMeeting, ARankThatCannotWaitAsLongAsRankZeroNamesTheMissingOnes) {
  const TcpJob job(4);
  auto zero = start_rank(job.config(0), kLong), two = start_rank(job.config(2), 500ms);
  const TcpOutcome second = two.get();
  EXPECT_THAT(second.text, HasSubstr("after 500 ms still missing rank(s) 1 3"));
  EXPECT_THAT(second.ranks, ElementsAre(1, 3));
  const TcpOutcome first = zero.get();
  EXPECT_THAT(first.text, HasSubstr("rank 2 gave up; missing rank(s) 1 3"));
  EXPECT_THAT(first.ranks, ElementsAre(1, 3));
}

TEST(TcpMeeting, ARankThatIsKilledBeforeAllHaveComeIsNamed) {
  const TcpJob job(4);
  const ChildProcess three([&] { const TcpLink link(job.config(3), kLong); });
  auto zero = start_rank(job.config(0), 5s), two = start_rank(job.config(2), 5s);
  std::this_thread::sleep_for(1s);
  three.send(SIGKILL);
  // At once; at the timeout, with rank 1, if it had not joined by now.
  for (auto* rank : {&zero, &two}) {
    const TcpOutcome outcome = rank->get();
    EXPECT_THAT(outcome.text, HasSubstr("missing rank(s)"));
    EXPECT_THAT(outcome.ranks, Contains(3)) << outcome.text;
  }
}

TEST(TcpMeeting, ARankZeroThatStopsIsNamedAndNotThoseThatWaitForIt) {
  const TcpJob job(4);
  const ChildProcess zero([&] { const TcpLink link(job.config(0), kLong); });
  auto one = start_rank(job.config(1), 1s);
  std::this_thread::sleep_for(500ms);
  zero.send(SIGSTOP);
  auto two = start_rank(job.config(2), 1s), three = start_rank(job.config(3), 1s);
  for (auto* rank : {&one, &two, &three}) {
    const TcpOutcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(outcome.text, HasSubstr("after 1000 ms still missing rank(s) 0"));
    EXPECT_THAT(outcome.ranks, ElementsAre(0)) << outcome.text;
    EXPECT_LT(outcome.took, 1s + 2s);
  }
}

TEST(TcpMeeting, WithoutRankZeroNobodyStarts) {
  const TcpJob job(2);
  const TcpOutcome outcome = start_rank(job.config(1), 300ms).get();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.text, AllOf(HasSubstr("rank 1: after 300 ms still missing rank(s) 0"),
                                  HasSubstr(job.address + ": Connection refused")));
  EXPECT_THAT(outcome.ranks, ElementsAre(0));
}

// A wrong host in MASTER_ADDR: the others look for rank 0 there, and rank 0 waits here.
TEST(TcpMeeting, WhomNobodyFindsSaysWhatItWasToldAndWhereItListens) {
  const TcpJob job(2);
  TcpConfig named = job.config(0);
  named.addresses = {"rank-0.invalid:0"};
  const TcpOutcome exact = start_rank(job.config(0), 300ms).get();
  EXPECT_THAT(exact.text, HasSubstr("after 300 ms still missing rank(s) 1; rank 0, told " +
                                    job.address + ", listens at " + job.address));
  const TcpOutcome everywhere = start_rank(named, 300ms).get();
  EXPECT_THAT(everywhere.text, HasSubstr("still missing rank(s) 1; rank 0, told rank-0.invalid:0"));
  EXPECT_THAT(everywhere.text, ContainsRegex(R"(listens at .*127\.0\.0\.1:[1-9])"));
}

TEST(TcpMeeting, ALateRankIsWaitedFor) {
  const TcpJob job(2);
  auto one = start_rank(job.config(1), kLong);
  std::this_thread::sleep_for(300ms);
  auto zero = start_rank(job.config(0), kLong);
  EXPECT_EQ(zero.get().text + one.get().text, "");
}

TEST(TcpMeeting, AnotherJobsProcessIsShutOutAndDisturbsNobody) {
  const TcpJob job(2);
  auto zero = start_rank(job.config(0), kLong);
  TcpConfig stranger = job.config(1);
  stranger.secret = "of quite another job";
  const TcpOutcome refused = start_rank(stranger, kLong).get();
  EXPECT_EQ(refused.code, ErrorCode::kTransport);
  EXPECT_THAT(refused.text, HasSubstr("does not take this process for one of its job"));
  auto one = start_rank(job.config(1), kLong);
  EXPECT_EQ(zero.get().text + one.get().text, "");
}

/// The first words of a rank 0 to whoever comes to `listener`, and what is said to them.
void greet_and_hear(const FileDescriptor& listener, FileDescriptor& heard, Join& join) {
  while (!heard) heard = FileDescriptor(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  const Hello hello{kTcpGreeting, new_nonce()};
  ASSERT_EQ(send_all(heard.get(), std::as_bytes(std::span(&hello, 1)), Clock::now() + 5s),
            Io::kDone);
  ASSERT_EQ(
      receive_all(heard.get(), std::as_writable_bytes(std::span(&join, 1)), Clock::now() + 5s),
      Io::kDone);
}

// Rank 0 gave up waiting for others in the middle of this rank's handshake.
TEST(TcpMeeting, ARankZeroThatLeavesIsNoRankZeroThatRefuses) {
  const TcpJob job(2);
  FileDescriptor listener = listen_over_tcp(job.address, Clock::now() + 5s);
  auto one = start_rank(job.config(1), 1s);
  FileDescriptor heard;
  Join join{};
  ASSERT_NO_FATAL_FAILURE(greet_and_hear(listener, heard, join));
  listener.reset();
  heard.reset();
  const TcpOutcome outcome = one.get();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.ranks, ElementsAre(0));
  EXPECT_THAT(outcome.text, HasSubstr("Connection refused, after rank 0 broke off"));
}

TEST(TcpMeeting, WhatDoesNotProveItselfIsCountedAndIgnored) {
  const TcpJob job(2);
  auto zero = start_rank(job.config(0), 3s);
  // One is silent, one talks at length, one hangs up at once.
  std::vector<FileDescriptor> strangers;
  for (int i = 0; i < 3; ++i) strangers.push_back(connect_until(job.address));
  const std::vector<std::byte> noise(100'000, std::byte{'x'});
  (void)send_all(strangers[1].get(), noise, Clock::now() + 100ms);
  strangers[2].reset();
  const TcpOutcome outcome = zero.get();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.ranks, ElementsAre(1));
  EXPECT_THAT(outcome.text, AllOf(HasSubstr("still missing rank(s) 1"),
                                  HasSubstr("3 connections of other programs were refused")));
}

// A program that listens where rank 0 should sees one whole handshake of rank 1.
TEST(TcpMeeting, WhatIsHeardOfAHandshakeIsOfNoUse) {
  const TcpJob job(2);
  FileDescriptor listener = listen_over_tcp(job.address, Clock::now() + 5s);
  auto one = start_rank(job.config(1), 5s);
  FileDescriptor heard;
  Join join{};
  ASSERT_NO_FATAL_FAILURE(greet_and_hear(listener, heard, join));
  const std::string sent(reinterpret_cast<const char*>(&join), sizeof(join));
  EXPECT_THAT(sent, Not(HasSubstr(job.secret)));
  // It cannot prove itself to rank 1 ...
  Answer answer{};
  answer.kind = AnswerKind::kAccept;
  answer.proof = join.proof;
  (void)send_all(heard.get(), std::as_bytes(std::span(&answer, 1)), Clock::now() + 5s);
  const TcpOutcome outcome = one.get();
  EXPECT_EQ(outcome.code, ErrorCode::kTransport);
  EXPECT_THAT(outcome.text, HasSubstr("who listens there does not know the job's secret"));
  // ... nor, with rank 1's words, to rank 0.
  listener.reset();
  auto zero = start_rank(job.config(0), kLong);
  const FileDescriptor replay = connect_until(job.address);
  Hello fresh{};
  ASSERT_EQ(
      receive_all(replay.get(), std::as_writable_bytes(std::span(&fresh, 1)), Clock::now() + 5s),
      Io::kDone);
  (void)send_all(replay.get(), std::as_bytes(std::span(&join, 1)), Clock::now() + 5s);
  std::byte none{};
  EXPECT_EQ(receive_all(replay.get(), {&none, 1}, Clock::now() + 5s), Io::kClosed);
  auto honest = start_rank(job.config(1), kLong);
  EXPECT_EQ(zero.get().text + honest.get().text, "");
}

TEST(TcpMeeting, RanksThatDisagreeOnTheirNumberAreNamedToAll) {
  const TcpJob job(3);
  TcpConfig other = job.config(1);
  other.num_ranks = 2;
  auto zero = start_rank(job.config(0), kLong), one = start_rank(other, kLong);
  for (auto* rank : {&zero, &one}) {
    const TcpOutcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kTransport);
    EXPECT_THAT(outcome.text,
                HasSubstr("ranks disagree on num_ranks: rank 0 has '3', rank 1 has '2'"));
  }
}

TEST(TcpMeeting, TwoProcessesCannotBeOneRank) {
  const TcpJob job(3);
  auto zero = start_rank(job.config(0), kLong), one = start_rank(job.config(1), kLong),
       other = start_rank(job.config(1), kLong);
  for (auto* rank : {&zero, &one, &other}) {
    EXPECT_THAT(rank->get().text, HasSubstr("two processes claim rank 1"));
  }
}

// As one does that waited in vain for its acceptance, of a rank 0 that had no CPU.
TEST(TcpMeeting, WhoeverTriesAgainIsNoSecondProcess) {
  const TcpJob job(2);
  auto zero = start_rank(job.config(0), kLong);
  for (int i = 0; i < 3; ++i) {
    const FileDescriptor attempt = connect_until(job.address);
    Hello hello{};
    ASSERT_EQ(
        receive_all(attempt.get(), std::as_writable_bytes(std::span(&hello, 1)), Clock::now() + 5s),
        Io::kDone);
    const Join join = answer_to(hello, job.secret, kTcpGuest, 1, 2);
    ASSERT_EQ(send_all(attempt.get(), std::as_bytes(std::span(&join, 1)), Clock::now() + 5s),
              Io::kDone);
  }
  auto one = start_rank(job.config(1), kLong);
  EXPECT_EQ(zero.get().text + one.get().text, "");
}

TEST(TcpMeeting, APortThatIsTakenIsNamed) {
  const TcpJob job(2);
  const FileDescriptor taken = listen_over_tcp(job.address, Clock::now() + 5s);
  const TcpOutcome outcome = start_rank(job.config(0), kLong).get();
  EXPECT_EQ(outcome.code, ErrorCode::kTransport);
  EXPECT_THAT(outcome.text, HasSubstr("listening at " + job.address + ": Address already in use"));
}

TEST(TcpMeeting, TheFirstAddressThatAnswersIsTaken) {
  const TcpJob job(2);
  const FileDescriptor other = listen_over_tcp("127.0.0.1:0", Clock::now() + 5s);
  auto another = std::async(std::launch::async, [&] {  // It hangs up without a word.
    FileDescriptor caller;
    while (!caller) caller = FileDescriptor(accept4(other.get(), nullptr, nullptr, SOCK_CLOEXEC));
  });
  auto zero = start_rank(job.config(0), kLong);
  TcpConfig one = job.config(1);
  one.addresses = {"127.0.0.1:" + std::to_string(port_of_listener(other.get())), "127.0.0.1:1",
                   job.address};
  auto first = start_rank(one, kLong);
  EXPECT_EQ(first.get().text + zero.get().text, "");
}

TEST(TcpMeeting, AListenerOfTheCallersIsTakenOver) {
  FileDescriptor listener = listen_over_tcp("127.0.0.1:0", Clock::now() + 5s);
  TcpConfig one{.addresses = {"127.0.0.1:" + std::to_string(port_of_listener(listener.get()))},
                .secret = "not in any message",
                .rank = 1,
                .num_ranks = 2};
  auto second = start_rank(one, kLong);
  const int fd = dup(listener.get());
  listener.reset();
  auto first = start_rank({.secret = one.secret, .num_ranks = 2, .listener = fd}, kLong);
  EXPECT_EQ(first.get().text + second.get().text, "");
}

TEST(TcpMeeting, BadConfigurationsAreNamed) {
  const auto text = [](const TcpConfig& config) {
    const TcpOutcome outcome = start_rank(config, 100ms).get();
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument) << outcome.text;
    return outcome.text;
  };
  TcpConfig c{.addresses = {"h:1"}, .secret = "not in any message", .rank = 1, .num_ranks = 2};
  const auto with = [&](auto change) {
    TcpConfig copy = c;
    change(copy);
    return text(copy);
  };
  EXPECT_THAT(with([](TcpConfig& x) { x.num_ranks = 4097; }),
              HasSubstr("num_ranks 4097 over tcp is not in [1, 4096]"));
  EXPECT_THAT(with([](TcpConfig& x) { x.rank = 2; }), HasSubstr("rank 2 is not in [0, 2)"));
  EXPECT_THAT(with([](TcpConfig& x) { x.secret = ""; }), HasSubstr("secret ''"));
  const std::string short_one = with([](TcpConfig& x) { x.secret = "fifteen bytes.."; });
  EXPECT_THAT(short_one, HasSubstr("secret of 15 bytes can be guessed; at least 16"));
  EXPECT_THAT(short_one, Not(HasSubstr("fifteen"))) << "a secret is not printed";
  EXPECT_THAT(with([](TcpConfig& x) { x.addresses = {}; }), HasSubstr("rank 1 is told no address"));
  EXPECT_THAT(with([](TcpConfig& x) { x.listener = 1000; }), HasSubstr("listener 1000"));
  for (const char* address :
       {"", "host", ":1", "host:", "host:x", "host:70000", "::1:5", "[::1]5"}) {
    EXPECT_THAT(with([&](TcpConfig& x) { x.addresses = {address}; }),
                HasSubstr(std::string("address '") + address + "' is not host:port"));
  }
}

TEST(TcpMeeting, NoDescriptorAndNoThreadIsLeft) {
  const auto count = [](const char* folder) {
    const std::filesystem::directory_iterator entries(folder);
    return std::distance(begin(entries), end(entries));
  };
  std::thread([] {}).join();  // A sanitizer's own thread comes with the first one.
  const auto files = count("/proc/self/fd"), threads = count("/proc/self/task");
  for (int i = 0; i < 10; ++i) {
    const TcpJob lonely(3), job(2);
    auto zero = start_rank(lonely.config(0), 20ms), one = start_rank(lonely.config(1), 20ms);
    (void)zero.get(), (void)one.get();
    auto a = start_rank(job.config(0), kLong), b = start_rank(job.config(1), kLong);
    EXPECT_EQ(a.get().text + b.get().text, "");
  }
  EXPECT_EQ(count("/proc/self/fd"), files);
  // The system lists a thread for a moment after it was joined.
  const auto until = std::chrono::steady_clock::now() + 10s;
  while (count("/proc/self/task") > threads && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(5ms);
  }
  EXPECT_LE(count("/proc/self/task"), threads);
}

}  // namespace
}  // namespace sluice::testing
