// Many dispatch-combine rounds with random counts, delays and stalls: every row and token checked.
//
//   soak --rounds 10000 --ranks 8                              ranks are threads
//   mpirun -n 4 soak --rounds 10000 --transport mpi            ranks are processes
//   soak --rounds 10000 --ranks 4 --transport ipc              the same, started here
//   soak ... --hosts 2                                         on as many virtual hosts
//
// Rounds use the low-latency and the normal exchange in turn, now with one and now with two layers
// in flight, combined in either order. One rank in eight dawdles for up to 2 ms before a round; in
// every hundred rounds one rank, chosen at random, stalls for 100 to 400 ms at a random place.
// Prints one line of totals; exits with 0 if no row was wrong and no rank waited past the timeout.
#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>

#include "exchange/two_level_model.h"
#include "multirank/run_ranks.h"
#include "sluice/lab/ranks.h"
#include "support/scalar_backend.h"

namespace sluice::testing {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr int kExperts = 16, kTopk = 3, kHidden = 128, kMaxTokens = 8;
constexpr auto kTimeout = 20'000ms;

struct Totals {
  std::atomic<std::int64_t> rows{0}, tokens{0}, wrong{0}, stalls{0};
};

/// Traffic that rounds choose from, the same on all ranks.
std::vector<Traffic> make_traffics(int num_ranks) {
  std::vector<Traffic> traffics;
  std::mt19937 rng(7);
  for (int i = 0; i < 128; ++i) {
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(num_ranks));
    for (auto& n : tokens) n = rng() % 4 == 0 ? 0 : rng() % (kMaxTokens + 1);
    traffics.push_back(make_traffic(tokens, kExperts, kTopk, kHidden, 50 + rng()));
  }
  return traffics;
}

class Soak {
 public:
  Soak(Transport& transport, const std::vector<Traffic>& traffics, const Hosts& hosts,
       Totals& totals)
      : rank_(transport.rank()),
        num_ranks_(transport.num_ranks()),
        traffics_(traffics),
        totals_(totals),
        own_(static_cast<unsigned>(1000 + rank_)),
        exchanges_{Exchange::create(config(Mode::kLowLatency, hosts), transport, backend_),
                   Exchange::create(config(Mode::kNormal, hosts), transport, backend_)} {}

  void run(int rounds) {
    for (int round = 0; round < rounds;) {
      // Chosen alike on all ranks.
      if (round % 100 == 0 || round / 100 != stall_hundred_) choose_stall(round / 100);
      Exchange& exchange = exchanges_[shared_() % 2];
      const Traffic& a = traffics_[shared_() % traffics_.size()];
      const Traffic& b = traffics_[shared_() % traffics_.size()];
      const auto kind = shared_() % 3;
      pause(round);
      Dispatched first = exchange.dispatch(a.x_view(rank_), a.routing(rank_), {});
      if (kind == 0) {
        finish(exchange, a, std::move(first));
        ++round;
        continue;
      }
      pause(round + 1);
      Dispatched second = exchange.dispatch(b.x_view(rank_), b.routing(rank_), {});
      if (kind == 1) {
        finish(exchange, a, std::move(first)), finish(exchange, b, std::move(second));
      } else {
        finish(exchange, b, std::move(second)), finish(exchange, a, std::move(first));
      }
      round += 2;
    }
  }

 private:
  static ExchangeConfig config(Mode mode, const Hosts& hosts) {
    return {.mode = mode,
            .num_experts = kExperts,
            .num_topk = kTopk,
            .hidden = kHidden,
            .max_tokens_per_rank = kMaxTokens,
            .hosts = hosts,
            .routed_scaling_factor = 2.5f,
            .peer_timeout = kTimeout};
  }

  void choose_stall(int hundred) {
    stall_hundred_ = hundred;
    stall_rank_ = static_cast<int>(shared_() % static_cast<unsigned>(num_ranks_));
    stall_round_ = hundred * 100 + static_cast<int>(shared_() % 98);
    stall_ms_ = 100 + static_cast<int>(shared_() % 301);
  }

  void pause(int round) {
    if (own_() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own_() % 2000));
    if (rank_ != stall_rank_ || stall_round_ < 0 || round < stall_round_) return;
    stall_round_ = -1;
    totals_.stalls += 1;
    std::this_thread::sleep_for(std::chrono::milliseconds(stall_ms_));
  }

  void finish(Exchange& exchange, const Traffic& t, Dispatched d) {
    const ExpertBatch& batch = d.batch();
    rows_.assign(static_cast<std::size_t>(batch.x.shape.num_elements()), 0x7fc1);
    for (int e = 0; e < exchange.num_local_experts(); ++e) check_expert(exchange, t, batch, e);
    y_.assign(static_cast<std::size_t>(t.num_tokens[rank_] * kHidden), 0x7fc1);
    MutableTensorView y;
    y.data = y_.data(), y.dtype = DType::kBFloat16, y.shape = Shape{t.num_tokens[rank_], kHidden};
    exchange.combine(std::move(d), {rows_.data(), DType::kBFloat16, batch.x.shape}, y, {});
    const ExchangeConfig& config = exchange.config();
    for (std::int64_t i = 0; i < t.num_tokens[rank_]; ++i) {
      const auto expected = combined_by_parts(t, config, rank_, i, parts_of(config));
      totals_.wrong += !std::equal(expected.begin(), expected.end(), y_.begin() + i * kHidden);
      totals_.tokens += 1;
    }
  }

  void check_expert(const Exchange& exchange, const Traffic& t, const ExpertBatch& batch, int e) {
    const int expert = rank_ * exchange.num_local_experts() + e;
    const auto expected = arrivals(t, expert);
    if (batch.num_rows.as<std::int32_t>()[e] != static_cast<int>(expected.size())) {
      totals_.wrong += 1;
      return;
    }
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto row = static_cast<std::size_t>(batch.row_begin.as<std::int64_t>()[e]) + i;
      const auto bytes = wire_bytes(&t.x[expected[i].rank][expected[i].token * kHidden], kHidden,
                                    WireFormat::kE4m3Group, 0);
      std::vector<std::byte> actual(bytes.size());
      std::memcpy(actual.data(), batch.x.as<std::byte>() + row * kHidden, kHidden);
      std::memcpy(&actual[kHidden], batch.x_scale.as<float>() + row, sizeof(float));
      totals_.wrong += actual != bytes;
      totals_.rows += 1;
      for (int c = 0; c < kHidden; ++c) {
        rows_[row * kHidden + static_cast<std::size_t>(c)] =
            expert_output(expert, actual.data(), actual.size(), c);
      }
    }
  }

  int rank_, num_ranks_;
  const std::vector<Traffic>& traffics_;
  Totals& totals_;
  std::mt19937 shared_{99}, own_;
  int stall_hundred_ = -1, stall_rank_ = 0, stall_round_ = 0, stall_ms_ = 0;
  ScalarBackend backend_;
  Exchange exchanges_[2];
  std::vector<std::uint16_t> rows_, y_;
};

int run(int rounds, int num_ranks, int num_hosts, const std::string& transport_name) {
  if (transport_name == "ipc" && !read_job_place()) {
    return run_as_processes(num_ranks, kProcessTimeout);
  }
  const bool over_processes = transport_name != "inproc";
  if (over_processes) {
    start_processes(transport_name);
    num_ranks = control_transport()->num_ranks();
  }
  const std::vector<Traffic> traffics = make_traffics(num_ranks);
  const Hosts hosts = num_hosts > 1 ? Hosts::even(num_hosts, num_ranks) : Hosts();
  Totals totals;
  const auto start = Clock::now();
  const auto failures = try_ranks(num_ranks, [&](Transport& transport) {
    Soak(transport, traffics, hosts, totals).run(rounds);
  });
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const int rows = sum_over_ranks(static_cast<int>(totals.rows));
  const int tokens = sum_over_ranks(static_cast<int>(totals.tokens));
  const int wrong = sum_over_ranks(static_cast<int>(totals.wrong));
  const int stalls = sum_over_ranks(static_cast<int>(totals.stalls));
  int failed = 0;
  const bool speaks = !over_processes || control_transport()->rank() == 0;
  for (std::size_t r = 0; r < failures.size(); ++r) {
    const auto failure = describe(failures[r]);
    failed += failure.has_value();
    if (failure && speaks) fmt::print("rank {}: {}\n", r, failure->text);
  }
  if (speaks) {
    fmt::print(
        "soak: {} rounds over {}, {} ranks on {}, {:.1f} s: {} rows and {} tokens checked, {} "
        "wrong; {} stalls; {} ranks failed or timed out\n",
        rounds, transport_name, num_ranks, hosts.to_string(), seconds, rows, tokens, wrong, stalls,
        failed);
  }
  const bool ended = end_processes();
  return wrong == 0 && failed == 0 && stalls > 0 && ended ? 0 : 1;
}

}  // namespace
}  // namespace sluice::testing

int main(int argc, char** argv) {
  std::map<std::string, std::string> given = {
      {"--rounds", "1000"}, {"--ranks", "8"}, {"--hosts", "1"}, {"--transport", "inproc"}};
  for (int i = 1; i + 1 < argc; i += 2) given[argv[i]] = argv[i + 1];
  try {
    return sluice::testing::run(std::stoi(given["--rounds"]), std::stoi(given["--ranks"]),
                                std::stoi(given["--hosts"]), given["--transport"]);
  } catch (const std::exception& error) {
    fmt::print(stderr, "soak: {}\n", error.what());
    return 2;
  }
}
