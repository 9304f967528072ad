// What must be caught: wrong bytes, stale and lost flags, absent ranks, disagreement, bad
// arguments.
#include <gmock/gmock.h>

#include <fmt/core.h>

#include <chrono>
#include <limits>

#include "exchange/host_layout.h"
#include "exchange_model.h"
#include "faulty_transport.h"
#include "multirank/run_ranks.h"
#include "support/disagreement.h"
#include "support/modes_and_wires.h"
#include "support/scalar_backend.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

/// Processes that outnumber the cores need longer than threads to come at all.
std::chrono::milliseconds timeout() {
  return ranks_are_processes() ? 1500ms : 200ms;
}

ExchangeConfig small_config(Mode mode) {
  return {.mode = mode,
          .num_experts = 6,
          .num_topk = 2,
          .hidden = 128,
          .max_tokens_per_rank = 4,
          .peer_timeout = timeout()};
}

/// Dispatches once; false if any byte differs from the model.
bool dispatch_is_exact(Exchange& exchange, const Traffic& t, int r) {
  const Dispatched d = exchange.dispatch(t.x_view(r), t.routing(r), {});
  const ExpertBatch& batch = d.batch();
  bool exact = true;
  for (int e = 0; e < exchange.num_local_experts(); ++e) {
    const auto rows = arrivals(t, r * exchange.num_local_experts() + e);
    exact &= batch.num_rows.as<std::int32_t>()[e] == static_cast<int>(rows.size());
    for (std::size_t i = 0; exact && i < rows.size(); ++i) {
      const auto row = static_cast<std::size_t>(batch.row_begin.as<std::int64_t>()[e]) + i;
      const auto expected = wire_bytes(&t.x[rows[i].rank][rows[i].token * t.hidden], t.hidden,
                                       WireFormat::kE4m3Group, 0);
      exact &= std::memcmp(batch.x.as<std::byte>() + row * 128, expected.data(), 128) == 0;
      exact &= std::memcmp(batch.x_scale.as<float>() + row, &expected[128], 4) == 0;
    }
  }
  return exact;
}

WrapTransport faults_on(int victim, Faults faults) {
  return [=](int rank, std::unique_ptr<Transport> transport) -> std::unique_ptr<Transport> {
    if (rank != victim) return transport;
    return std::make_unique<FaultyTransport>(std::move(transport), faults);
  };
}

TEST(Faults, OneWrongByteIsSeenByTheComparison) {
  const Traffic t = make_traffic({3, 3, 3}, 6, 2, 128, 1);
  for (const Mode mode : kModes) {
    std::atomic<int> corrupted{0}, inexact{0};
    const Faults faults{.on_put = [&](int peer, std::size_t, std::vector<std::byte>& data) {
      if (peer == 0 && data.size() == 128 && corrupted.fetch_add(1) == 0) data[77] ^= std::byte{1};
      return true;
    }};
    const auto failures = try_ranks(
        3,
        [&](Transport& transport) {
          ScalarBackend backend;
          Exchange exchange = Exchange::create(small_config(mode), transport, backend);
          inexact += !dispatch_is_exact(exchange, t, transport.rank());
        },
        faults_on(2, faults));
    for (const auto& failure : failures) EXPECT_FALSE(failure);
    EXPECT_GE(sum_over_ranks(corrupted.load()), 1);
    EXPECT_EQ(sum_over_ranks(inexact.load()), 1);
  }
}

/// Runs two rounds under `faults` on rank 1; every rank's failure.
std::vector<std::exception_ptr> two_rounds(Mode mode, const Faults& faults) {
  const Traffic t = make_traffic({3, 3, 3}, 6, 2, 128, 1);
  return try_ranks(
      3,
      [&](Transport& transport) {
        ScalarBackend backend;
        ExchangeConfig config = small_config(mode);
        config.num_in_flight = 1;
        Exchange exchange = Exchange::create(config, transport, backend);
        for (int i = 0; i < 2; ++i) {
          if (!dispatch_is_exact(exchange, t, transport.rank()))
            throw std::logic_error("wrong rows");
        }
      },
      faults_on(1, faults));
}

TEST(Faults, ALostSignalNamesOperationEpochAndRank) {
  for (const Mode mode : kModes) {
    // Rank 1's second "dispatched" flag never reaches rank 0.
    const Faults faults{.on_signal = [](int peer, int flag, std::uint64_t& epoch) {
      const int kind = flag / 3;
      return !(peer == 0 && kind == static_cast<int>(Flag::kDispatched) && epoch_of(epoch) == 2);
    }};
    const auto failures = two_rounds(mode, faults);
    const auto failure = describe(failures[0]);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(failure->text, HasSubstr("dispatch"));
    EXPECT_THAT(failure->text, HasSubstr("epoch 2"));
    EXPECT_THAT(failure->text, HasSubstr("1 (expected 2, seen 1)"));
    EXPECT_THAT(failure->text, HasSubstr("rank 0"));
  }
}

TEST(Faults, AStaleFlagIsNotTakenForThisEpochs) {
  for (const Mode mode : kModes) {
    // In round two rank 1 sends nothing and repeats the flag of round one: its rows are still
    // there.
    bool second = false;
    const Faults faults{
        .on_put = [&](int, std::size_t, std::vector<std::byte>&) { return !second; },
        .on_signal =
            [&](int peer, int flag, std::uint64_t& epoch) {
              if (flag / 3 == static_cast<int>(Flag::kReleased) && peer == 2) second = true;
              if (second && flag / 3 != static_cast<int>(Flag::kReleased)) {
                epoch = flag_value<>(std::uint64_t{1}, std::uint64_t{0});
              }
              return true;
            }};
    const auto failures = two_rounds(mode, faults);
    for (const int r : {0, 2}) {
      const auto failure = describe(failures[static_cast<std::size_t>(r)]);
      ASSERT_TRUE(failure) << "rank " << r << " took a stale flag";
      EXPECT_EQ(failure->code, ErrorCode::kPeerTimeout);
      EXPECT_THAT(failure->text, HasSubstr("1 (expected 2, seen 1)"));
    }
  }
}

TEST(Faults, AFlagOfALaterEpochIsRefused) {
  const Faults faults{.on_signal = [](int, int flag, std::uint64_t& epoch) {
    if (flag / 3 == static_cast<int>(Flag::kDispatched))
      epoch += flag_value<>(std::uint64_t{5}, std::uint64_t{0});
    return true;
  }};
  const auto failure = describe(two_rounds(Mode::kNormal, faults)[0]);
  ASSERT_TRUE(failure);
  EXPECT_EQ(failure->code, ErrorCode::kTransport);
  EXPECT_THAT(failure->text, HasSubstr("rank 1 is at epoch 6, expected 1"));
}

TEST(Faults, AnAbsentRankIsNamedInTimeAndTheExchangeStaysFailed) {
  const Traffic t = make_traffic({3, 3, 3, 3}, 8, 2, 128, 1);
  for (const Mode mode : kModes) {
    ExchangeConfig config = small_config(mode);
    config.num_experts = 8;
    const auto failures = try_ranks(4, [&](Transport& transport) {
      ScalarBackend backend;
      Exchange exchange = Exchange::create(config, transport, backend);
      if (transport.rank() == 3) return;
      const auto start = std::chrono::steady_clock::now();
      std::string text;
      try {
        (void)exchange.dispatch(t.x_view(transport.rank()), t.routing(transport.rank()), {});
      } catch (const Error& error) {
        text = error.what();
        EXPECT_EQ(error.code(), ErrorCode::kPeerTimeout);
        EXPECT_THAT(error.ranks(), ElementsAre(3));
      }
      EXPECT_LT(std::chrono::steady_clock::now() - start, timeout() + 1s);
      EXPECT_THAT(text, HasSubstr("missing rank(s) 3 "));
      // A later call must not pair with whatever the others do next.
      try {
        (void)exchange.dispatch(t.x_view(transport.rank()), t.routing(transport.rank()), {});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kTransport);
        EXPECT_THAT(error.what(), HasSubstr("failed earlier"));
        EXPECT_THAT(error.ranks(), ElementsAre(3));
      }
    });
    for (const auto& failure : failures) EXPECT_FALSE(failure);
  }
}

TEST(Faults, AnAbsentRankAtCreationIsNamed) {
  const auto failures = try_ranks(3, [&](Transport& transport) {
    if (transport.rank() == 1) return;
    ScalarBackend backend;
    (void)Exchange::create(small_config(Mode::kNormal), transport, backend);
  });
  for (const int r : {0, 2}) {
    const auto failure = describe(failures[static_cast<std::size_t>(r)]);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(failure->text, HasSubstr("missing rank(s) 1"));
  }
}

TEST(Faults, EveryFieldOfTheConfigurationIsCompared) {
  const auto disagree = [](const char* field, auto change) {
    const auto failures = try_ranks(2, [&](Transport& transport) {
      ScalarBackend backend;
      ExchangeConfig config = small_config(Mode::kLowLatency);
      if (transport.rank() == 1) change(config);
      (void)Exchange::create(config, transport, backend);
    });
    expect_disagreement(failures, field);
  };
  disagree("wire", [](auto& c) { c.wire = WireFormat::kBf16; });
  disagree("num_experts", [](auto& c) { c.num_experts = 8; });
  disagree("num_topk", [](auto& c) { c.num_topk = 3; });
  disagree("hidden", [](auto& c) { c.hidden = 256; });
  disagree("max_tokens_per_rank", [](auto& c) { c.max_tokens_per_rank = 5; });
  disagree("max_m", [](auto& c) { c.max_m = 3; });
  disagree("routed_scaling_factor", [](auto& c) { c.routed_scaling_factor = 2.5f; });
  disagree("num_in_flight", [](auto& c) { c.num_in_flight = 1; });
  disagree("mode", [](auto& c) { c.mode = Mode::kNormal; });
}

TEST(Faults, EveryRankThatDisagreesIsNamed) {
  const auto failures = try_ranks(4, [&](Transport& transport) {
    ScalarBackend backend;
    ExchangeConfig config = small_config(Mode::kLowLatency);
    config.num_experts = 8;
    if (transport.rank() == 1) config.hidden = 256;
    if (transport.rank() == 3) config.hidden = 384, config.num_topk = 3;
    (void)Exchange::create(config, transport, backend);
  });
  for (const auto& f : failures) {
    const auto failure = describe(f);
    ASSERT_TRUE(failure);
    EXPECT_EQ(failure->code, ErrorCode::kTransport);
    // num_topk comes before hidden, and only rank 3 differs there.
    EXPECT_EQ(failure->text, "ranks disagree on num_topk: rank 0 has '2', rank 3 has '3'");
  }
}

/// Text of the refusal that `call` meets on a one-rank exchange.
template <class Call>
std::string refusal(const Call& call) {
  std::string text = "(not refused)";
  run_ranks(1, [&](Transport& transport) {
    ScalarBackend backend;
    Exchange exchange = Exchange::create(small_config(Mode::kLowLatency), transport, backend);
    try {
      call(exchange);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      text = error.what();
    }
  });
  return gather_bytes(text)[0];
}

TEST(Refusals, BadTensorsByFieldValueAndLimit) {
  Traffic t = make_traffic({3}, 6, 2, 128, 1);
  const Routing good = t.routing(0);
  const TensorView x = t.x_view(0);
  EXPECT_EQ(refusal([&](Exchange& e) { (void)e.dispatch(x, good, {}); }), "(not refused)");

  const auto with_x = [&](TensorView bad) {
    return refusal([&](Exchange& e) { (void)e.dispatch(bad, good, {}); });
  };
  EXPECT_THAT(with_x({x.data, DType::kFloat32, x.shape}), HasSubstr("x is float32"));
  EXPECT_THAT(with_x({x.data, x.dtype, Shape{3, 64}}), HasSubstr("x has shape [3, 64]"));
  EXPECT_THAT(with_x({x.data, x.dtype, Shape{384}}), HasSubstr("[num_tokens, 128]"));
  EXPECT_THAT(with_x({x.data, x.dtype, Shape{5, 128}}),
              HasSubstr("5 exceeds max_tokens_per_rank 4"));
  EXPECT_THAT(with_x({x.data, x.dtype, x.shape, Device{Device::Kind::kCuda, 0}}),
              HasSubstr("x lives in cuda:0, expected host memory"));
  EXPECT_THAT(with_x({nullptr, x.dtype, x.shape}), HasSubstr("no data"));

  const auto with_routing = [&](Routing bad) {
    return refusal([&](Exchange& e) { (void)e.dispatch(x, bad, {}); });
  };
  Routing bad = good;
  bad.topk_idx.dtype = DType::kFloat32;
  EXPECT_THAT(with_routing(bad), HasSubstr("topk_idx is float32"));
  bad = good, bad.topk_idx.shape = Shape{3, 3};
  EXPECT_THAT(with_routing(bad), HasSubstr("topk_idx has shape [3, 3]"));
  bad = good, bad.topk_weights.dtype = DType::kBFloat16;
  EXPECT_THAT(with_routing(bad), HasSubstr("topk_weights is bfloat16"));
  for (const int value : {6, -2, 1'000'000}) {
    Traffic u = t;
    u.topk_idx[0][3] = value;
    const Routing routing = u.routing(0);
    EXPECT_EQ(with_routing(routing), fmt::format("topk_idx[1, 1] = {} is not in [-1, 6)", value));
  }
}

TEST(Refusals, CombineWithWrongTensorsOrTheWrongExchange) {
  Traffic t = make_traffic({2}, 6, 2, 128, 1);
  std::vector<std::uint16_t> rows(6 * 4 * 128), out(2 * 128);
  MutableTensorView y;
  y.data = out.data(), y.dtype = DType::kBFloat16, y.shape = Shape{2, 128};
  const TensorView good(rows.data(), DType::kBFloat16, Shape{6, 4, 128});
  EXPECT_THAT(refusal([&](Exchange& e) {
                e.combine(e.dispatch(t.x_view(0), t.routing(0), {}),
                          {rows.data(), DType::kFloat32, good.shape}, y, {});
              }),
              HasSubstr("expert_y is float32"));
  EXPECT_THAT(refusal([&](Exchange& e) {
                MutableTensorView wrong = y;
                wrong.shape = Shape{3, 128};
                e.combine(e.dispatch(t.x_view(0), t.routing(0), {}), good, wrong, {});
              }),
              HasSubstr("y has shape [3, 128], expected [2, 128]"));
  EXPECT_THAT(refusal([&](Exchange& e) {
                auto transports = make_inproc_transports(1);
                ScalarBackend backend;
                Exchange other = Exchange::create(e.config(), *transports[0], backend);
                e.combine(other.dispatch(t.x_view(0), t.routing(0), {}), good, y, {});
              }),
              HasSubstr("another exchange"));
}

TEST(Refusals, BadConfigurations) {
  const auto refused = [](auto change) {
    ExchangeConfig config = small_config(Mode::kLowLatency);
    change(config);
    auto transports = make_inproc_transports(1);
    ScalarBackend backend;
    try {
      (void)Exchange::create(config, *transports[0], backend);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return std::string(error.what());
    }
    return std::string("(not refused)");
  };
  EXPECT_THAT(refused([](auto& c) { c.hidden = 100; }), HasSubstr("hidden 100"));
  EXPECT_THAT(refused([](auto& c) { c.num_topk = 33; }), HasSubstr("num_topk 33"));
  EXPECT_THAT(refused([](auto& c) { c.num_topk = 0; }), HasSubstr("num_topk 0"));
  EXPECT_THAT(refused([](auto& c) { c.num_experts = 0; }), HasSubstr("num_experts 0"));
  EXPECT_THAT(refused([](auto& c) { c.max_tokens_per_rank = 0; }),
              HasSubstr("max_tokens_per_rank 0"));
  EXPECT_THAT(refused([](auto& c) { c.max_m = -1; }), HasSubstr("max_m -1"));
  for (const float factor : {0.0f, -1.0f, std::numeric_limits<float>::infinity()}) {
    EXPECT_THAT(refused([&](auto& c) { c.routed_scaling_factor = factor; }),
                HasSubstr("not a positive float32"));
  }
  EXPECT_THAT(refused([](auto& c) { c.mode = Mode::kNormal, c.max_m = 3; }), HasSubstr("max_m 3"));
  EXPECT_THAT(refused([](auto& c) { c.num_in_flight = 9; }), HasSubstr("num_in_flight 9"));
  EXPECT_THAT(refused([](auto& c) { c.peer_timeout = 0ms; }), HasSubstr("peer_timeout 0"));
}

// A scale that a format does not have would be ignored; one that it needs cannot be guessed.
TEST(Refusals, StaticScalesThatDoNotFitTheWire) {
  const Traffic t = make_traffic({2}, 4, 2, 128, 1);
  auto transports = make_inproc_transports(1);
  ScalarBackend backend;
  const auto refused = [&](WireFormat wire, float static_scale) {
    ExchangeConfig config = small_config(Mode::kLowLatency);
    config.wire = wire;
    Exchange exchange = Exchange::create(config, *transports[0], backend);
    std::string text;
    for (const bool half : {false, true}) {
      try {
        (void)(half ? exchange.dispatch_send(t.x_view(0), t.routing(0), {}, static_scale)
                    : exchange.dispatch(t.x_view(0), t.routing(0), {}, static_scale));
        return std::string("(not refused)");
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
        text = error.what();
      }
    }
    return text;
  };
  EXPECT_THAT(refused(WireFormat::kE4m3Static, 0), HasSubstr("static_scale 0 is not"));
  EXPECT_THAT(refused(WireFormat::kE4m3Static, -1), HasSubstr("static_scale -1"));
  EXPECT_THAT(refused(WireFormat::kE4m3Static, std::nanf("")), HasSubstr("static_scale nan"));
  EXPECT_THAT(refused(WireFormat::kE4m3Group, 0.5f), HasSubstr("static_scale 0.5 is given"));
  EXPECT_THAT(refused(WireFormat::kBf16, 0.5f), HasSubstr("rows of bf16 have none"));
  EXPECT_EQ(refused(WireFormat::kE4m3Static, 0.5f), "(not refused)");
  EXPECT_EQ(refused(WireFormat::kE4m3Pow2, 0), "(not refused)");
}

TEST(Refusals, WorkspaceIsWhatTheFormulaSays) {
  // R = 8, T = 128, E = 256, hidden 7168, k = 8: payload, scales and origins of 32 * 1024 rows,
  // home of 128 * 8 rows, twice; and the staged tokens once.
  const ExchangeConfig config{
      .num_experts = 256, .num_topk = 8, .hidden = 7168, .max_tokens_per_rank = 128};
  const std::size_t rows = 32 * 1024, slot = 8 * 256 * 4 + rows * (7168 + 224 + 4) + 1024 * 14336;
  EXPECT_EQ(Exchange::workspace_bytes(config, 8), 2 * slot + 128 * (7168 + 224));
}

}  // namespace
}  // namespace sluice::testing
