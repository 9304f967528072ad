// Who is on which host, and whom NCCL connects; over a fake of NCCL (fake_nccl.h, which is not
// NCCL). Hosts are virtual: ranks are threads of one machine that say different names.
#include <gmock/gmock.h>

#include <barrier>
#include <future>
#include <thread>

#include "core/file_descriptor.h"
#include "fake_nccl.h"
#include "sluice/network.h"
#include "tcp_ranks.h"
#include "transport/nccl_transport.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsNull;
using ::testing::NotNull;

/// Runs `body` on the transport of every rank, a thread each; what they threw, joined.
std::string on_hosts(const std::vector<std::string>& hosts,
                     const std::function<void(NcclTransport&)>& body) {
  const TcpJob job(static_cast<int>(hosts.size()));
  FakeNccl nccl;
  std::vector<std::future<std::string>> ranks;
  for (int r = 0; r < job.num_ranks; ++r) {
    ranks.push_back(std::async(std::launch::async, [&, r]() -> std::string {
      try {
        const NcclApi api = nccl.api();
        NcclTransport transport(api, {.host = hosts[static_cast<std::size_t>(r)]}, job.config(r),
                                20s);
        EXPECT_EQ(transport.rank(), r);
        EXPECT_EQ(transport.num_ranks(), job.num_ranks);
        body(transport);
        (void)transport.all_gather({}, 20s);  // All are done.
        return "";
      } catch (const Error& error) {
        return error.what();
      }
    }));
  }
  std::string texts;
  for (auto& rank : ranks) texts += rank.get();
  return texts;
}

/// The ranks that this one's rail connects, found out by sending ranks.
std::vector<int> ranks_of_rail(NcclTransport& transport) {
  NcclRail& rail = *transport.rail();
  std::vector<int> ranks(static_cast<std::size_t>(rail.num_hosts()), -1);
  const int mine = transport.rank();
  std::vector<NcclRail::Send> sends;
  std::vector<NcclRail::Receive> receives;
  for (int h = 0; h < rail.num_hosts(); ++h) {
    if (h == rail.host()) {
      ranks[static_cast<std::size_t>(h)] = mine;
      continue;
    }
    sends.push_back({h, &mine, sizeof(mine)});
    receives.push_back({h, &ranks[static_cast<std::size_t>(h)], sizeof(int)});
  }
  FakeStream stream;
  rail.exchange(sends, receives, &stream);
  (void)transport.all_gather({}, 20s);  // Everybody has posted.
  EXPECT_EQ(stream.done, 1u);
  return ranks;
}

TEST(NcclTransport, RailsConnectTheRanksOfOneLocalIndex) {
  EXPECT_EQ(on_hosts({"a", "a", "b", "b"},
                     [](NcclTransport& t) {
                       EXPECT_EQ(t.name(), "nccl");
                       EXPECT_EQ(t.num_hosts(), 2);
                       EXPECT_THAT(t.host_of_rank(), ElementsAre(0, 0, 1, 1));
                       EXPECT_THAT(t.ranks_of(1), ElementsAre(2, 3));
                       const int local = t.rank() % 2;
                       EXPECT_THAT(ranks_of_rail(t), ElementsAre(local, local + 2));
                     }),
            "");
  EXPECT_EQ(on_hosts({"x", "y", "z", "x", "y", "z"},
                     [](NcclTransport& t) {
                       EXPECT_THAT(t.host_of_rank(), ElementsAre(0, 1, 2, 0, 1, 2));
                       const int first = t.rank() / 3 * 3;
                       EXPECT_THAT(ranks_of_rail(t), ElementsAre(first, first + 1, first + 2));
                     }),
            "");
}

TEST(NcclTransport, RanksOfAHostMeetOverIpc) {
  EXPECT_EQ(on_hosts({"a", "b", "a", "b"},
                     [](NcclTransport& t) {
                       EXPECT_EQ(t.mates().name(), "ipc");
                       EXPECT_EQ(t.mates().num_ranks(), 2);
                       const int rank = t.rank();
                       const auto all =
                           t.mates().all_gather(std::as_bytes(std::span(&rank, 1)), 20s);
                       for (int i = 0; i < 2; ++i) {
                         EXPECT_EQ(static_cast<int>(all[static_cast<std::size_t>(i)][0]),
                                   rank % 2 + 2 * i);
                       }
                     }),
            "");
}

TEST(NcclTransport, AGroupOfOneHostIsAGroupOverIpc) {
  EXPECT_EQ(on_hosts({"a", "a", "a"},
                     [](NcclTransport& t) {
                       EXPECT_THAT(t.rail(), IsNull());
                       const auto window = t.make_window(256, 3, 20s);
                       const int peer = (t.rank() + 1) % 3;
                       const std::byte sent{static_cast<unsigned char>(t.rank())};
                       window->put(peer, 5, {&sent, 1});
                       window->signal(peer, t.rank(), 1);
                       const int from = (t.rank() + 2) % 3;
                       EXPECT_TRUE(window
                                       ->wait_flags(std::vector<int>{from}, 1,
                                                    std::chrono::steady_clock::now() + 20s)
                                       .empty());
                       EXPECT_EQ(static_cast<int>(window->local()[5]), from);
                       EXPECT_EQ(t.counters().bytes_put[static_cast<std::size_t>(peer)], 1u);
                     }),
            "");
}

TEST(NcclTransport, WhatItCannotDoBetweenHostsIsRefused) {
  EXPECT_EQ(on_hosts({"a", "b"},
                     [](NcclTransport& t) {
                       EXPECT_THAT(t.rail(), NotNull());
                       for (const bool is_window : {true, false}) {
                         try {
                           if (is_window) (void)t.make_window(16, 1, 1s);
                           if (!is_window) (void)t.share_device_memory({}, 16, 1s);
                           ADD_FAILURE() << is_window;
                         } catch (const Error& error) {
                           EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
                           EXPECT_THAT(error.what(), HasSubstr("2 hosts"));
                         }
                       }
                     }),
            "");
}

TEST(NcclTransport, ACollectiveNamesTheHostOfWhoIsMissing) {
  EXPECT_EQ(on_hosts({"a", "b"},
                     [done = std::make_shared<std::promise<void>>()](NcclTransport& t) {
                       if (t.rank() == 1) return done->get_future().wait();
                       try {
                         (void)t.all_gather({}, 300ms);
                         ADD_FAILURE() << "rank 1 did not come";
                       } catch (const Error& error) {
                         EXPECT_THAT(error.ranks(), ElementsAre(1));
                         EXPECT_THAT(error.what(),
                                     HasSubstr("missing rank(s) 1: rank 1 of host b"));
                       }
                       done->set_value();
                     })
                .substr(0, 6),
            "this t");  // Each refuses the collective in which on_hosts() ends.
}

TEST(NcclTransport, HostsWithDifferentNumbersOfRanksAreRefusedByName) {
  const std::string texts = on_hosts({"one", "two", "two"}, [](NcclTransport&) { ADD_FAILURE(); });
  EXPECT_THAT(texts, HasSubstr("host one has 1 ranks and host two has 2: NCCL connects hosts with "
                               "as many ranks on each"));
}

/// An all_gather between threads.
ProcessGroup group_of(int rank, int num_ranks, std::barrier<>& barrier,
                      std::vector<std::vector<std::byte>>& parts) {
  return {rank, num_ranks, [&barrier, &parts, rank](std::span<const std::byte> mine) {
            parts[static_cast<std::size_t>(rank)].assign(mine.begin(), mine.end());
            barrier.arrive_and_wait();
            return parts;
          }};
}

TEST(NcclTransport, AnyGroupAgreesOnAMeetingPlace) {
  std::barrier barrier(3);
  std::vector<std::vector<std::byte>> parts(3);
  std::vector<std::future<TcpOutcome>> ranks;
  for (int r = 0; r < 3; ++r) {
    ranks.push_back(std::async(std::launch::async, [&, r] {
      const TcpConfig config = agree_on_meeting(group_of(r, 3, barrier, parts));
      EXPECT_EQ(config.secret.size(), 64u);
      EXPECT_FALSE(config.addresses.empty());
      EXPECT_EQ(config.listener >= 0, r == 0);
      return start_rank(config, 20s, [](TcpLink& link) { (void)link.gather({}, "x", 20s); }).get();
    }));
  }
  for (auto& rank : ranks) EXPECT_EQ(rank.get().text, "");
}

/// A communicator as the caller would have made it.
NcclComm make_communicator(const NcclApi& api, int num_ranks, const NcclId& id, int rank) {
  NcclComm comm = nullptr;
  EXPECT_EQ(api.init(&comm, num_ranks, id, rank, 0), kNcclInProgress);
  for (int status = kNcclInProgress; status == kNcclInProgress;) {
    EXPECT_EQ(api.async_error(comm, &status), kNcclSuccess);
    std::this_thread::yield();
  }
  return comm;
}

TEST(NcclTransport, ACommunicatorOfTheCallerIsAGroup) {
  constexpr int kRanks = 4;
  FakeNccl nccl;
  const NcclApi api = nccl.api();
  NcclId id{};
  ASSERT_EQ(api.new_id(&id), kNcclSuccess);
  std::vector<std::future<std::string>> ranks;
  for (int r = 0; r < kRanks; ++r) {
    ranks.push_back(std::async(std::launch::async, [&, r]() -> std::string {
      const NcclComm comm = make_communicator(api, kRanks, id, r);
      try {
        const ProcessGroup group = group_of_communicator(api, comm, 20s);
        EXPECT_EQ(group.rank, r);
        EXPECT_EQ(group.num_ranks, kRanks);
        const TcpConfig meeting = agree_on_meeting(group);
        NcclTransport transport(api, {.host = r < 2 ? "a" : "b"}, meeting, 20s);
        EXPECT_THAT(ranks_of_rail(transport), ElementsAre(r % 2, r % 2 + 2));
        // It is the caller's still, and works.
        const auto byte = static_cast<std::byte>(r);
        const auto all = group.all_gather({&byte, 1});
        for (std::size_t i = 0; i < kRanks; ++i) EXPECT_EQ(static_cast<std::size_t>(all[i][0]), i);
        (void)transport.all_gather({}, 20s);
      } catch (const Error& error) {
        return error.what();
      }
      EXPECT_EQ(api.abort(comm), kNcclSuccess);
      return "";
    }));
  }
  for (auto& rank : ranks) EXPECT_EQ(rank.get(), "");
}

TEST(NcclTransport, ACommunicatorWhoseRanksDoNotComeIsNotWaitedForWithoutEnd) {
  FakeNccl nccl;
  const NcclApi api = nccl.api();
  NcclId id{};
  ASSERT_EQ(api.new_id(&id), kNcclSuccess);
  auto other = std::async(std::launch::async, [&] { return make_communicator(api, 2, id, 1); });
  const NcclComm comm = make_communicator(api, 2, id, 0);
  (void)other.get();
  const ProcessGroup group = group_of_communicator(api, comm, 100ms);
  try {
    (void)agree_on_meeting(group);
    ADD_FAILURE() << "rank 1 did not come";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kPeerTimeout);
    EXPECT_THAT(error.what(),
                HasSubstr("on rank 0: after 100 ms not all of its 2 ranks have come"));
  }
  EXPECT_THROW((void)group_of_communicator(api, nullptr, 1s), Error);
  // Nothing to gather would be no meeting: NCCL waits for nobody then.
  try {
    (void)group.all_gather({});
    ADD_FAILURE() << "0 bytes";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_THAT(error.what(), HasSubstr("all_gather of 0 bytes"));
  }
}

}  // namespace
}  // namespace sluice::testing
