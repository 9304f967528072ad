// Ranks that dispatch for different layers of one exchange: every rank says so before a row is
// used, on one host and on several.
#include <gmock/gmock.h>

#include <fmt/core.h>

#include <chrono>

#include "multirank/run_ranks.h"
#include "support/scalar_backend.h"
#include "two_level_model.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int kRanks = 4;

Traffic traffic() {
  return make_traffic({3, 4, 3, 2}, 8, 3, 128, 1);
}

/// After a right call, ranks dispatch for the layers of `layer_of`. Each must name one of those
/// who differ from it, both layers, and soon.
void expect_named(Mode mode, const Hosts& hosts, const std::vector<int>& layer_of) {
  SCOPED_TRACE(::testing::Message() << to_string(mode) << ", " << hosts.to_string());
  const Traffic t = traffic();
  ExchangeConfig c = config_for(t, mode, hosts);
  c.peer_timeout = 20s;
  const auto failures = try_ranks(kRanks, [&](Transport& transport) {
    const int r = transport.rank();
    ScalarBackend backend;
    Exchange exchange = Exchange::create(c, transport, backend);
    expect_model(t, c, r, round_trip(exchange, t, r, 7));
    const int own = layer_of[static_cast<std::size_t>(r)];
    const auto start = std::chrono::steady_clock::now();
    try {
      (void)round_trip(exchange, t, r, own);
      ADD_FAILURE() << "rank " << r << " took rows of another layer";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kTransport) << error.what();
      ASSERT_FALSE(error.ranks().empty()) << error.what();
      for (const int other : error.ranks()) {
        const int theirs = layer_of[static_cast<std::size_t>(other)];
        EXPECT_NE(theirs, own) << error.what();
        EXPECT_THAT(error.what(), HasSubstr(fmt::format("for layer number {}", theirs)));
      }
      EXPECT_THAT(error.what(), HasSubstr(fmt::format("for layer number {}: ranks must", own)));
      EXPECT_THAT(error.what(), HasSubstr("epoch 2"));
    }
    EXPECT_LT(std::chrono::steady_clock::now() - start, 5s) << "rank " << r;
    EXPECT_THROW((void)exchange.dispatch(t.x_view(r), t.routing(r), {}), Error);
  });
  for (const auto& failure : failures) EXPECT_FALSE(failure) << describe(failure)->text;
}

TEST(DifferentCalls, EveryRankNamesLayersAndRanks) {
  const Hosts two = Hosts::even(2, kRanks), four = Hosts::even(4, kRanks);
  for (const Mode mode : kModes) {
    for (const Hosts& hosts : {Hosts(), two, four}) {
      expect_named(mode, hosts, {1, 2, 1, 1});
      expect_named(mode, hosts, {2, 1, 1, 1});
      expect_named(mode, hosts, {1, 1, 2, 2});
      expect_named(mode, hosts, {1, 1, 1, Routing::kMaxLayer});
    }
  }
}

TEST(DifferentCalls, OnOneHostAllWhoDifferAreNamed) {
  const Traffic t = traffic();
  for (const Mode mode : kModes) {
    const ExchangeConfig c = config_for(t, mode, Hosts());
    const auto failures = try_ranks(kRanks, [&](Transport& transport) {
      const int r = transport.rank();
      ScalarBackend backend;
      Exchange exchange = Exchange::create(c, transport, backend);
      (void)round_trip(exchange, t, r, r == 1 ? 0 : r == 3 ? 2 : 1);
    });
    const auto text = [&](std::size_t r) { return describe(failures[r])->text; };
    EXPECT_THAT(text(0), HasSubstr("rank(s) 1 dispatch for no named layer, rank(s) 3 for layer "
                                   "number 2, rank 0 for layer number 1: ranks must make the same "
                                   "calls in the same order"));
    EXPECT_THAT(text(1), HasSubstr("rank(s) 0, 2 dispatch for layer number 1, rank(s) 3 for layer "
                                   "number 2, rank 1 for no named layer"));
    EXPECT_THAT(describe(failures[2])->ranks, ElementsAre(1, 3));
    EXPECT_THAT(describe(failures[3])->ranks, ElementsAre(0, 1, 2));
  }
}

TEST(DifferentCalls, ALayerOutOfRangeIsRefused) {
  run_ranks(1, [&](Transport& transport) {
    const Traffic one = make_traffic({3}, 8, 3, 128, 1);
    ScalarBackend backend;
    Exchange exchange =
        Exchange::create(config_for(one, Mode::kNormal, Hosts()), transport, backend);
    for (const int layer : {-1, Routing::kMaxLayer + 1}) {
      Routing routing = one.routing(0);
      routing.layer = layer;
      try {
        (void)exchange.dispatch(one.x_view(0), routing, {});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_THAT(error.what(), HasSubstr(fmt::format("routing.layer {} is not in", layer)));
      }
    }
  });
}

}  // namespace
}  // namespace sluice::testing
