// Dispatch and combine, every byte against the model: each ugly case by name, both modes, every
// wire.
#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <random>

#include "exchange_model.h"
#include "multirank/run_ranks.h"
#include "support/modes_and_wires.h"
#include "support/scalar_backend.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

ExchangeConfig config_for(const Traffic& t, Mode mode, WireFormat wire = WireFormat::kE4m3Group) {
  const std::int64_t largest = *std::max_element(t.num_tokens.begin(), t.num_tokens.end());
  return {.mode = mode,
          .wire = wire,
          .num_experts = t.num_experts,
          .num_topk = t.num_topk,
          .hidden = t.hidden,
          .max_tokens_per_rank = static_cast<int>(std::max<std::int64_t>(1, largest)),
          .routed_scaling_factor = 2.5f,
          .peer_timeout = std::chrono::milliseconds(20'000)};
}

MutableTensorView output_view(std::vector<std::uint16_t>& y, const Traffic& t, int r) {
  y.assign(static_cast<std::size_t>(t.num_tokens[r] * t.hidden), 0x7fc1);
  MutableTensorView view;
  view.data = y.data(), view.dtype = DType::kBFloat16;
  view.shape = Shape{t.num_tokens[r], t.hidden};
  return view;
}

void expect_combined(const Traffic& t, const ExchangeConfig& c, int r,
                     const std::vector<std::uint16_t>& y) {
  for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
    const auto expected = combined(t, r, i, c.wire, c.routed_scaling_factor);
    const std::vector<std::uint16_t> actual(y.begin() + i * t.hidden,
                                            y.begin() + (i + 1) * t.hidden);
    ASSERT_EQ(actual, expected) << "rank " << r << " token " << i;
  }
}

/// One dispatch and combine of rank `transport.rank()`, checked element by element.
void round_trip(Exchange& exchange, const Traffic& t, int r) {
  Dispatched d =
      exchange.dispatch(t.x_view(r), t.routing(r), {}, t.static_scale(exchange.config().wire));
  std::vector<std::uint16_t> expert_y, y;
  ASSERT_NO_FATAL_FAILURE(check_batch(t, exchange.config(), r, d.batch(), expert_y));
  const TensorView rows(expert_y.data(), DType::kBFloat16, d.batch().x.shape);
  exchange.combine(std::move(d), rows, output_view(y, t, r), {});
  ASSERT_NO_FATAL_FAILURE(expect_combined(t, exchange.config(), r, y));
}

void expect_exact(const Traffic& t, const ExchangeConfig& config) {
  run_ranks(t.num_ranks(), [&](Transport& transport) {
    ScalarBackend backend;
    Exchange exchange = Exchange::create(config, transport, backend);
    round_trip(exchange, t, transport.rank());
  });
}

void expect_exact_everywhere(const Traffic& t) {
  for (const Mode mode : kModes) {
    for (const WireFormat wire : kWires) {
      SCOPED_TRACE(::testing::Message() << to_string(mode) << ", " << to_string(wire));
      expect_exact(t, config_for(t, mode, wire));
    }
  }
}

TEST(Exchange, EveryByteArrivesOverAnyNumberOfRanks) {
  for (const int num_ranks : {1, 2, 3, 4, 8}) {
    SCOPED_TRACE(num_ranks);
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(num_ranks), 5);
    tokens.back() = 3;
    expect_exact_everywhere(make_traffic(tokens, 24, 4, 256, 11));
  }
}

TEST(Exchange, NoTokensOnSomeRank) {
  expect_exact_everywhere(make_traffic({0, 4, 0}, 6, 2, 128, 1));
}
TEST(Exchange, NoTokensAnywhere) {
  expect_exact_everywhere(make_traffic({0, 0}, 6, 2, 128, 1));
}
TEST(Exchange, OneToken) {
  expect_exact_everywhere(make_traffic({1, 0, 0, 0}, 8, 2, 128, 1));
}
TEST(Exchange, OddCounts) {
  expect_exact_everywhere(make_traffic({7, 1, 3}, 9, 3, 384, 2));
}

TEST(Exchange, EveryTokenToOneExpert) {
  Traffic t = make_traffic({5, 6, 4}, 6, 1, 128, 3);
  for (auto& idx : t.topk_idx) std::fill(idx.begin(), idx.end(), 4);
  expect_exact_everywhere(t);
}

TEST(Exchange, AnExpertWithNoRows) {
  Traffic t = make_traffic({5, 6}, 4, 2, 128, 3);
  for (auto& idx : t.topk_idx) {
    for (auto& e : idx) e = e == 3 || e == 0 ? -1 : e;
  }
  expect_exact_everywhere(t);
}

TEST(Exchange, AllSlotsEmpty) {
  Traffic t = make_traffic({3, 2}, 4, 2, 128, 3);
  for (auto& idx : t.topk_idx) std::fill(idx.begin(), idx.end(), -1);
  expect_exact_everywhere(t);
}

TEST(Exchange, ThirtyTwoSlots) {
  expect_exact_everywhere(make_traffic({2, 3}, 40, 32, 128, 4));
}

TEST(Exchange, WideRows) {
  for (const int hidden : {3584, 7168}) {
    const Traffic t = make_traffic({2, 1}, 4, 2, hidden, 5);
    for (const Mode mode : kModes) expect_exact(t, config_for(t, mode));
  }
}

TEST(Exchange, AnExpertNamedTwiceByOneTokenIsTwoRows) {
  Traffic t = make_traffic({2, 2}, 4, 2, 128, 6);
  t.topk_idx[0] = {1, 1, 3, 3};
  for (const Mode mode : kModes) expect_exact(t, config_for(t, mode));
}

TEST(Exchange, Int64IndicesAreTheSame) {
  const Traffic t = make_traffic({4, 3}, 6, 2, 128, 7);
  for (const Mode mode : kModes) {
    run_ranks(2, [&](Transport& transport) {
      const int r = transport.rank();
      ScalarBackend backend;
      Exchange exchange = Exchange::create(config_for(t, mode), transport, backend);
      const std::vector<std::int64_t> wide(t.topk_idx[r].begin(), t.topk_idx[r].end());
      Routing routing = t.routing(r);
      routing.topk_idx = {wide.data(), DType::kInt64, routing.topk_idx.shape};
      Dispatched d = exchange.dispatch(t.x_view(r), routing, {});
      std::vector<std::uint16_t> expert_y, y;
      ASSERT_NO_FATAL_FAILURE(check_batch(t, exchange.config(), r, d.batch(), expert_y));
      exchange.combine(std::move(d), {expert_y.data(), DType::kBFloat16, d.batch().x.shape},
                       output_view(y, t, r), {});
      expect_combined(t, exchange.config(), r, y);
    });
  }
}

TEST(Exchange, CapacityExactlyMet) {
  Traffic t = make_traffic({5, 4}, 4, 1, 128, 8);
  for (auto& idx : t.topk_idx) std::fill(idx.begin(), idx.end(), 2);
  ExchangeConfig config = config_for(t, Mode::kLowLatency);
  config.max_m = 9;
  expect_exact(t, config);
}

TEST(Exchange, CapacityExceededByOneIsRefusedEverywhereAndNothingIsLost) {
  Traffic full = make_traffic({5, 4}, 4, 1, 128, 8);
  for (auto& idx : full.topk_idx) std::fill(idx.begin(), idx.end(), 2);
  const Traffic next = make_traffic({4, 3}, 4, 1, 128, 9);
  ExchangeConfig config = config_for(full, Mode::kLowLatency);
  config.max_m = 8;
  run_ranks(2, [&](Transport& transport) {
    const int r = transport.rank();
    ScalarBackend backend;
    Exchange exchange = Exchange::create(config, transport, backend);
    for (int i = 0; i < 5; ++i) {  // More often than there are slots.
      try {
        (void)exchange.dispatch(full.x_view(r), full.routing(r), {});
        ADD_FAILURE() << "rank " << r << " was not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_THAT(error.what(), HasSubstr("expert 2"));
        EXPECT_THAT(error.what(), HasSubstr("9 rows"));
        EXPECT_THAT(error.what(), HasSubstr("8"));
      }
      round_trip(exchange, next, r);  // The exchange still works.
    }
  });
}

TEST(Exchange, TwoLayersInFlightInEitherOrder) {
  const Traffic a = make_traffic({4, 3, 2}, 6, 2, 128, 10),
                b = make_traffic({1, 5, 3}, 6, 2, 128, 11);
  ExchangeConfig config = config_for(a, Mode::kLowLatency);
  config.max_tokens_per_rank = 5;
  for (const Mode mode : kModes) {
    config.mode = mode;
    run_ranks(3, [&](Transport& transport) {
      const int r = transport.rank();
      ScalarBackend backend;
      Exchange exchange = Exchange::create(config, transport, backend);
      for (int round = 0; round < 6; ++round) {
        Dispatched first = exchange.dispatch(a.x_view(r), a.routing(r), {});
        Dispatched second = exchange.dispatch(b.x_view(r), b.routing(r), {});
        EXPECT_THROW((void)exchange.dispatch(a.x_view(r), a.routing(r), {}), Error);
        std::vector<std::uint16_t> rows_a, rows_b, y;
        ASSERT_NO_FATAL_FAILURE(check_batch(a, config, r, first.batch(), rows_a));
        ASSERT_NO_FATAL_FAILURE(check_batch(b, config, r, second.batch(), rows_b));
        const Shape shape = first.batch().x.shape;
        const auto finish = [&](const Traffic& t, Dispatched d, const auto& rows) {
          exchange.combine(std::move(d), {rows.data(), DType::kBFloat16, shape},
                           output_view(y, t, r), {});
          ASSERT_NO_FATAL_FAILURE(expect_combined(t, config, r, y));
        };
        if (round % 2) {
          finish(a, std::move(first), rows_a), finish(b, std::move(second), rows_b);
        } else {
          finish(b, std::move(second), rows_b), finish(a, std::move(first), rows_a);
        }
      }
    });
  }
}

// A static scale belongs to a dispatch: layers that share an exchange have scales of their own.
TEST(Exchange, EachDispatchInFlightHasItsOwnStaticScale) {
  const Traffic a = make_traffic({4, 3}, 6, 2, 128, 15);
  Traffic b = a;
  b.s1 = 0.037f;
  for (const Mode mode : kModes) {
    const ExchangeConfig config = config_for(a, mode, WireFormat::kE4m3Static);
    run_ranks(2, [&](Transport& transport) {
      const int r = transport.rank();
      ScalarBackend backend;
      Exchange exchange = Exchange::create(config, transport, backend);
      Dispatched first = exchange.dispatch(a.x_view(r), a.routing(r), {}, a.s1);
      Dispatched second = exchange.dispatch(b.x_view(r), b.routing(r), {}, b.s1);
      std::vector<std::uint16_t> rows_a, rows_b, y;
      ASSERT_NO_FATAL_FAILURE(check_batch(a, config, r, first.batch(), rows_a));
      ASSERT_NO_FATAL_FAILURE(check_batch(b, config, r, second.batch(), rows_b));
      EXPECT_NE(rows_a, rows_b);  // The codes do differ.
      const Shape shape = first.batch().x.shape;
      exchange.combine(std::move(second), {rows_b.data(), DType::kBFloat16, shape},
                       output_view(y, b, r), {});
      ASSERT_NO_FATAL_FAILURE(expect_combined(b, config, r, y));
      exchange.combine(std::move(first), {rows_a.data(), DType::kBFloat16, shape},
                       output_view(y, a, r), {});
      ASSERT_NO_FATAL_FAILURE(expect_combined(a, config, r, y));
    });
  }
}

TEST(Exchange, ADispatchedMayBeDroppedWithoutCombine) {
  const Traffic t = make_traffic({4, 3}, 6, 2, 128, 12);
  for (const Mode mode : kModes) {
    run_ranks(2, [&](Transport& transport) {
      ScalarBackend backend;
      Exchange exchange = Exchange::create(config_for(t, mode), transport, backend);
      for (int i = 0; i < 7; ++i) {
        {
          const Dispatched d =
              exchange.dispatch(t.x_view(transport.rank()), t.routing(transport.rank()), {});
        }
        round_trip(exchange, t, transport.rank());
      }
    });
  }
}

// 1000 rounds with fresh routing, fresh counts and ranks that dawdle: every byte, every time.
TEST(Exchange, AThousandRounds) {
  constexpr int kRanks = 4, kMaxTokens = 6;
  std::vector<Traffic> rounds;
  std::mt19937 rng(5);
  for (int i = 0; i < 500; ++i) {
    std::vector<std::int64_t> tokens(kRanks);
    for (auto& n : tokens) n = rng() % (kMaxTokens + 1);
    rounds.push_back(make_traffic(tokens, 8, 3, 128, 1000 + i));
  }
  for (const Mode mode : kModes) {
    ExchangeConfig config = config_for(rounds[0], mode);
    config.max_tokens_per_rank = kMaxTokens;
    run_ranks(kRanks, [&](Transport& transport) {
      ScalarBackend backend;
      Exchange exchange = Exchange::create(config, transport, backend);
      std::mt19937 mine(static_cast<unsigned>(transport.rank()));
      for (const Traffic& t : rounds) {
        if (mine() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(mine() % 300));
        ASSERT_NO_FATAL_FAILURE(round_trip(exchange, t, transport.rank()));
      }
    });
  }
}

TEST(Exchange, BytesOnTheWireFollowTheFormula) {
  const Traffic t = make_traffic({5, 4, 3}, 6, 3, 256, 13);
  for (const Mode mode : kModes) {
    for (const WireFormat wire : kWires) {
      const ExchangeConfig config = config_for(t, mode, wire);
      run_ranks(3, [&](Transport& transport) {
        const int r = transport.rank();
        ScalarBackend backend;
        Exchange exchange = Exchange::create(config, transport, backend);
        const TransportCounters before = transport.counters();
        round_trip(exchange, t, r);
        const TransportCounters after = transport.counters();
        const ExchangeCounters counters = exchange.counters();
        for (int peer = 0; peer < 3; ++peer) {
          // Copies of this rank's tokens for `peer`, and rows this rank owes it.
          std::uint64_t rows = 0, copies = 0, owed = 0;
          for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
            std::uint64_t here = 0;
            for (int k = 0; k < 3; ++k)
              here += t.topk_idx[r][i * 3 + k] / 2 == peer && t.topk_idx[r][i * 3 + k] >= 0;
            rows += here, copies += here > 0;
          }
          for (const std::int32_t e : t.topk_idx[peer]) owed += e >= 0 && e / 2 == r;
          const std::uint64_t token = wire_bytes_per_token(wire, t.hidden);
          const std::uint64_t dispatch = mode == Mode::kLowLatency
                                             ? rows * (token + 4) + 6 * 4
                                             : copies * (token + 4 + 3 * 4) + 4;
          const std::uint64_t combine = owed * 2 * static_cast<std::uint64_t>(t.hidden);
          EXPECT_EQ(counters.dispatch_bytes[peer], dispatch);
          EXPECT_EQ(counters.combine_bytes[peer], combine);
          EXPECT_EQ(after.bytes_put[peer] - before.bytes_put[peer], dispatch + combine);
          EXPECT_EQ(counters.dispatch_rows[peer], mode == Mode::kLowLatency ? rows : copies);
        }
      });
    }
  }
}

TEST(Exchange, ClippedValuesAreCounted) {
  Traffic t = make_traffic({2}, 1, 1, 128, 14);
  t.topk_idx[0] = {0, 0};
  std::fill(t.x[0].begin(), t.x[0].end(), bf16_from_float(1.0f));
  for (const int i : {3, 100, 200}) t.x[0][i] = bf16_from_float(-5.0f);
  run_ranks(1, [&](Transport& transport) {
    ScalarBackend backend;
    Exchange exchange =
        Exchange::create(config_for(t, Mode::kNormal, WireFormat::kE4m3Static), transport, backend);
    round_trip(exchange, t, 0);  // 0.01 * 448 = 4.48 < 5
    EXPECT_EQ(exchange.counters().saturated_values, 3u);
  });
}

}  // namespace
}  // namespace sluice::testing
