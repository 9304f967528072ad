// Dispatch and combine by themselves: every byte checked against the definition, then timed without
// any host synchronization between operations.
#include "sluice/lab/exchange_bench.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "backend/ops.h"
#include "bench/exchange_bench_rank.h"
#include "bench/exchange_traffic.h"
#include "bench/rank_reports.h"
#include "core/fail.h"
#include "sluice/lab/median.h"
#include "sluice/lab/ranks.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

/// Microseconds between two time stamps with nothing between.
double stamp_cost(BackendOps& backend) {
  const auto recording = backend.record(backend.stream(), [](const std::function<void()>& mark) {
    for (int i = 0; i < 20; ++i) mark();
  });
  recording->replay();
  (void)recording->marks_us();
  recording->replay();
  return median(recording->marks_us());
}

/// What one rank's process hands to the others. Times are already those of the slowest rank.
struct RankReport {
  double pair_us = 0, dispatch_us = 0, combine_us = 0, dispatch_call_us = 0, combine_call_us = 0;
  double dispatch_bytes = 0, combine_bytes = 0, off_rank_bytes = 0;
  std::int64_t checked = 0;
  bool host_waits = false;
};

/// Every byte of one pair compared, and what it moved.
RankReport check_pair(BenchRank& rank, std::size_t own) {
  RankReport report;
  const ExchangeCounters before = rank.exchange().counters();
  report.checked = rank.check();
  const ExchangeCounters after = rank.exchange().counters();
  for (std::size_t p = 0; p < after.dispatch_bytes.size(); ++p) {
    const auto out = static_cast<double>(after.dispatch_bytes[p] - before.dispatch_bytes[p]);
    const auto home = static_cast<double>(after.combine_bytes[p] - before.combine_bytes[p]);
    report.dispatch_bytes += out, report.combine_bytes += home;
    if (p != own) report.off_rank_bytes += out + home;
  }
  return report;
}

void time_pairs(const ExchangeBenchConfig& bench, BenchRank& rank, Transport& transport,
                double stamp, RankReport& report) {
  const auto free_running = rank.record(bench.pairs, false);
  const auto stamped = rank.record(bench.pairs, true);
  std::vector<double> pair, dispatch, combine;
  for (int repeat = -1; repeat < bench.repeats; ++repeat) {
    rank.barrier();
    free_running->replay();
    std::vector<double> us = free_running->marks_us();
    keep_slowest(transport, us);
    if (repeat >= 0) pair.push_back(us.at(0) / bench.pairs);
  }
  for (int repeat = -1; repeat < bench.repeats; ++repeat) {
    rank.barrier();
    stamped->replay();
    std::vector<double> us = stamped->marks_us();
    keep_slowest(transport, us);
    for (std::size_t m = 0; repeat >= 0 && m + 1 < us.size(); m += 2) {
      dispatch.push_back(us[m] - stamp), combine.push_back(us[m + 1] - stamp);
    }
  }
  const BenchRank::CallTimes calls = rank.time_calls(bench.pairs);
  double host[] = {calls.dispatch_us, calls.combine_us};
  keep_slowest(transport, host);
  report.pair_us = median(pair), report.dispatch_us = median(dispatch);
  report.combine_us = median(combine);
  report.dispatch_call_us = host[0], report.combine_call_us = host[1];
}

struct CaseResult {
  ExchangeBenchTimes times;
  std::int64_t checked = 0, rows = 0;
  bool host_waits = false;
};

CaseResult run_case(const ExchangeBenchConfig& bench, const ExchangeConfig& config, int tokens,
                    bool all_gather, const RunRanks& run_ranks) {
  const Traffic traffic = make_traffic(bench, config, tokens, all_gather);
  const auto parts = run_ranks([&](int r, Transport& transport) {
    const auto backend =
        make_backend(place_rank(bench.device, r, bench.num_ranks, bench.num_devices));
    BenchRank rank(traffic, transport, ops(*backend));
    RankReport report = check_pair(rank, static_cast<std::size_t>(r));
    rank.barrier();
    const double stamp = stamp_cost(ops(*backend));
    rank.barrier();
    time_pairs(bench, rank, transport, stamp, report);
    rank.exchange().check();
    rank.barrier();
    report.host_waits = !rank.can_be_captured();
    return to_bytes(report);
  });
  CaseResult result;
  result.rows = static_cast<std::int64_t>(
      std::ranges::count_if(traffic.topk_idx, [](std::int32_t e) { return e >= 0; }));
  ExchangeBenchTimes& t = result.times;
  double off_rank = 0;
  for (const std::string& part : parts) {
    const auto report = from_bytes<RankReport>(part);
    t.pair_us = report.pair_us, t.dispatch_us = report.dispatch_us;
    t.combine_us = report.combine_us;
    t.dispatch_call_us = report.dispatch_call_us, t.combine_call_us = report.combine_call_us;
    t.dispatch_bytes += report.dispatch_bytes, t.combine_bytes += report.combine_bytes;
    off_rank += report.off_rank_bytes;
    result.checked += report.checked;
    result.host_waits = report.host_waits;
  }
  const double bytes = t.dispatch_bytes + t.combine_bytes;
  t.off_rank_share = bytes > 0 ? off_rank / bytes : 0;
  return result;
}

/// Microseconds that a copy of `bytes` takes between two addresses that this rank's device knows.
double time_copy(BackendOps& backend, std::byte* to, const std::byte* from, std::size_t bytes) {
  const auto recording = backend.record(backend.stream(), [&](const std::function<void()>& mark) {
    mark();
    backend.copy_on_device(to, from, bytes, backend.stream());
    mark();
  });
  std::vector<double> us;
  for (int i = 0; i < 7; ++i) {
    recording->replay();
    us.push_back(recording->marks_us().at(0));
  }
  return median(us);
}

/// Of the first rank's device.
struct DeviceReport {
  char description[200] = {};
  double read = 0, copy = 0, link = 0, links_together = 0;  // GB/s
};

DeviceReport measure_device(const ExchangeBenchConfig& bench) {
  DeviceReport report;
  const auto backend = make_backend({.device = {bench.device, 0}});
  const std::string text = backend->description();
  text.copy(report.description, sizeof(report.description) - 1);
  report.read = backend->measure_read_bandwidth() * 1e-9;
  const std::size_t bytes = bench.device == Device::Kind::kHost ? 64u << 20 : 1u << 30;
  const auto from = backend->allocate(bytes), to = backend->allocate(bytes);
  const double us = time_copy(ops(*backend), to->data(), from->data(), bytes);
  report.copy = 2e-3 * static_cast<double>(bytes) / us;
  return report;
}

/// What the first rank's device copies from another one's: alone, then while each of the devices
/// copies from the next one. Ranks r < num_devices have a device each.
void measure_link(const ExchangeBenchConfig& bench, int num_devices, int rank, Transport& transport,
                  DeviceReport& report) {
  constexpr std::size_t kBytes = 256u << 20;
  const auto backend =
      make_backend(place_rank(bench.device, rank, bench.num_ranks, bench.num_devices));
  const std::shared_ptr<DeviceBuffer> memory = backend->allocate(kBytes);
  const auto to = backend->allocate(kBytes);
  const auto shared = transport.share_device_memory(
      std::shared_ptr<std::byte>(memory, memory->data()), kBytes, kBenchTimeout);
  const auto next = static_cast<std::size_t>((rank + 1) % num_devices);
  const auto copy = [&] {
    return time_copy(ops(*backend), to->data(), shared[next].get(), kBytes);
  };
  double us[2] = {};
  if (rank == 0) us[0] = copy();
  (void)transport.all_gather({}, kBenchTimeout);
  if (rank < num_devices) us[1] = copy();
  keep_slowest(transport, us);
  report.link = 1e-3 * static_cast<double>(kBytes) / us[0];
  report.links_together = 1e-3 * static_cast<double>(kBytes) / us[1];
}

ExchangeConfig config_of_case(const ExchangeBenchConfig& bench, int tokens) {
  check_argument(tokens >= 1, "tokens_per_rank {}; at least one", tokens);
  ExchangeConfig config = bench.exchange;
  config.max_tokens_per_rank = tokens;
  config.max_m = 0;
  config.peer_timeout = kBenchTimeout;
  return config;
}

void check_config(const ExchangeBenchConfig& bench) {
  check_argument(bench.pairs >= 1, "pairs {}; at least one", bench.pairs);
  check_argument(bench.repeats >= 1, "repeats {}; at least one", bench.repeats);
  check_argument(!bench.with_all_gather || bench.num_ranks <= 32,
                 "the all-gather baseline of {} ranks needs as many slots per token; at most 32",
                 bench.num_ranks);
  for (const int tokens : bench.tokens_per_rank) {
    (void)Exchange::workspace_bytes(config_of_case(bench, tokens), bench.num_ranks, bench.device);
  }
}

ExchangeBenchCase bench_case(const ExchangeBenchConfig& bench, int tokens,
                             const RunRanks& run_ranks) {
  ExchangeConfig config = config_of_case(bench, tokens);
  ExchangeBenchCase c{.tokens_per_rank = tokens};
  c.workspace_bytes = Exchange::workspace_bytes(config, bench.num_ranks, bench.device);
  const CaseResult mine = run_case(bench, config, tokens, false, run_ranks);
  c.exchange = mine.times, c.rows = mine.rows, c.checked_elements = mine.checked;
  c.host_waits = mine.host_waits;
  if (bench.with_all_gather) {
    config.num_experts = config.num_topk = bench.num_ranks;
    const CaseResult gathered = run_case(bench, config, tokens, true, run_ranks);
    c.all_gather = gathered.times;
    c.checked_elements += gathered.checked;
  }
  return c;
}

}  // namespace

ExchangeBenchReport bench_exchange(const ExchangeBenchConfig& bench,
                                   const std::function<void(double)>& on_progress,
                                   const RunRanks& run_ranks_in) {
  const RunRanks run_ranks =
      checked_ranks(bench.num_ranks, run_ranks_in, [&] { check_config(bench); });
  ExchangeBenchReport report;
  report.num_devices = devices_in_use(bench.device, bench.num_ranks, bench.num_devices);
  for (std::size_t i = 0; i < bench.tokens_per_rank.size(); ++i) {
    report.cases.push_back(bench_case(bench, bench.tokens_per_rank[i], run_ranks));
    if (on_progress) {
      on_progress(static_cast<double>(i + 1) / static_cast<double>(bench.tokens_per_rank.size()));
    }
  }
  // Last: by now the exchange has opened the way between the devices of one process.
  const auto parts = run_ranks([&](int r, Transport& transport) {
    DeviceReport mine;
    if (r == 0) mine = measure_device(bench);
    (void)transport.all_gather({}, kBenchTimeout);
    // Ranks of several hosts do not address each other's memory.
    const bool is_one_host = transport.hosts().num_hosts() == 1;
    if (report.num_devices > 1 && is_one_host)
      measure_link(bench, report.num_devices, r, transport, mine);
    return to_bytes(mine);
  });
  const auto first = from_bytes<DeviceReport>(parts.front());
  report.device = first.description;
  report.read_gbytes_per_s = first.read, report.copy_gbytes_per_s = first.copy;
  report.link_gbytes_per_s = first.link;
  report.links_together_gbytes_per_s = first.links_together;
  return report;
}

}  // namespace sluice
