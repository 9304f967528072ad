// What must be caught with several hosts: a lost rank or relay, named by rank and host on every
// survivor; stale and lost flags; wrong bytes; hosts that ranks disagree on.
#include <gmock/gmock.h>
#include <gtest/gtest-spi.h>

#include <chrono>
#include <thread>
#include <tuple>

#include "exchange/two_level_layout.h"
#include "faulty_transport.h"
#include "multirank/run_ranks.h"
#include "support/disagreement.h"
#include "support/scalar_backend.h"
#include "two_level_model.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

std::chrono::milliseconds timeout() {
  return ranks_are_processes() ? 1500ms : 1000ms;
}
const Hosts& hosts() {
  static const Hosts two = Hosts::even(2, 4);
  return two;
}
Traffic traffic() {
  return make_traffic({3, 4, 3, 2}, 8, 3, 128, 1);
}
ExchangeConfig config_of(Mode mode) {
  ExchangeConfig c = config_for(traffic(), mode, hosts());
  c.peer_timeout = timeout();
  return c;
}

/// Two rounds, the second up to where rank `victim` leaves: before its dispatch, or between the
/// dispatch and the combine.
void expect_named(Mode mode, int victim, bool after_dispatch) {
  SCOPED_TRACE(::testing::Message() << to_string(mode) << ", victim " << victim
                                    << (after_dispatch ? ", after" : ", before") << " dispatch");
  const Traffic t = traffic();
  const ExchangeConfig c = config_of(mode);
  const auto failures = try_ranks(4, [&](Transport& transport) {
    const int r = transport.rank();
    ScalarBackend backend;
    Exchange exchange = Exchange::create(c, transport, backend);
    expect_model(t, c, r, round_trip(exchange, t, r));
    if (r == victim) {
      if (after_dispatch) {
        Dispatched d = exchange.dispatch(t.x_view(r), t.routing(r), {});
        std::this_thread::sleep_for(timeout() + 1s);  // Neither answers nor says goodbye.
      }
      return;
    }
    const auto start = std::chrono::steady_clock::now();
    try {
      (void)round_trip(exchange, t, r);
      ADD_FAILURE() << "rank " << r << " went on";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kPeerTimeout) << error.what();
      EXPECT_THAT(error.ranks(), ElementsAre(victim)) << "rank " << r << ": " << error.what();
      EXPECT_THAT(error.what(),
                  HasSubstr(fmt::format(" {} on host {}", victim, hosts().host_of(victim))));
      EXPECT_THAT(error.what(), HasSubstr("epoch 2"));
    }
    EXPECT_LT(std::chrono::steady_clock::now() - start, timeout() + 1s);
    // A later call is refused with the same rank, and waits for nobody.
    try {
      (void)exchange.dispatch(t.x_view(r), t.routing(r), {});
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kTransport);
      EXPECT_THAT(error.ranks(), ElementsAre(victim));
    }
  });
  for (const auto& failure : failures) EXPECT_FALSE(failure);
}

TEST(TwoLevelFaults, ALostRankIsNamedByRankAndHostOnEverySurvivor) {
  expect_named(Mode::kLowLatency, 0, false);
  expect_named(Mode::kNormal, 3, false);
  expect_named(Mode::kLowLatency, 3, true);
  expect_named(Mode::kNormal, 2, true);
}

WrapTransport faults_on(int victim, Faults faults) {
  return [=](int rank, std::unique_ptr<Transport> transport) -> std::unique_ptr<Transport> {
    if (rank != victim) return transport;
    return std::make_unique<FaultyTransport>(std::move(transport), faults);
  };
}

/// Two rounds under `faults` on rank 1; every rank's failure.
std::vector<std::exception_ptr> two_rounds(Mode mode, const Faults& faults) {
  const Traffic t = traffic();
  ExchangeConfig c = config_of(mode);
  c.num_in_flight = 1;
  return try_ranks(
      4,
      [&](Transport& transport) {
        ScalarBackend backend;
        Exchange exchange = Exchange::create(c, transport, backend);
        for (int i = 0; i < 2; ++i) (void)round_trip(exchange, t, transport.rank());
      },
      faults_on(1, faults));
}

/// Flags of slot 0.
bool is_flag(int flag, Flag kind) {
  return flag / 4 == static_cast<int>(kind);
}

TEST(TwoLevelFaults, AFlagThatARelayDoesNotRaiseNamesTheRelay) {
  for (const auto& [kind, peer, operation] :
       {std::tuple{Flag::kSent, 3, "dispatch (from other hosts)"},
        {Flag::kDispatched, 0, "dispatch"},
        {Flag::kGathered, 0, "combine (inside the host)"},
        {Flag::kCombined, 3, "combine"}}) {
    const Faults faults{
        .on_signal = [kind = kind, peer = peer](int to, int flag, std::uint64_t& epoch) {
          return !(to == peer && is_flag(flag, kind) && epoch_of(epoch) == 2);
        }};
    const auto failure =
        describe(two_rounds(Mode::kNormal, faults)[static_cast<std::size_t>(peer)]);
    ASSERT_TRUE(failure) << operation;
    EXPECT_EQ(failure->code, ErrorCode::kPeerTimeout);
    EXPECT_THAT(failure->text, HasSubstr(operation));
    EXPECT_THAT(failure->text, HasSubstr("1 on host 0 (expected 2, seen 1)"));
    EXPECT_THAT(failure->ranks, ElementsAre(1));
  }
}

TEST(TwoLevelFaults, AStaleFlagIsNotTakenForThisEpochs) {
  for (const Mode mode : kModes) {
    // In round two rank 1 sends nothing over the network and repeats the flag of round one: its
    // records of that round are still there.
    const Faults faults{.on_signal = [](int, int flag, std::uint64_t& epoch) {
      if (is_flag(flag, Flag::kSent) && epoch_of(epoch) == 2) {
        epoch = flag_value<>(std::uint64_t{1}, std::uint64_t{0});
      }
      return true;
    }};
    const auto failures = two_rounds(mode, faults);
    for (const int r : {0, 2, 3}) {
      const auto failure = describe(failures[static_cast<std::size_t>(r)]);
      ASSERT_TRUE(failure) << "rank " << r << " took a stale flag";
      EXPECT_EQ(failure->code, ErrorCode::kPeerTimeout);
    }
    EXPECT_THAT(describe(failures[3])->text, HasSubstr("1 on host 0 (expected 2, seen 1)"));
  }
}

TEST(TwoLevelFaults, OneWrongByteOfARelayIsSeenByTheComparison) {
  const Traffic t = traffic();
  for (const Mode mode : kModes) {
    const ExchangeConfig c = config_of(mode);
    const TwoLevelLayout layout(c, 4);
    for (const bool is_out : {true, false}) {
      // Rank 1, to rank 3: of a record on its way out, of a row or sum on its way home.
      std::atomic<int> corrupted{0}, inexact{0};
      const Faults faults{.on_put = [&](int peer, std::size_t at, std::vector<std::byte>& data) {
        const std::size_t offset = at % layout.slot_bytes;
        const bool is_home = offset >= layout.home && offset < layout.counts;
        const bool is_record = offset < layout.gather && data.size() == layout.record.bytes;
        if (peer == 3 && (is_out ? is_record : is_home) && corrupted.fetch_add(1) == 0) {
          data[79] ^= std::byte{0x40};
        }
        return true;
      }};
      const auto failures = try_ranks(
          4,
          [&](Transport& transport) {
            const int r = transport.rank();
            ScalarBackend backend;
            Exchange exchange = Exchange::create(c, transport, backend);
            Dispatched d = exchange.dispatch(t.x_view(r), t.routing(r), {});
            std::vector<std::uint16_t> rows,
                y(static_cast<std::size_t>(t.num_tokens[r] * t.hidden));
            ::testing::TestPartResultArray failed;
            {
              ::testing::ScopedFakeTestPartResultReporter reporter(
                  ::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD,
                  &failed);
              check_batch(t, c, r, d.batch(), rows);
            }
            inexact += is_out && failed.size() > 0;
            MutableTensorView view;
            view.data = y.data(), view.dtype = DType::kBFloat16;
            view.shape = Shape{t.num_tokens[r], t.hidden};
            const TensorView expert_y(rows.data(), DType::kBFloat16, d.batch().x.shape);
            exchange.combine(std::move(d), expert_y, view, {});
            if (is_out) return;
            for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
              const std::vector<std::uint16_t> actual(y.begin() + i * t.hidden,
                                                      y.begin() + (i + 1) * t.hidden);
              inexact += actual != combined_by_parts(t, c, r, i, parts_of(c));
            }
          },
          faults_on(1, faults));
      for (const auto& failure : failures) EXPECT_FALSE(failure);
      EXPECT_GE(sum_over_ranks(corrupted.load()), 1);
      EXPECT_GE(sum_over_ranks(inexact.load()), 1) << to_string(mode) << is_out;
    }
  }
}

TEST(TwoLevelFaults, HostsAndPartsAreCompared) {
  const auto disagree = [](const char* field, auto change) {
    const auto failures = try_ranks(4, [&](Transport& transport) {
      ScalarBackend backend;
      ExchangeConfig c = config_of(Mode::kNormal);
      if (transport.rank() == 1) change(c);
      (void)Exchange::create(c, transport, backend);
    });
    expect_disagreement(failures, field);
  };
  disagree(
      "ranks disagree on hosts: rank 0 has '2 hosts of 2 ranks', rank 1 has '4 hosts of 1 rank'",
      [](auto& c) { c.hosts = Hosts::even(4, 4); });
  disagree("ranks disagree on hosts: rank 0 has '2 hosts of 2 ranks', rank 1 has 'one host'",
           [](auto& c) { c.hosts = Hosts(), c.sum_parts = 2; });
  disagree("ranks disagree on sum_parts: rank 0 has '2', rank 1 has '1'",
           [](auto& c) { c.sum_parts = 1; });
}

}  // namespace
}  // namespace sluice::testing
