// The exchange for GPUs of several hosts, emulated (rail_emulation.h): every byte of both modes
// against the model that the exchange for host memory is compared with.
#include <gmock/gmock.h>

#include <chrono>
#include <set>

#include "rail_emulation.h"
#include "support/random_placement.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kTimeout = 20s;
constexpr WireFormat kWires[] = {WireFormat::kBf16, WireFormat::kE4m3Group, WireFormat::kE4m3Pow2,
                                 WireFormat::kE4m3Static, WireFormat::kE4m3Token};

/// An exchange of one rank, and what its calls need.
struct EmulatedRank {
  EmulatedRank(EmulatedHosts& transport, const ExchangeConfig& config, float s1)
      : exchange(make_rail_exchange(config, transport, backend,
                                    std::make_unique<EmulatedDevice>(transport.stream(), s1))) {}
  PoisoningBackend backend;
  std::unique_ptr<Exchange::Impl> exchange;
};

MutableTensorView view_of(std::vector<std::uint16_t>& y, const Traffic& t, int r) {
  y.assign(static_cast<std::size_t>(t.num_tokens[r] * t.hidden), 0x7fc1);
  MutableTensorView view;
  view.data = y.data(), view.dtype = DType::kBFloat16;
  view.shape = Shape{t.num_tokens[r], t.hidden};
  return view;
}

/// A dispatch and combine of rank r, checked. Rows of the experts are where they belong, or kept.
void check_round(Exchange::Impl& exchange, const Traffic& t, int r, bool in_place,
                 const Routing& routing) {
  const ExchangeConfig& c = exchange.config;
  auto route = exchange.dispatch(t.x_view(r), routing, t.static_scale(c.wire), {});
  std::vector<std::uint16_t> expert_y, y;
  ASSERT_NO_FATAL_FAILURE(check_batch(t, c, r, route->batch, expert_y));
  TensorView rows(expert_y.data(), DType::kBFloat16, route->batch.x.shape);
  if (in_place) {
    std::ranges::copy(expert_y, static_cast<std::uint16_t*>(route->expert_y.data));
    rows = route->expert_y;
  }
  exchange.combine(*route, rows, view_of(y, t, r), {});
  route.reset();
  exchange.check();
  expect_model(t, c, r, y);
}

void expect_exact(const Traffic& t, const ExchangeConfig& c, int num_rounds = 3) {
  for (const auto& failure : try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
         EmulatedRank rank(transport, c, t.s1);
         for (int i = 0; i < num_rounds; ++i) {
           ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, t, transport.rank(), i % 2 == 0,
                                               t.routing(transport.rank())))
               << "round " << i;
         }
       })) {
    if (failure) std::rethrow_exception(failure);
  }
}

void expect_exact_everywhere(const Traffic& t, const Hosts& hosts) {
  for (const Mode mode : kModes) {
    for (const WireFormat wire : kWires) {
      for (const int sum_parts : {0, 1}) {
        SCOPED_TRACE(::testing::Message() << hosts.to_string() << ", " << to_string(mode) << ", "
                                          << to_string(wire) << ", parts " << sum_parts);
        expect_exact(t, config_for(t, mode, hosts, sum_parts, wire));
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
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
               ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, full, r, true, full.routing(r)));
               continue;
             }
             auto route = rank.exchange->dispatch(full.x_view(r), full.routing(r), 0, {});
             std::vector<std::uint16_t> y;
             const TensorView rows = route->expert_y;
             rank.exchange->combine(*route, rows, view_of(y, full, r), {});
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
             ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, light, r, true, light.routing(r)));
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
         ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, t, r, true, t.routing(r)));
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
             ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, t, r, true, t.routing(r)));
           }
         })) {
      if (failure) std::rethrow_exception(failure);
    }
  }
}

// A rank that stops: every other one names it and its host, in time, wherever it stopped.
TEST(RailExchange, ALostRankIsNamedByAll) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 20);
  for (const Mode mode : kModes) {
    for (const int stage : {0, 1, 2, 3}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", stage " << stage);
      const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4));
      const auto failures = try_emulated_hosts(c.hosts, 500ms, [&](EmulatedHosts& transport) {
        EmulatedRank rank(transport, c, t.s1);
        const int r = transport.rank();
        ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, t, r, true, t.routing(r)));
        const auto begin = std::chrono::steady_clock::now();
        const auto lost = [&](int at) {
          if (r != 3 || stage != at) return false;
          std::this_thread::sleep_for(2'900ms);
          return true;
        };
        if (lost(0)) return;
        try {
          auto route = rank.exchange->dispatch_send(t.x_view(r), t.routing(r), 0, {});
          if (lost(1)) return;
          rank.exchange->dispatch_receive(*route, {});
          if (lost(2)) return;
          std::vector<std::uint16_t> y;
          rank.exchange->combine_send(*route, route->expert_y, {});
          if (lost(3)) return;
          rank.exchange->combine_receive(*route, view_of(y, t, r), {});
          rank.exchange->check();
          // What rank 3 does last concerns its own rail alone.
          EXPECT_TRUE(stage == 3 && r != 1) << "rank " << r << " did not notice";
        } catch (const Error& error) {
          EXPECT_THAT(error.ranks(), ElementsAre(3)) << error.what();
          EXPECT_THAT(error.what(), HasSubstr("rank 3 of host host-1")) << "rank " << r;
        }
        EXPECT_LT(std::chrono::steady_clock::now() - begin, 500ms + 2s) << "rank " << r;
        // A rank that leaves at once is missing, too, to one that looks a little later.
        std::this_thread::sleep_for(800ms);
      });
      for (int r : {0, 1, 2}) {
        if (failures[static_cast<std::size_t>(r)]) {
          std::rethrow_exception(failures[static_cast<std::size_t>(r)]);
        }
      }
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(RailExchange, WhatDoesNotFitIsRefusedByName) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 21);
  const ExchangeConfig c = config_for(t, Mode::kLowLatency, Hosts::even(2, 4));
  const auto failures = try_on_every_rank(4, [&](int) {
    auto transports = make_inproc_transports(1);
    PoisoningBackend backend;
    FakeStream stream;
    (void)make_rail_exchange(c, *transports[0], backend,
                             std::make_unique<EmulatedDevice>(stream, t.s1));
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
               ASSERT_NO_FATAL_FAILURE(check_round(*rank.exchange, t, r, true, t.routing(r)));
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
