// Ranks of the exchange for GPUs of several hosts that are lost, emulated (rail_emulation.h): whom
// every other rank names, and that no result is wrong without an error.
#include <gmock/gmock.h>

#include <chrono>
#include <thread>

#include "emulated_rank.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

constexpr auto kTimeout = 500ms;
/// Until every other rank has failed.
constexpr auto kLost = 2'900ms;

/// Where a rank is lost: before a half of dispatch or combine.
enum Stage { kBeforeDispatch, kBeforeReceive, kBeforeCombine, kBeforeSum, kNowhere };

/// One round of rank r, its halves queued one after the other as far as it comes; then what it has
/// found is thrown.
void lose_in_round(EmulatedRank& rank, const Traffic& t, int r, Stage stage,
                   std::vector<std::uint16_t>& y) {
  Exchange::Impl& exchange = *rank.exchange;
  if (stage == kBeforeDispatch) return;
  auto route = exchange.dispatch_send(t.x_view(r), t.routing(r), 0, {});
  if (stage == kBeforeReceive) return std::this_thread::sleep_for(kLost);
  exchange.dispatch_receive(*route, {});
  if (stage == kBeforeCombine) return std::this_thread::sleep_for(kLost);
  exchange.combine_send(*route, route->expert_y, {});
  if (stage == kBeforeSum) return std::this_thread::sleep_for(kLost);
  exchange.combine_receive(*route, view_of(y, t, r), {});
  rank.stream.synchronize();
  exchange.check();
}

void expect_lost_rank_named(EmulatedHosts& transport, const Traffic& t, const ExchangeConfig& c,
                            Stage stage) {
  constexpr int kVictim = 3;
  EmulatedRank rank(transport, c, t.s1);
  const int r = transport.rank();
  ASSERT_NO_FATAL_FAILURE(check_round(rank, t, r, true, t.routing(r)));
  std::vector<std::uint16_t> y;
  if (r == kVictim) {
    try {
      lose_in_round(rank, t, r, stage, y);
      if (stage == kBeforeDispatch) std::this_thread::sleep_for(kLost);
    } catch (const Error&) {
      // It is given up by the others.
    }
    return;
  }
  const auto begin = Clock::now();
  try {
    lose_in_round(rank, t, r, kNowhere, y);
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
  // A rank that leaves at once is missing, too, to one that looks a little later.
  std::this_thread::sleep_for(800ms);
}

// A rank that stops: every other one names it and its host, in time, wherever it stopped. And
// whether its relay's last pieces arrive or not: they do where an abort takes a while.
TEST(RailFaults, ALostRankIsNamedByAll) {
  const Traffic t = make_traffic(tokens_of(4), 24, 4, 128, 20);
  for (const auto abort_takes : {0ms, 200ms}) {
    for (const Mode mode : kModes) {
      for (const Stage stage : {kBeforeDispatch, kBeforeReceive, kBeforeCombine, kBeforeSum}) {
        SCOPED_TRACE(::testing::Message() << to_string(mode) << ", stage " << stage
                                          << ", an abort takes " << abort_takes.count() << " ms");
        const ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4));
        const auto failures = try_emulated_hosts(
            c.hosts, kTimeout,
            [&](EmulatedHosts& transport) { expect_lost_rank_named(transport, t, c, stage); },
            abort_takes);
        for (int r : {0, 1, 2}) {
          if (failures[static_cast<std::size_t>(r)]) {
            std::rethrow_exception(failures[static_cast<std::size_t>(r)]);
          }
        }
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace sluice::testing
