// Ranks on GPUs that dispatch for different layers of one exchange: every rank says so, and no row
// of another layer is used. Ranks are streams of this process or, with `--transport ipc --processes
// 4`, processes. Skips itself where there is no device.
#include <gmock/gmock.h>

#include <fmt/core.h>

#include <chrono>
#include <optional>

#include "exchange/cuda_exchange_test.h"

namespace sluice::testing {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

Routing for_layer(Routing routing, int layer) {
  routing.layer = layer;
  return routing;
}

/// A call for `layer`, and what it or the device found wrong.
std::optional<Error> failure_of_call(CudaRank& rank, int layer, bool in_halves) {
  Exchange& exchange = rank.exchange();
  try {
    std::optional<Dispatched> d;
    if (in_halves) {
      d = exchange.dispatch_send(rank.x(), for_layer(rank.routing(), layer), rank.stream());
      exchange.dispatch_receive(*d, rank.stream());
    } else {
      d = exchange.dispatch(rank.x(), for_layer(rank.routing(), layer), rank.stream());
    }
    const MutableTensorView rows = d->expert_y();
    exchange.combine(std::move(*d), rows, rank.y(), rank.stream());
    rank.backend().synchronize(rank.stream());
    exchange.check();
  } catch (const Error& error) {
    return error;
  }
  return {};
}

TEST_F(CudaExchangeTest, DifferentLayersAreNamedByAllAndANewExchangeWorks) {
  const Rounds rounds{.num_tokens = {5, 0, 40}, .num_experts = 6, .num_topk = 2, .seed = 9};
  for (const Mode mode : kModes) {
    for (const bool in_halves : {false, true}) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << (in_halves ? ", in halves" : ""));
      const ExchangeConfig config = config_for(rounds, mode);
      run(rounds, config, [&](CudaRank& rank) {
        for (int i = 0; i < 3; ++i) {
          ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, i)));
        }
        rank.load(make_round(rounds, 3));
        EXPECT_FALSE(failure_of_call(rank, 7, in_halves));
        const int own = rank.rank() == 1 ? Routing::kMaxLayer : 1;
        const auto begin = std::chrono::steady_clock::now();
        const auto failure = failure_of_call(rank, own, in_halves);
        ASSERT_TRUE(failure) << "rank " << rank.rank() << " took rows of another layer";
        EXPECT_LT(std::chrono::steady_clock::now() - begin, 5s);
        EXPECT_EQ(failure->code(), ErrorCode::kTransport);
        // Rank 1 may have seen one of the others, or both.
        std::string others;
        for (const int other : failure->ranks()) others += fmt::format(" {}", other);
        const int theirs = rank.rank() == 1 ? 1 : Routing::kMaxLayer;
        EXPECT_THAT(failure->what(),
                    HasSubstr(fmt::format("rank(s){} dispatch for layer number {}, rank {} for "
                                          "layer number {}: ranks must make the same calls",
                                          others, theirs, rank.rank(), own)));
        if (rank.rank() == 1) {
          EXPECT_THAT(failure->ranks(), AnyOf(ElementsAre(0), ElementsAre(2), ElementsAre(0, 2)));
        } else {
          EXPECT_THAT(failure->ranks(), ElementsAre(1));
        }
        EXPECT_TRUE(failure_of_call(rank, 1, in_halves)) << "the exchange went on";
        rank.barrier();
      });
      expect_exact(rounds, config, 3);
    }
  }
}

// The stamp of a word of counts has 16 bits of the epoch: what they say past their end.
TEST_F(CudaExchangeTest, SixtyFiveThousandCallsAndMore) {
  const Rounds rounds{.num_tokens = {1, 2}, .num_experts = 2, .num_topk = 1, .hidden = 128};
  ExchangeConfig config = config_for(rounds, Mode::kLowLatency);
  config.num_in_flight = 1;
  run(rounds, config, [&](CudaRank& rank) {
    Exchange& exchange = rank.exchange();
    rank.load(make_round(rounds, 0));
    for (int i = 0; i < 65'520; ++i) {
      Dispatched d =
          exchange.dispatch(rank.x(), for_layer(rank.routing(), 1 + i % 3), rank.stream());
      const MutableTensorView rows = d.expert_y();
      exchange.combine(std::move(d), rows, rank.y(), rank.stream());
    }
    rank.backend().synchronize(rank.stream());
    exchange.check();
    for (int i = 0; i < 40; ++i) {
      ASSERT_NO_FATAL_FAILURE(rank.round_trip(make_round(rounds, i))) << "round " << i;
    }
  });
}

}  // namespace
}  // namespace sluice::testing
