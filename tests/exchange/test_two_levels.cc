// An exchange over several hosts, here virtual ones: every byte against the model and against an
// exchange of one rank, both modes, every wire.
#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "multirank/run_ranks.h"
#include "support/modes_and_wires.h"
#include "support/random_placement.h"
#include "support/scalar_backend.h"
#include "two_level_model.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;

void expect_exact(const Traffic& t, const ExchangeConfig& c) {
  run_ranks(t.num_ranks(), [&](Transport& transport) {
    ScalarBackend backend;
    Exchange exchange = Exchange::create(c, transport, backend);
    const int r = transport.rank();
    expect_model(t, c, r, round_trip(exchange, t, r));
  });
}

void expect_exact_everywhere(const Traffic& t, const Hosts& hosts) {
  for_every_way(t, hosts, [](const Traffic& of, const ExchangeConfig& c) { expect_exact(of, c); });
}

TEST(TwoLevels, EveryByteOverEvenHosts) {
  for (const auto& [hosts, ranks] : {std::pair{2, 2}, {2, 4}, {4, 4}, {2, 8}, {4, 8}, {3, 6}}) {
    expect_exact_everywhere(loud(make_traffic(tokens_of(ranks), 24, 4, 256, 11)),
                            Hosts::even(hosts, ranks));
  }
}

TEST(TwoLevels, EveryByteOverUnevenHostsInAnyOrder) {
  for (const auto& host_of_rank :
       {std::vector<int>{0, 0, 1}, {1, 0, 0}, {0, 1, 0, 1}, {0, 0, 0, 1, 1, 2}}) {
    const auto ranks = static_cast<int>(host_of_rank.size());
    expect_exact_everywhere(loud(make_traffic(tokens_of(ranks), 24, 4, 128, 12)),
                            Hosts::create(host_of_rank));
  }
}

// The same tokens through one rank, which adds up in as many parts: the same bits.
TEST(TwoLevels, SameBitsAsOneRankOfOneHost) {
  const Traffic all = loud(make_traffic({33}, 48, 6, 256, 21));
  for (const int sum_parts : {1, 2, 4, 8, 16}) {
    std::vector<std::uint16_t> expected;
    for (const Mode mode : kModes) {
      const Traffic one = spread_over(all, 1);
      auto transports = make_inproc_transports(1);
      ScalarBackend backend;
      Exchange exchange =
          Exchange::create(config_for(one, mode, Hosts(), sum_parts), *transports[0], backend);
      const auto y = round_trip(exchange, one, 0);
      if (expected.empty()) expected = y;
      ASSERT_EQ(y, expected);
    }
    for (const auto& [hosts, ranks] :
         {std::pair{1, 4}, {2, 2}, {2, 4}, {2, 8}, {4, 4}, {4, 8}, {4, 16}, {8, 8}}) {
      if (ranks > 8 && ranks_are_processes()) continue;  // As many as there are.
      if (sum_parts > 1 && sum_parts < hosts) continue;
      const Traffic t = spread_over(all, ranks);
      for (const Mode mode : kModes) {
        SCOPED_TRACE(::testing::Message() << hosts << " hosts, " << ranks << " ranks, parts "
                                          << sum_parts << ", " << to_string(mode));
        const ExchangeConfig c = config_for(t, mode, Hosts::even(hosts, ranks), sum_parts);
        run_ranks(ranks, [&](Transport& transport) {
          const int r = transport.rank();
          ScalarBackend backend;
          Exchange exchange = Exchange::create(c, transport, backend);
          const auto y = round_trip(exchange, t, r);
          const auto first = expected.begin() + 33 * r / ranks * t.hidden;
          ASSERT_EQ(
              y, std::vector<std::uint16_t>(first, first + static_cast<std::ptrdiff_t>(y.size())));
        });
      }
    }
  }
}

// An order of its own: else the test above would compare nothing.
TEST(TwoLevels, PartsDoChangeTheBits) {
  const Traffic t = loud(make_traffic({8}, 24, 6, 256, 22));
  auto transports = make_inproc_transports(1);
  ScalarBackend backend;
  std::vector<std::vector<std::uint16_t>> y;
  for (const int parts : {1, 2, 4}) {
    Exchange exchange =
        Exchange::create(config_for(t, Mode::kNormal, Hosts(), parts), *transports[0], backend);
    y.push_back(round_trip(exchange, t, 0));
  }
  EXPECT_NE(y[0], y[1]);
  EXPECT_NE(y[1], y[2]);
}

TEST(TwoLevels, UglyCases) {
  const Hosts hosts = Hosts::even(2, 4);
  expect_exact_everywhere(make_traffic({0, 4, 0, 0}, 8, 2, 128, 1), hosts);
  expect_exact_everywhere(make_traffic({0, 0, 0, 0}, 8, 2, 128, 1), hosts);
  expect_exact_everywhere(make_traffic({3, 1, 5, 2}, 40, 32, 128, 4), hosts);
  Traffic t = make_traffic({5, 6, 4, 3}, 8, 2, 128, 3);
  for (auto& idx : t.topk_idx) std::fill(idx.begin(), idx.end(), 6);  // Twice the same expert.
  expect_exact_everywhere(t, hosts);
  for (auto& idx : t.topk_idx) std::fill(idx.begin(), idx.end(), -1);
  expect_exact_everywhere(t, hosts);
  // All for the own host: nothing but headers crosses the network.
  for (int r = 0; r < 4; ++r) {
    for (std::size_t i = 0; i < t.topk_idx[r].size(); ++i) {
      t.topk_idx[r][i] = r / 2 * 4 + static_cast<int>(i % 4);
    }
  }
  expect_exact_everywhere(t, hosts);
}

TEST(TwoLevels, CapacityExceededByOneIsRefusedOnEveryHostAndNothingIsLost) {
  Traffic full = make_traffic({3, 2, 2, 2}, 8, 1, 128, 8);
  for (auto& idx : full.topk_idx) std::fill(idx.begin(), idx.end(), 2);
  const Traffic next = make_traffic({3, 2, 1, 2}, 8, 1, 128, 9);
  ExchangeConfig c = config_for(full, Mode::kLowLatency, Hosts::even(2, 4));
  c.max_m = 8;
  run_ranks(4, [&](Transport& transport) {
    const int r = transport.rank();
    ScalarBackend backend;
    Exchange exchange = Exchange::create(c, transport, backend);
    for (int i = 0; i < 5; ++i) {  // More often than there are slots.
      try {
        (void)exchange.dispatch(full.x_view(r), full.routing(r), {});
        ADD_FAILURE() << "rank " << r << " was not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        EXPECT_THAT(error.what(), HasSubstr("expert 2 would receive 9 rows, max_m is 8"));
      }
      expect_model(next, c, r, round_trip(exchange, next, r));
    }
  });
}

TEST(TwoLevels, TwoInFlightInEitherOrderAndDroppedOnes) {
  const Traffic a = make_traffic({4, 3, 2, 4}, 8, 3, 128, 10),
                b = make_traffic({1, 5, 3, 0}, 8, 3, 128, 11);
  for (const Mode mode : kModes) {
    ExchangeConfig c = config_for(b, mode, Hosts::even(2, 4));
    run_ranks(4, [&](Transport& transport) {
      const int r = transport.rank();
      ScalarBackend backend;
      Exchange exchange = Exchange::create(c, transport, backend);
      const auto finish = [&](Dispatched d, const Traffic& t) {
        exchange.dispatch_receive(d, {});
        std::vector<std::uint16_t> rows, y(static_cast<std::size_t>(t.num_tokens[r] * t.hidden));
        check_batch(t, c, r, d.batch(), rows);
        MutableTensorView view;
        view.data = y.data(), view.dtype = DType::kBFloat16;
        view.shape = Shape{t.num_tokens[r], t.hidden};
        const TensorView expert_y(rows.data(), DType::kBFloat16, d.batch().x.shape);
        exchange.combine_send(d, expert_y, {});
        exchange.combine_receive(std::move(d), view, {});
        expect_model(t, c, r, y);
      };
      for (int i = 0; i < 6; ++i) {
        Dispatched first = exchange.dispatch_send(a.x_view(r), a.routing(r), {});
        Dispatched second = exchange.dispatch_send(b.x_view(r), b.routing(r), {});
        if (i % 3 == 0) {
          finish(std::move(second), b);
          finish(std::move(first), a);
        } else if (i % 3 == 1) {
          finish(std::move(first), a);  // And the second one is dropped.
        }
      }
    });
  }
}

// Replicas and empty slots: the part is that of the slot that a row went to.
TEST(TwoLevels, AnyPlacementOfTheExperts) {
  const Traffic t = loud(make_traffic({4, 3, 2, 4}, 10, 4, 128, 31));
  for (unsigned seed = 0; seed < 6; ++seed) {
    const Placement placement = random_placement(10, 4, 16, 3, seed);
    for (const Mode mode : kModes) {
      for (const int sum_parts : {1, 2, 4}) {
        ExchangeConfig c = config_for(t, mode, Hosts::even(2, 4), sum_parts);
        c.num_slots = 16;
        run_ranks(4, [&](Transport& transport) {
          const int r = transport.rank();
          ScalarBackend backend;
          const ExpertSlots slots(placement, backend);
          Exchange exchange = Exchange::create(c, transport, backend);
          Routing routing = t.routing(r);
          routing.slots = &slots;
          Dispatched d = exchange.dispatch(t.x_view(r), routing, {});
          const ExpertBatch& batch = d.batch();
          std::vector<std::uint16_t> rows(static_cast<std::size_t>(batch.x.shape.num_elements()),
                                          0x7fc1);
          for (int e = 0; e < 4; ++e) {
            for (int i = 0; i < batch.num_rows.as<std::int32_t>()[e]; ++i) {
              const auto row = static_cast<std::size_t>(batch.row_begin.as<std::int64_t>()[e] + i);
              std::vector<std::byte> bytes(132);
              std::memcpy(bytes.data(), batch.x.as<std::byte>() + row * 128, 128);
              std::memcpy(&bytes[128], batch.x_scale.as<std::byte>() + row * 4, 4);
              for (int channel = 0; channel < 128; ++channel) {
                rows[row * 128 + static_cast<std::size_t>(channel)] =
                    expert_output(placement.expert_of(r * 4 + e), bytes.data(), 132, channel);
              }
            }
          }
          std::vector<std::uint16_t> y(static_cast<std::size_t>(t.num_tokens[r] * 128), 0x7fc1);
          MutableTensorView view;
          view.data = y.data(), view.dtype = DType::kBFloat16;
          view.shape = Shape{t.num_tokens[r], 128};
          const TensorView expert_y(rows.data(), DType::kBFloat16, batch.x.shape);
          exchange.combine(std::move(d), expert_y, view, {});
          for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
            const auto expected =
                combined_by_parts(t, c, r, i, [&](int e, int rank, std::int64_t token, int k) {
                  return placement.slot_of_row(e, rank, static_cast<int>(token), k) /
                         (16 / sum_parts);
                });
            ASSERT_EQ(std::vector<std::uint16_t>(y.begin() + i * 128, y.begin() + (i + 1) * 128),
                      expected);
          }
        });
      }
    }
  }
}

// 500 rounds in each mode, with fresh routing, fresh counts and ranks that dawdle.
TEST(TwoLevels, AThousandRounds) {
  constexpr int kRanks = 4, kMaxTokens = 5;
  std::vector<Traffic> rounds;
  std::mt19937 rng(5);
  for (int i = 0; i < 250; ++i) {
    std::vector<std::int64_t> tokens(kRanks);
    for (auto& n : tokens) n = rng() % (kMaxTokens + 1);
    rounds.push_back(loud(make_traffic(tokens, 8, 3, 128, 1000 + i)));
  }
  for (const Mode mode : kModes) {
    ExchangeConfig c = config_for(rounds[0], mode, Hosts::even(2, kRanks));
    c.max_tokens_per_rank = kMaxTokens;
    if (mode == Mode::kLowLatency) c.max_m = kRanks * kMaxTokens * 3;
    run_ranks(kRanks, [&](Transport& transport) {
      ScalarBackend backend;
      const int r = transport.rank();
      Exchange exchange = Exchange::create(c, transport, backend);
      std::mt19937 mine(static_cast<unsigned>(r));
      for (int i = 0; i < 500; ++i) {
        const Traffic& t = rounds[static_cast<std::size_t>(i) % rounds.size()];
        if (mine() % 16 == 0) std::this_thread::sleep_for(std::chrono::microseconds(mine() % 300));
        ASSERT_NO_FATAL_FAILURE(expect_model(t, c, r, round_trip(exchange, t, r)));
      }
    });
  }
}

}  // namespace
}  // namespace sluice::testing
