// Who may join a job over ipc, who may not, and what the ranks say of those that never came. Ranks
// are threads here: the meeting does not know the difference.
#include <gmock/gmock.h>
#include <poll.h>
#include <sys/socket.h>

#include <filesystem>
#include <future>
#include <thread>

#include "core/sha256.h"
#include "sluice/error.h"
#include "support/child_process.h"
#include "transport/handshake.h"
#include "transport/ipc_rendezvous.h"
#include "transport/socket_io.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

/// A job of this test's own.
IpcConfig job(int rank, int num_ranks) {
  static const auto* const test = ::testing::UnitTest::GetInstance();
  return {.job = std::string(test->current_test_info()->name()) + std::to_string(getpid()),
          .secret = "not in any message",
          .rank = rank,
          .num_ranks = num_ranks};
}

/// What making the transport threw: code, text and ranks; nothing if it threw nothing.
struct Outcome {
  ErrorCode code = ErrorCode::kInternal;
  std::string text;
  std::vector<int> ranks;
};
std::future<Outcome> join(IpcConfig config, std::chrono::milliseconds timeout = 500ms) {
  return std::async(std::launch::async, [config, timeout]() -> Outcome {
    try {
      (void)make_ipc_transport(config, timeout);
      return {};
    } catch (const Error& error) {
      return {error.code(), error.what(), error.ranks()};
    }
  });
}

TEST(Rendezvous, RanksMeetInAnyOrderAndAsOftenAsTheyLike) {
  for (int round = 0; round < 20; ++round) {
    std::vector<std::future<Outcome>> ranks;
    for (int i = 0; i < 4; ++i) ranks.push_back(join(job((i + round) % 4, 4), 20s));
    for (auto& rank : ranks) EXPECT_EQ(rank.get().text, "");
  }
}

TEST(Rendezvous, ARankThatNeverComesIsNamedByAll) {
  auto zero = join(job(0, 4)), two = join(job(2, 4));
  for (auto* rank : {&zero, &two}) {
    const Outcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(outcome.text, AllOf(HasSubstr("start of the ipc transport on rank"),
                                    HasSubstr("after 500 ms still missing rank(s) 1 3")));
    EXPECT_THAT(outcome.ranks, ElementsAre(1, 3));
  }
}

// Rank 3 joined and then ended; rank 1 never comes.
TEST(Rendezvous, ARankThatEndsBeforeAllHaveComeIsMissingToo) {
  const IpcConfig three = job(3, 4);
  const ChildProcess child([&] { (void)make_ipc_transport(three, 20s); });
  auto zero = join(job(0, 4), 2s), two = join(job(2, 4), 2s);
  // It is missing, whether it had joined by now or not.
  std::this_thread::sleep_for(500ms);
  child.send(SIGKILL);
  for (auto* rank : {&zero, &two}) {
    const Outcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(outcome.text, HasSubstr("after 2000 ms still missing rank(s) 1 3"));
    EXPECT_THAT(outcome.ranks, ElementsAre(1, 3)) << outcome.text;
  }
}

// Rank 1 has joined when rank 0 stops, and then ranks 2 and 3 stand at rank 0's door.
TEST(Rendezvous, ARankZeroThatStopsIsNamedAndNotThoseThatWaitForIt) {
  const IpcConfig host = job(0, 4);
  const ChildProcess zero([&] { (void)make_ipc_transport(host, 20s); });
  auto one = join(job(1, 4), 2s);
  // It is to blame, whether rank 1 had joined by now or not.
  std::this_thread::sleep_for(500ms);
  zero.send(SIGSTOP);
  auto two = join(job(2, 4), 2s), three = join(job(3, 4), 2s);
  for (auto* rank : {&one, &two, &three}) {
    const Outcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(outcome.text, HasSubstr("after 2000 ms still missing rank(s) 0"));
    EXPECT_THAT(outcome.ranks, ElementsAre(0)) << outcome.text;
  }
}

TEST(Rendezvous, WithoutRankZeroNobodyStarts) {
  const Outcome outcome = join(job(1, 2)).get();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.text, HasSubstr("rank 1: after 500 ms still missing rank(s) 0"));
  EXPECT_THAT(outcome.ranks, ElementsAre(0));
}

TEST(Rendezvous, AWrongSecretIsShutOutAndDisturbsNobody) {
  auto zero = join(job(0, 2), 20s);
  IpcConfig stranger = job(1, 2);
  stranger.secret = "guessed by a stranger";
  const Outcome refused = join(stranger, 5s).get();
  EXPECT_EQ(refused.code, ErrorCode::kTransport);
  EXPECT_THAT(refused.text, HasSubstr("does not take this process for one of its job"));
  auto one = join(job(1, 2), 20s);
  EXPECT_EQ(zero.get().text, "");
  EXPECT_EQ(one.get().text, "");
}

// Rank 0 gave up waiting for others in the middle of this rank's handshake.
TEST(Rendezvous, ARankZeroThatLeavesIsNoRankZeroThatRefuses) {
  using std::chrono::steady_clock;
  FileDescriptor door = listen_at(ipc_meeting_name(job(0, 2).job));
  ASSERT_TRUE(door);
  auto one = join(job(1, 2), 1s);
  FileDescriptor guest;
  while (!guest) guest = FileDescriptor(accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC));
  const Hello hello{{"sluice ipc 2"}, new_nonce()};
  Join heard{};
  ASSERT_EQ(send_all(guest.get(), std::as_bytes(std::span(&hello, 1)), steady_clock::now() + 5s),
            Io::kDone);
  ASSERT_EQ(receive_all(guest.get(), std::as_writable_bytes(std::span(&heard, 1)),
                        steady_clock::now() + 5s),
            Io::kDone);
  door.reset();
  guest.reset();
  const Outcome outcome = one.get();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.ranks, ElementsAre(0));
  EXPECT_THAT(outcome.text, HasSubstr("still missing rank(s) 0, which broke off"));
}

TEST(Rendezvous, ProgramsThatSpeakSomethingElseAreCountedAndIgnored) {
  auto zero = join(job(0, 2), 3s);
  const std::string name = ipc_meeting_name(job(0, 2).job);
  // One is silent, one talks at length, one hangs up at once.
  std::vector<FileDescriptor> strangers;
  for (int i = 0; i < 3; ++i) {
    while (strangers.size() == static_cast<std::size_t>(i)) {
      FileDescriptor socket = connect_to(name);
      if (socket) strangers.push_back(std::move(socket));
    }
  }
  const std::vector<std::byte> noise(100'000, std::byte{'x'});
  (void)send_all(strangers[1].get(), noise, std::chrono::steady_clock::now() + 100ms);
  strangers[2].reset();
  const Outcome outcome = zero.get();
  EXPECT_EQ(outcome.code, ErrorCode::kPeerTimeout);
  EXPECT_THAT(outcome.ranks, ElementsAre(1));
  EXPECT_THAT(outcome.text, AllOf(HasSubstr("still missing rank(s) 1"),
                                  HasSubstr("3 connections of other programs were refused")));
}

TEST(Rendezvous, RanksThatDisagreeOnTheirNumberAreNamedToAll) {
  auto zero = join(job(0, 3), 5s), one = join(job(1, 2), 5s);
  for (auto* rank : {&zero, &one}) {
    const Outcome outcome = rank->get();
    EXPECT_EQ(outcome.code, ErrorCode::kTransport);
    EXPECT_THAT(outcome.text,
                HasSubstr("ranks disagree on num_ranks: rank 0 has '3', rank 1 has '2'"));
  }
}

TEST(Rendezvous, TwoProcessesCannotBeOneRank) {
  auto zero = join(job(0, 3), 5s), one = join(job(1, 3), 5s), other = join(job(1, 3), 5s);
  EXPECT_THAT(zero.get().text, HasSubstr("two processes claim rank 1"));
  EXPECT_THAT(one.get().text, HasSubstr("two processes claim rank 1"));
  EXPECT_THAT(other.get().text, HasSubstr("two processes claim rank 1"));
}

TEST(Rendezvous, TwoJobsOfOneNameOnAHostAreToldSo) {
  auto first = join(job(0, 2), 20s);
  const std::string name = ipc_meeting_name(job(0, 2).job);
  while (!connect_to(name)) std::this_thread::sleep_for(1ms);  // It waits.
  const Outcome second = join(job(0, 2)).get();
  EXPECT_EQ(second.code, ErrorCode::kTransport);
  EXPECT_THAT(second.text, HasSubstr("on rank 0: another process waits as rank 0 of a job of this "
                                     "name on this host (@" +
                                     name + ")"));
  EXPECT_EQ(join(job(1, 2), 20s).get().text, "");
  EXPECT_EQ(first.get().text, "");  // It is not disturbed.
}

TEST(Rendezvous, BadConfigurationsAreNamed) {
  const auto text = [](IpcConfig config) {
    const Outcome outcome = join(std::move(config)).get();
    EXPECT_EQ(outcome.code, ErrorCode::kInvalidArgument);
    return outcome.text;
  };
  EXPECT_THAT(text(job(0, 65)), HasSubstr("num_ranks 65 over ipc is not in [1, 64]"));
  EXPECT_THAT(text(job(3, 3)), HasSubstr("rank 3 is not in [0, 3)"));
  EXPECT_THAT(text({.job = "", .secret = "not in any message"}), HasSubstr("job ''"));
  EXPECT_THAT(text({.job = "j", .secret = ""}), HasSubstr("secret ''"));
  EXPECT_THAT(text({.job = "j", .secret = "x"}), HasSubstr("secret of 1 bytes can be guessed"));
}

TEST(Rendezvous, NoDescriptorIsLeftOpen) {
  const auto count = [] {
    const std::filesystem::directory_iterator open("/proc/self/fd");
    return std::distance(begin(open), end(open));
  };
  const auto before = count();
  for (int i = 0; i < 10; ++i) {
    auto zero = join(job(0, 3), 20ms), one = join(job(1, 3), 20ms);
    (void)zero.get(), (void)one.get();
    auto a = join(job(0, 2), 20s), b = join(job(1, 2), 20s);
    EXPECT_EQ(a.get().text + b.get().text, "");
  }
  EXPECT_EQ(count(), before);
}

// RFC 4231, test cases 2 and 6.
TEST(Rendezvous, ProofsAreHmacSha256) {
  const auto hmac = [](const std::string& key, const std::string& text) {
    return to_hex(hmac_sha256(std::as_bytes(std::span(key)), std::as_bytes(std::span(text))));
  };
  EXPECT_EQ(hmac("Jefe", "what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  EXPECT_EQ(
      hmac(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First"),
      "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

}  // namespace
}  // namespace sluice::testing
