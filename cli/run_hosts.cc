#include "run_hosts.h"

#include <fmt/core.h>

#include <algorithm>
#include <set>

#include "report.h"
#include "sluice/error.h"
#include "sluice/network_bytes.h"

namespace sluice::cli {
namespace {

ExchangeConfig exchange_of(const LayerRunConfig& config, const ModelGeometry& geometry,
                           const LayerRunResult& result) {
  return {.mode = config.mode,
          .wire = result.recipe.wire,
          .num_experts = geometry.num_experts,
          .num_slots = config.num_slots,
          .num_topk = geometry.num_topk,
          .hidden = static_cast<int>(geometry.hidden),
          .max_tokens_per_rank =
              static_cast<int>(std::max<std::int64_t>(1, std::ranges::max(config.tokens))),
          .hosts = config.hosts,
          .sum_parts = config.sum_parts};
}

/// Top-k entries of a token of rank `r` whose slots are on each host.
std::vector<int> entries_by_host(const Hosts& hosts, const Placement& placement,
                                 const Workload& load, int r, std::int64_t token) {
  std::vector<int> entries(static_cast<std::size_t>(hosts.num_hosts()));
  for (int k = 0; k < load.num_topk; ++k) {
    const std::int32_t expert = load.topk_idx[static_cast<std::size_t>(token * load.num_topk + k)];
    if (expert < 0) continue;
    const int slot = placement.slot_of_row(expert, r, static_cast<int>(token), k);
    ++entries[static_cast<std::size_t>(hosts.host_of(placement.rank_of(slot)))];
  }
  return entries;
}

}  // namespace

void resolve_hosts(int num_hosts, const Hosts& found, int sum_parts, LayerRunConfig& config) {
  config.hosts = num_hosts > 1 ? Hosts::even(num_hosts, config.num_ranks) : found;
  config.sum_parts = sum_parts;
  const int parts = sum_parts != 0 ? sum_parts : config.hosts.num_hosts();
  if (config.rebalances && parts > 1) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--rebalance: compares bits, which follow the parts that experts are "
                            "in where a sum has {} of them; give --sum-parts 1",
                            parts));
  }
}

std::string compare_with_real_hosts(const Hosts& hosts, const std::vector<std::string>& names) {
  const auto short_name = [&](int r) {
    const std::string& name = names[static_cast<std::size_t>(r)];
    return name.substr(0, name.find(' '));  // Without the boot.
  };
  if (hosts.num_hosts() == 1) {
    const std::set<std::string> real(names.begin(), names.end());
    if (real.size() <= 1) return "";
    return fmt::format(
        "the ranks are on {} hosts; a token crosses the network once for each rank that needs it, "
        "and with --hosts {} once for each host",
        real.size(), real.size());
  }
  for (int r = 0; r < static_cast<int>(names.size()); ++r) {
    const int first = hosts.ranks_of(hosts.host_of(r)).front();
    if (names[static_cast<std::size_t>(r)] == names[static_cast<std::size_t>(first)]) continue;
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--hosts {} makes ranks {} and {} ranks of one host, but they are on "
                            "{} and {}; start the ranks of a host one after the other, as many on "
                            "each (mpirun --map-by ppr:{}:node)",
                            hosts.num_hosts(), first, r, short_name(first), short_name(r),
                            hosts.num_ranks() / hosts.num_hosts()));
  }
  return "";
}

std::vector<HostTraffic> host_traffic(const LayerRunConfig& config, const ModelGeometry& geometry,
                                      const LayerRunResult& result,
                                      const std::vector<Workload>& loads) {
  const Hosts& hosts = config.hosts;
  const ExchangeConfig exchange = exchange_of(config, geometry, result);
  std::vector<HostTraffic> traffic(static_cast<std::size_t>(hosts.num_hosts()));
  const std::size_t header = network_header_bytes(exchange);
  // GPUs send whole pieces of fixed size where no host may wait (docs/exchange.md#several-hosts).
  const bool is_cuda = config.backend == Device::Kind::kCuda;
  const bool is_fixed = is_cuda && config.mode == Mode::kLowLatency;
  const auto others = static_cast<std::size_t>(hosts.num_hosts() - 1);
  for (int r = 0; r < config.num_ranks; ++r) {
    const int own = hosts.host_of(r);
    HostTraffic& mine = traffic[static_cast<std::size_t>(own)];
    const ExchangeCounters& counted = result.ranks[static_cast<std::size_t>(r)].counters;
    for (int peer = 0; peer < config.num_ranks; ++peer) {
      if (hosts.host_of(peer) == own) continue;
      mine.dispatch_bytes += counted.dispatch_bytes[static_cast<std::size_t>(peer)];
      mine.combine_bytes += counted.combine_bytes[static_cast<std::size_t>(peer)];
    }
    if (is_fixed) {
      mine.dispatch_formula_bytes += others * network_dispatch_piece_bytes(exchange);
      mine.combine_formula_bytes += others * network_combine_piece_bytes(exchange);
    } else {
      mine.dispatch_formula_bytes += others * header;
    }
    const Workload& load = loads[static_cast<std::size_t>(r)];
    std::vector<bool> has_header(traffic.size());
    for (std::int64_t t = 0; t < load.num_tokens; ++t) {
      const std::vector<int> entries = entries_by_host(hosts, result.placement, load, r, t);
      for (int h = 0; h < hosts.num_hosts(); ++h) {
        const int n = entries[static_cast<std::size_t>(h)];
        if (h == own || n == 0) continue;
        mine.token_copies += 1;
        mine.rows += n;
        if (is_fixed) continue;
        mine.dispatch_formula_bytes += network_record_bytes(exchange);
        std::size_t& home = traffic[static_cast<std::size_t>(h)].combine_formula_bytes;
        home += network_combine_bytes(exchange, n);
        if (is_cuda && !has_header[static_cast<std::size_t>(h)]) home += kNetworkHomeHeaderBytes;
        has_header[static_cast<std::size_t>(h)] = true;
      }
    }
  }
  return traffic;
}

bool report_hosts(const LayerRunConfig& config, const ModelGeometry& geometry,
                  const LayerRunResult& result, const std::vector<Workload>& loads,
                  nlohmann::ordered_json& json) {
  const int parts = config.sum_parts != 0 ? config.sum_parts : config.hosts.num_hosts();
  fmt::print("hosts     {}; {}. Over the network in one forward:\n", config.hosts.to_string(),
             parts == 1 ? std::string("every row goes home by itself")
                        : fmt::format("added up in {} parts", parts));
  Table table({"host", "tokens out", "of rows", "dispatch MB", "combine MB", "by formula"});
  bool passed = true;
  json["hosts"] = {{"num_hosts", config.hosts.num_hosts()},
                   {"ranks", config.hosts.to_string()},
                   {"sum_parts", parts}};
  const auto traffic = host_traffic(config, geometry, result, loads);
  for (std::size_t h = 0; h < traffic.size(); ++h) {
    const HostTraffic& t = traffic[h];
    passed = passed && t.is_as_formula();
    table.add({fmt::format("{}", h), fmt::format("{}", t.token_copies), fmt::format("{}", t.rows),
               fmt::format("{:.3f}", static_cast<double>(t.dispatch_bytes) * 1e-6),
               fmt::format("{:.3f}", static_cast<double>(t.combine_bytes) * 1e-6),
               t.is_as_formula()
                   ? std::string("the same")
                   : fmt::format("{} + {} B", t.dispatch_formula_bytes, t.combine_formula_bytes)});
    json["hosts"]["traffic"].push_back({{"token_copies", t.token_copies},
                                        {"rows", t.rows},
                                        {"dispatch_bytes", t.dispatch_bytes},
                                        {"combine_bytes", t.combine_bytes},
                                        {"dispatch_formula_bytes", t.dispatch_formula_bytes},
                                        {"combine_formula_bytes", t.combine_formula_bytes}});
  }
  fmt::print("{}", table.to_string());
  json["hosts"]["as_formula"] = passed;
  return passed;
}

}  // namespace sluice::cli
