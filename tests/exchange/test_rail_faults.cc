// Ranks of the exchange for GPUs of several hosts that are lost, emulated (rail_emulation.h): whom
// every other rank names, and that no result is wrong without an error.
#include <gmock/gmock.h>

#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <iterator>
#include <thread>

#include "emulated_rank.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

constexpr auto kTimeout = 500ms;

/// Ranks that have seen what there was to see. Nobody leaves before all have: one that leaves is
/// missing, too, to a rank that looks a little later.
class Survivors {
 public:
  explicit Survivors(int num_survivors = 3) : num_survivors_(num_survivors) {}
  void arrive() { num_done_ += 1; }
  void wait_for_all() const {
    const auto until = Clock::now() + 10s;
    while (num_done_ < num_survivors_ && Clock::now() < until) std::this_thread::sleep_for(1ms);
  }

 private:
  int num_survivors_;
  std::atomic<int> num_done_{0};
};

/// Where a rank is lost: before a half of dispatch or combine.
enum Stage { kBeforeDispatch, kBeforeReceive, kBeforeCombine, kBeforeSum, kNowhere };

/// One round of rank r, its halves queued one after the other as far as it comes; then what it has
/// found is thrown, or it stays away until all others have failed.
void lose_in_round(EmulatedRank& rank, const Traffic& t, int r, Stage stage,
                   std::vector<std::uint16_t>& y, const Survivors& survivors) {
  Exchange::Impl& exchange = *rank.exchange;
  if (stage == kBeforeDispatch) return survivors.wait_for_all();
  auto route = exchange.dispatch_send(t.x_view(r), t.routing(r), 0, {});
  if (stage == kBeforeReceive) return survivors.wait_for_all();
  exchange.dispatch_receive(*route, {});
  if (stage == kBeforeCombine) return survivors.wait_for_all();
  exchange.combine_send(*route, route->expert_y, {});
  if (stage == kBeforeSum) return survivors.wait_for_all();
  exchange.combine_receive(*route, view_of(y, t, r), {});
  rank.stream.synchronize();
  exchange.check();
}

void expect_lost_rank_named(EmulatedHosts& transport, const Traffic& t, const ExchangeConfig& c,
                            Stage stage, Survivors& survivors) {
  constexpr int kVictim = 3;
  EmulatedRank rank(transport, c, t.s1);
  const int r = transport.rank();
  ASSERT_NO_FATAL_FAILURE(check_round(rank, t, r, true, t.routing(r)));
  std::vector<std::uint16_t> y;
  if (r == kVictim) {
    try {
      lose_in_round(rank, t, r, stage, y, survivors);
    } catch (const Error&) {
      // It is given up by the others.
    }
    return;
  }
  const auto begin = Clock::now();
  try {
    lose_in_round(rank, t, r, kNowhere, y, survivors);
    // What the victim does last concerns its own rail alone.
    EXPECT_TRUE(stage == kBeforeSum && r != 1) << "rank " << r << " did not notice";
    expect_model(t, c, r, y);
  } catch (const Error& error) {
    EXPECT_THAT(error.ranks(), ElementsAre(kVictim)) << error.what();
    EXPECT_THAT(error.what(), HasSubstr("rank 3 of host host-1")) << "rank " << r;
  }
  EXPECT_LT(Clock::now() - begin, kTimeout + 2s) << "rank " << r;
  rank.stream.synchronize();  // Nothing that it has queued waits any longer.
  EXPECT_LT(Clock::now() - begin, kTimeout + 2s) << "rank " << r;
  survivors.arrive();
  survivors.wait_for_all();
}

/// How NCCL's abort behaves. What is queued moves on until it is in effect; after that whoever
/// waits for a rank that aborted may get an error.
struct Abort {
  int takes_ms;
  bool breaks_connections;
};

/// Runs body(transport) for four ranks of two hosts; rethrows what any but rank 3 threw.
template <class Body>
void with_a_victim(const ExchangeConfig& c, const Abort& abort, const Body& body) {
  FakeNccl nccl;
  nccl.abort_takes_ms = abort.takes_ms;
  nccl.aborts_break_connections = abort.breaks_connections;
  const auto failures = try_emulated_hosts(c.hosts, kTimeout, body, nccl);
  for (int r : {0, 1, 2}) {
    const auto& failure = failures[static_cast<std::size_t>(r)];
    if (failure) std::rethrow_exception(failure);
  }
}

// A rank that stops: every other one names it and its host, in time, wherever it stopped. And
// whether its relay's last pieces arrive or not: they do where an abort takes a while, and where it
// takes none NCCL may say that a connection is broken.
void expect_named_by_all(const Abort& abort) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 20);
  for (const Mode mode : kModes) {
    for (const Stage stage : {kBeforeDispatch, kBeforeReceive, kBeforeCombine, kBeforeSum}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", stage " << stage);
      const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4));
      Survivors survivors;
      with_a_victim(c, abort, [&](EmulatedHosts& transport) {
        expect_lost_rank_named(transport, t, c, stage, survivors);
      });
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TEST(RailFaults, ALostRankIsNamedByAll) {
  expect_named_by_all({0, false});
}
TEST(RailFaults, ALostRankIsNamedByAllThoughConnectionsBreak) {
  expect_named_by_all({0, true});
}
TEST(RailFaults, ALostRankIsNamedByAllThoughItsRelaysPiecesArrive) {
  expect_named_by_all({200, true});
}

// Ranks that dispatch for different layers: every one of them names one that differs and both
// layers, and no result is taken for right. Where one has thrown before it queued its combine, the
// network ends at the timeout.
TEST(RailFaults, DifferentLayersAreNamedByAll) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 24);
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    for (const std::vector<int>& layers : {std::vector{1, 1, 1, 2}, {2, 1, 1, 1}, {1, 1, 2, 2}}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", rank 0 for " << layers[0]);
      const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4));
      Survivors all(4);
      const auto failures = try_emulated_hosts(c.hosts, kTimeout, [&](EmulatedHosts& transport) {
        EmulatedRank rank(transport, c, t.s1);
        const int r = transport.rank();
        Routing routing = t.routing(r);
        routing.layer = 7;
        ASSERT_NO_FATAL_FAILURE(check_round(rank, t, r, true, routing));
        const int own = layers[static_cast<std::size_t>(r)];
        routing.layer = own;
        std::vector<std::uint16_t> y;
        const auto begin = Clock::now();
        try {
          auto route = rank.exchange->dispatch(t.x_view(r), routing, 0, {});
          rank.exchange->combine(*route, route->expert_y, view_of(y, t, r), {});
          rank.stream.synchronize();
          rank.exchange->check();
          ADD_FAILURE() << "rank " << r << " took rows of another layer";
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::kTransport) << error.what();
          ASSERT_EQ(error.ranks().size(), 1u) << error.what();
          const int other = error.ranks()[0], theirs = layers[static_cast<std::size_t>(other)];
          EXPECT_NE(theirs, own) << error.what();
          EXPECT_THAT(error.what(),
                      HasSubstr(fmt::format("rank(s) {} dispatch for layer number {}, rank {} for "
                                            "layer number {}: ranks must make the same calls",
                                            other, theirs, r, own)));
        }
        EXPECT_LT(Clock::now() - begin, kTimeout + 2s) << "rank " << r;
        all.arrive();
        all.wait_for_all();
      });
      for (const auto& failure : failures) EXPECT_FALSE(failure);
    }
  }
}

// A graph that the program replays by itself: no call of the exchange sees the rank that stays
// away, and the relay's kernels go on. Every result is right, or NaN with an error that names it.
TEST(RailFaults, ALostRankIsNamedThoughGraphsAreReplayedOn) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 24);
  const ExchangeConfig c = config_for(t, Mode::kLowLatency, Hosts::even(2, 4));
  for (const Abort abort : {Abort{0, true}, {200, true}}) {
    Survivors survivors;
    with_a_victim(c, abort, [&](EmulatedHosts& transport) {
      EmulatedRank rank(transport, c, t.s1);
      Exchange::Impl& exchange = *rank.exchange;
      const int r = transport.rank();
      std::vector<std::uint16_t> y, expert_y;
      std::unique_ptr<Dispatched::Route> route;
      rank.stream.begin_capture();
      route = exchange.dispatch(t.x_view(r), t.routing(r), 0, {});
      auto graph = rank.stream.end_capture();
      rank.stream.replay(graph);
      rank.stream.synchronize();
      ASSERT_NO_FATAL_FAILURE(check_batch(t, c, r, route->batch, expert_y));
      std::ranges::copy(expert_y, static_cast<std::uint16_t*>(route->expert_y.data));
      rank.stream.begin_capture();
      exchange.combine(*route, route->expert_y, view_of(y, t, r), {});
      auto rest = rank.stream.end_capture();
      rank.stream.replay(rest);
      rank.stream.synchronize();
      exchange.check();
      expect_model(t, c, r, y);
      std::ranges::copy(rest, std::back_inserter(graph));
      rank.stream.replay(graph);  // Its rows are in the slot still.
      rank.stream.synchronize();
      exchange.check();
      expect_model(t, c, r, y);
      if (r == 3) return survivors.wait_for_all();

      const auto begin = Clock::now();
      for (int i = 0; i < 3; ++i) rank.stream.replay(graph);
      rank.stream.synchronize();
      EXPECT_LT(Clock::now() - begin, kTimeout + 2s) << "rank " << r;
      EXPECT_EQ(std::ranges::count(y, 0x7fc0), std::ssize(y)) << "rank " << r;
      try {
        exchange.check();
        ADD_FAILURE() << "rank " << r << " did not notice";
      } catch (const Error& error) {
        EXPECT_THAT(error.ranks(), ElementsAre(3)) << error.what();
        EXPECT_THAT(error.what(), HasSubstr("rank 3 of host host-1"));
      }
      survivors.arrive();
      survivors.wait_for_all();
    });
  }
}

}  // namespace
}  // namespace sluice::testing
