// The exchange for GPUs of several hosts, emulated (rail_emulation.h): every byte of both modes
// against the model that the exchange for host memory is compared with.
#include <gmock/gmock.h>

#include <chrono>

#include "emulated_rank.h"
#include "support/modes_and_wires.h"
#include "support/random_placement.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kTimeout = 20s;

void expect_exact(const Traffic& t, const ExchangeConfig& c, int num_rounds = 3) {
  for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
         EmulatedRank rank(transport, c, t.s1);
         for (int i = 0; i < num_rounds; ++i) {
           ASSERT_NO_FATAL_FAILURE(
               check_round(rank, t, transport.rank(), i % 2 == 0, t.routing(transport.rank())))
               << "round " << i;
         }
       })) {
    if (failure) std::rethrow_exception(failure);
  }
}

void expect_exact_everywhere(const Traffic& t, const Hosts& hosts) {
  for_every_way(t, hosts, [](const Traffic& of, const ExchangeConfig& c) { expect_exact(of, c); });
}

TEST(RailExchange, EveryByteOverEvenHosts) {
  for (const auto& [hosts, ranks] : {std::pair{2, 2}, {2, 4}, {4, 4}, {3, 6}}) {
    expect_exact_everywhere(loud(make_traffic(tokens_of(ranks), 24, 4, 256, 11)),
                            Hosts::even(hosts, ranks));
  }
}

TEST(RailExchange, HostsNeedNotBeInOrder) {
  expect_exact_everywhere(loud(make_traffic(tokens_of(6), 24, 4, 128, 12)),
                          Hosts::create({1, 0, 2, 0, 2, 1}));
}

TEST(RailExchange, SumsOfMorePartsThanHosts) {
  const Traffic t = loud(make_traffic(tokens_of(4), 32, 8, 128, 13));
  for (const Mode mode : kModes) {
    for (const int parts : {4, 8, 16, 32}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", parts " << parts);
      expect_exact(t, config_for(t, mode, Hosts::even(2, 4), parts));
      expect_exact(t, config_for(t, mode, Hosts::even(4, 4), parts));
    }
  }
}

TEST(RailExchange, AnyNumberOfTokensAndEntries) {
  for (const auto& tokens :
       {std::vector<std::int64_t>{0, 0, 0, 0}, {1, 0, 0, 0}, {0, 9, 0, 33}, {40, 1, 17, 5}}) {
    for (const int num_topk : {1, 2, 8, 32}) {
      SCOPED_TRACE(::testing::Message() << "k " << num_topk);
      const Traffic t = make_traffic(tokens, 40, num_topk, 128, 14);
      for (const Mode mode : kModes) {
        for (const int parts : {0, 1}) {
          expect_exact(t, config_for(t, mode, Hosts::even(2, 4), parts), 2);
        }
      }
    }
  }
}

TEST(RailExchange, AllEntriesEmptyOrOfOneExpert) {
  Traffic t = make_traffic(tokens_of(4), 8, 4, 128, 15);
  for (const std::int32_t expert : {-1, 0, 7}) {
    for (auto& idx : t.topk_idx) std::fill(idx.begin(), idx.end(), expert);
    for (const Mode mode : kModes) expect_exact(t, config_for(t, mode, Hosts::even(2, 4)));
  }
}

TEST(RailExchange, HalvesAndTwoInFlight) {
  const Traffic t = loud(make_traffic(tokens_of(4), 24, 4, 128, 16));
  for (const Mode mode : kModes) {
    const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4));
    for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
           EmulatedRank rank(transport, c, t.s1);
           Exchange::Impl& exchange = *rank.exchange;
           const int r = transport.rank();
           for (int i = 0; i < 6; ++i) {
             std::unique_ptr<Dispatched::Route> routes[2];
             std::vector<std::uint16_t> expert_y[2], y;
             for (int j : {0, 1}) {
               routes[j] = exchange.dispatch_send(t.x_view(r), t.routing(r), 0, {});
             }
             EXPECT_THROW((void)exchange.dispatch_send(t.x_view(r), t.routing(r), 0, {}), Error);
             for (int j : {0, 1}) exchange.dispatch_receive(*routes[j], {});
             rank.stream.synchronize();
             for (int j : {0, 1}) {
               ASSERT_NO_FATAL_FAILURE(check_batch(t, c, r, routes[j]->batch, expert_y[j]));
             }
             if (i % 2) std::swap(routes[0], routes[1]), std::swap(expert_y[0], expert_y[1]);
             for (int j : {0, 1}) {
               exchange.combine_send(
                   *routes[j], {expert_y[j].data(), DType::kBFloat16, routes[j]->batch.x.shape},
                   {});
             }
             for (int j : {0, 1}) {
               exchange.combine_receive(*routes[j], view_of(y, t, r), {});
               rank.stream.synchronize();
               routes[j].reset();
               ASSERT_NO_FATAL_FAILURE(expect_model(t, c, r, y));
             }
           }
         })) {
      if (failure) std::rethrow_exception(failure);
    }
  }
}

TEST(RailExchange, ACapacityExceededIsRefusedOnAllHosts) {
  Traffic t = make_traffic({5, 4, 3, 2}, 8, 1, 128, 17);
  ExchangeConfig c = config_for(t, Mode::kLowLatency, Hosts::even(2, 4));
  for (const int max_m : {14, 13}) {
    c.max_m = max_m;
    for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
           EmulatedRank rank(transport, c, t.s1);
           Traffic full = t;
           for (auto& idx : full.topk_idx) std::fill(idx.begin(), idx.end(), 6);
           const int r = transport.rank();
           for (int i = 0; i < 3; ++i) {
             if (max_m == 14) {
               ASSERT_NO_FATAL_FAILURE(check_round(rank, full, r, true, full.routing(r)));
               continue;
             }
             auto route = rank.exchange->dispatch(full.x_view(r), full.routing(r), 0, {});
             std::vector<std::uint16_t> y;
             const TensorView rows = route->expert_y;
             rank.exchange->combine(*route, rows, view_of(y, full, r), {});
             rank.stream.synchronize();
             route.reset();
             EXPECT_EQ(std::count(y.begin(), y.end(), 0x7fc0), std::ssize(y));
             try {
               rank.exchange->check();
               ADD_FAILURE() << "rank " << r << " was not told";
             } catch (const Error& error) {
               EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
               EXPECT_THAT(error.what(), HasSubstr("expert 6 14 rows, max_m is 13"));
             }
             Traffic light = t;
             for (auto& idx : light.topk_idx) std::fill(idx.begin(), idx.end(), -1);
             ASSERT_NO_FATAL_FAILURE(check_round(rank, light, r, true, light.routing(r)));
           }
         })) {
      if (failure) std::rethrow_exception(failure);
    }
  }
}

TEST(RailExchange, AnIndexOutOfRangeIsNamed) {
  const Traffic t = make_traffic({5, 4}, 4, 2, 128, 18);
  const ExchangeConfig c = config_for(t, Mode::kLowLatency, Hosts::even(2, 2));
  for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
         EmulatedRank rank(transport, c, t.s1);
         Traffic bad = t;
         bad.topk_idx[1][5] = 4;
         const int r = transport.rank();
         auto route = rank.exchange->dispatch(bad.x_view(r), bad.routing(r), 0, {});
         std::vector<std::uint16_t> y;
         const TensorView rows = route->expert_y;
         rank.exchange->combine(*route, rows, view_of(y, bad, r), {});
         rank.stream.synchronize();
         route.reset();
         if (r == 1) {
           try {
             rank.exchange->check();
             ADD_FAILURE() << "not told";
           } catch (const Error& error) {
             EXPECT_THAT(error.what(), HasSubstr("topk_idx[2, 1] = 4, not in [-1, 4)"));
           }
         } else {
           EXPECT_NO_THROW(rank.exchange->check());
         }
         ASSERT_NO_FATAL_FAILURE(check_round(rank, t, r, true, t.routing(r)));
       })) {
    if (failure) std::rethrow_exception(failure);
  }
}

TEST(RailExchange, ADispatchMayBeDroppedByAll) {
  const Traffic t = loud(make_traffic(tokens_of(4), 24, 4, 128, 19));
  for (const Mode mode : kModes) {
    const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4));
    for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
           EmulatedRank rank(transport, c, t.s1);
           const int r = transport.rank();
           for (int i = 0; i < 5; ++i) {
             if (i % 2) {
               (void)rank.exchange->dispatch(t.x_view(r), t.routing(r), 0, {});
             } else {
               (void)rank.exchange->dispatch_send(t.x_view(r), t.routing(r), 0, {});
             }
             ASSERT_NO_FATAL_FAILURE(check_round(rank, t, r, true, t.routing(r)));
           }
         })) {
      if (failure) std::rethrow_exception(failure);
    }
  }
}

TEST(RailExchange, WhatDoesNotFitIsRefusedByName) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 21);
  const ExchangeConfig c = config_for(t, Mode::kLowLatency, Hosts::even(2, 4));
  const auto failures = try_on_every_rank(4, [&](int) {
    auto transports = make_inproc_transports(1);
    const auto stream = std::make_shared<EmulatedStream>();
    PoisoningBackend backend(stream);
    (void)make_rail_exchange(c, *transports[0], backend,
                             std::make_unique<EmulatedDevice>(*stream, t.s1));
  });
  EXPECT_THAT(describe(failures[0])->text,
              HasSubstr("2 hosts of 2 ranks over transport inproc: GPUs of several hosts need"));
}

TEST(RailExchange, MemoryIsPlannedAndUnevenHostsAreRefused) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 23);
  const ExchangeConfig c = config_for(t, Mode::kLowLatency, Hosts::even(2, 4));
  const std::size_t planned = Exchange::workspace_bytes(c, 4, Device::Kind::kCuda);
  for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
         EmulatedRank rank(transport, c, t.s1);
         EXPECT_EQ(rank.exchange->held_bytes, planned);
       })) {
    if (failure) std::rethrow_exception(failure);
  }
  ExchangeConfig uneven = c;
  uneven.hosts = Hosts::create({0, 0, 0, 1});
  try {
    (void)Exchange::workspace_bytes(uneven, 4, Device::Kind::kCuda);
    ADD_FAILURE() << "planned";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("as many ranks on each host"));
  }
}

// What crosses the network is what network_bytes.h says.
TEST(RailExchange, BytesAreThoseOfTheFormulas) {
  const Traffic t = make_traffic({9, 4, 6, 2}, 24, 4, 256, 22);
  for (const Mode mode : kModes) {
    for (const int parts : {0, 1}) {
      const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4), parts);
      for (const auto& failure :
           try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
             EmulatedRank rank(transport, c, t.s1);
             const int r = transport.rank();
             constexpr std::uint64_t kRounds = 3;
             for (std::uint64_t i = 0; i < kRounds; ++i) {
               ASSERT_NO_FATAL_FAILURE(check_round(rank, t, r, true, t.routing(r)));
             }
             const int other = 1 - c.hosts.host_of(r);
             const auto relay = static_cast<std::size_t>(c.hosts.relay(r, other));
             std::uint64_t out = network_dispatch_piece_bytes(c);
             std::uint64_t home = network_combine_piece_bytes(c);
             if (mode == Mode::kNormal) {
               std::int64_t tokens = 0;
               home = 0;
               for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
                 const int entries =
                     entries_by_host(t, c.hosts, r, i)[static_cast<std::size_t>(other)];
                 tokens += entries > 0;
               }
               for (std::int64_t i = 0; i < t.num_tokens[relay]; ++i) {
                 home += network_combine_bytes(
                     c, entries_by_host(t, c.hosts, static_cast<int>(relay),
                                        i)[static_cast<std::size_t>(1 - other)]);
               }
               if (home > 0) home += kNetworkHomeHeaderBytes;
               out = network_dispatch_bytes(c, tokens);
             }
             const ExchangeCounters counters = rank.exchange->counters();
             EXPECT_EQ(counters.dispatch_bytes[relay], kRounds * out);
             EXPECT_EQ(counters.combine_bytes[relay], kRounds * home);
           })) {
        if (failure) std::rethrow_exception(failure);
      }
    }
  }
}

}  // namespace
}  // namespace sluice::testing
