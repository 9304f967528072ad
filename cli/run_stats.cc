#include "run_stats.h"

#include <fmt/core.h>

#include <algorithm>
#include <numeric>

#include "report.h"
#include "sluice/balance.h"
#include "sluice/lab/files.h"

namespace sluice::cli {
namespace {

/// Rows that each rank sent home to each other: every one is `hidden` bf16 values.
std::vector<std::uint64_t> combine_rows(const ExchangeCounters& c, const ModelGeometry& geometry) {
  std::vector<std::uint64_t> rows = c.combine_bytes;
  for (std::uint64_t& n : rows) n /= 2 * static_cast<std::uint64_t>(geometry.hidden);
  return rows;
}

/// How even the rows were, where the experts are at the end of the run.
struct Balance {
  std::vector<std::int64_t> rows_per_expert;  // [num_experts], of the last forward
  std::vector<std::int64_t> totals;           // [num_experts], of all repeats
  std::vector<double> rows_per_rank;          // [num_ranks], of the last forward
  double imbalance_max_over_mean = 0;         // Of experts.
  double rank_max_over_mean = 0;
};

/// `rows` of a rank's slots, added to those of the experts in them.
void add_by_expert(const std::vector<std::int64_t>& rows, std::span<const int> slot_experts,
                   std::vector<std::int64_t>& by_expert) {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (slot_experts[i] != kEmptySlot) {
      by_expert[static_cast<std::size_t>(slot_experts[i])] += rows[i];
    }
  }
}

/// The experts in the slots of rank `r`, once they have moved.
std::span<const int> slots_at_end(const LayerRunResult& result, std::size_t r) {
  const auto& moved = result.ranks[r].rebalance;
  if (!moved) return result.placement.slot_experts(static_cast<int>(r));
  const auto count = static_cast<std::size_t>(result.placement.slots_per_rank());
  return std::span(moved->slot_experts).subspan(r * count, count);
}
const std::vector<std::int64_t>& counted_at_end(const RankResult& rank) {
  return rank.rebalance ? rank.rebalance->counted_rows : rank.counted_rows;
}

Balance balance_of(const LayerRunResult& result) {
  Balance b;
  const Placement& placement = result.placement;
  b.rows_per_expert.resize(static_cast<std::size_t>(placement.num_experts()));
  b.totals.resize(b.rows_per_expert.size());
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    const auto& last = rank.rebalance ? rank.rebalance->rows : rank.stats.rows_per_expert;
    add_by_expert(last, slots_at_end(result, r), b.rows_per_expert);
    add_by_expert(rank.counted_rows, placement.slot_experts(static_cast<int>(r)), b.totals);
    if (rank.rebalance) {
      add_by_expert(rank.rebalance->counted_rows, slots_at_end(result, r), b.totals);
    }
    b.rows_per_rank.push_back(std::accumulate(last.begin(), last.end(), 0.0));
  }
  b.imbalance_max_over_mean =
      max_over_mean(std::vector<double>(b.rows_per_expert.begin(), b.rows_per_expert.end()));
  b.rank_max_over_mean = max_over_mean(b.rows_per_rank);
  return b;
}

nlohmann::ordered_json to_json(const RebalanceCounters& c) {
  return {{"num_rebalances", c.num_rebalances},
          {"num_received", c.num_received},
          {"num_sent", c.num_sent},
          {"num_copied", c.num_copied},
          {"num_rounds", c.num_rounds},
          {"received_bytes", c.received_bytes},
          {"sent_bytes", c.sent_bytes},
          {"seconds", c.seconds}};
}

/// One family of the Prometheus text format.
class Family {
 public:
  Family(std::string& out, std::string name, const char* type, const char* help)
      : out_(out), name_(std::move(name)) {
    out_ += fmt::format("# HELP {} {}\n# TYPE {} {}\n", name_, help, name_, type);
  }
  template <class T>
  void add(const std::string& labels, T value) {
    out_ += fmt::format("{}{{{}}} {}\n", name_, labels, value);
  }

 private:
  std::string& out_;
  std::string name_;
};

}  // namespace

std::uint64_t outputs_digest(const LayerRunResult& result) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const RankResult& rank : result.ranks) {
    for (const std::uint16_t bits : rank.y) {
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
  }
  return hash;
}

ExpertRows expert_rows(const RunResult& result) {
  ExpertRows rows;
  for (const LayerRunResult& layer : result.layers) {
    rows.layers.push_back({.layer = layer.layer, .steps = {balance_of(layer).rows_per_expert}});
  }
  rows.num_experts = static_cast<int>(rows.layers.front().steps.front().size());
  return rows;
}

nlohmann::ordered_json stats_json(const LayerRunResult& result, const ModelGeometry& geometry) {
  const Balance balance = balance_of(result);
  nlohmann::ordered_json json = {{"imbalance_max_over_mean", balance.imbalance_max_over_mean},
                                 {"rows_per_expert", balance.rows_per_expert},
                                 {"rows_per_expert_total", balance.totals},
                                 {"rows_per_rank", balance.rows_per_rank},
                                 {"rank_rows_max_over_mean", balance.rank_max_over_mean}};
  for (const RankResult& rank : result.ranks) {
    const ExchangeCounters& c = rank.totals;
    json["ranks"].push_back({{"num_dispatches", c.num_dispatches},
                             {"dispatch_bytes", c.dispatch_bytes},
                             {"dispatch_rows", c.dispatch_rows},
                             {"combine_bytes", c.combine_bytes},
                             {"combine_rows", combine_rows(c, geometry)},
                             {"wait_ns", c.wait_ns},
                             {"saturated_values", c.saturated_values},
                             {"counted_rows", counted_at_end(rank)},
                             {"rebalances", to_json(rank.moves)}});
  }
  return json;
}

void print_stats(const LayerRunResult& result, const ModelGeometry& geometry) {
  fmt::print("stats     of {} dispatches since creation; from a rank to a peer\n",
             result.ranks[0].totals.num_dispatches);
  Table table({"rank", "peer", "rows out", "bytes out", "rows home", "bytes home", "waited ms"});
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const ExchangeCounters& c = result.ranks[r].totals;
    const auto home = combine_rows(c, geometry);
    for (std::size_t p = 0; p < result.ranks.size(); ++p) {
      table.add({fmt::format("{}", r), fmt::format("{}", p), fmt::format("{}", c.dispatch_rows[p]),
                 fmt::format("{}", c.dispatch_bytes[p]), fmt::format("{}", home[p]),
                 fmt::format("{}", c.combine_bytes[p]),
                 fmt::format("{:.2f}", static_cast<double>(c.wait_ns[p]) * 1e-6)});
    }
  }
  fmt::print("{}", table.to_string());
  const Balance balance = balance_of(result);
  std::string rows;
  for (const std::int64_t n : balance.rows_per_expert) rows += fmt::format(" {}", n);
  fmt::print("rows      by expert, last forward:{}\n", rows);
  std::string ranks;
  for (const double n : balance.rows_per_rank) ranks += fmt::format(" {:.0f}", n);
  fmt::print("          by rank:{}; rank_rows_max_over_mean {:.3f}\n", ranks,
             balance.rank_max_over_mean);
  std::uint64_t saturated = 0;
  for (const RankResult& rank : result.ranks) saturated += rank.totals.saturated_values;
  fmt::print("          imbalance_max_over_mean {:.3f}; {} values saturated while sending\n",
             balance.imbalance_max_over_mean, saturated);
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RebalanceCounters& moves = result.ranks[r].moves;
    if (moves.num_rebalances == 0) continue;
    fmt::print(
        "moves     rank {}: {}, {} and {} bytes received, {} and {} sent, {} copied, {:.2f} ms\n",
        r, counted(moves.num_rebalances, "rebalance"), counted(moves.num_received, "expert"),
        moves.received_bytes, moves.num_sent, moves.sent_bytes, moves.num_copied,
        moves.seconds * 1e3);
  }
}

namespace {

/// The families of what moves between ranks.
void add_traffic(std::string& text, const std::vector<LayerRunResult>& layers,
                 const ModelGeometry& geometry) {
  using Counters = ExchangeCounters;
  const auto per_pair = [&](const char* name, const char* help, const char* peer_label,
                            const auto& value) {
    Family family(text, name, "counter", help);
    for (const LayerRunResult& layer : layers) {
      for (std::size_t r = 0; r < layer.ranks.size(); ++r) {
        for (std::size_t p = 0; p < layer.ranks.size(); ++p) {
          family.add(
              fmt::format("layer=\"{}\",rank=\"{}\",{}=\"{}\"", layer.layer, r, peer_label, p),
              value(layer.ranks[r].totals, p));
        }
      }
    }
  };
  per_pair("sluice_dispatch_bytes_total", "Bytes put by dispatch.", "peer",
           [](const Counters& c, std::size_t p) { return c.dispatch_bytes[p]; });
  per_pair("sluice_dispatch_rows_total", "Token copies sent by dispatch.", "peer",
           [](const Counters& c, std::size_t p) { return c.dispatch_rows[p]; });
  per_pair("sluice_combine_bytes_total", "Bytes put by combine.", "peer",
           [](const Counters& c, std::size_t p) { return c.combine_bytes[p]; });
  per_pair("sluice_combine_rows_total", "Expert outputs sent home by combine.", "peer",
           [&](const Counters& c, std::size_t p) { return combine_rows(c, geometry)[p]; });
  per_pair(
      "sluice_wait_seconds_total", "Time spent waiting for a source rank.", "source",
      [](const Counters& c, std::size_t p) { return static_cast<double>(c.wait_ns[p]) * 1e-9; });
}

/// The families of which each rank has one value.
void add_ranks(std::string& text, const std::vector<LayerRunResult>& layers) {
  const auto per_rank = [&](const char* name, const char* help, const auto& value) {
    Family family(text, name, "counter", help);
    for (const LayerRunResult& layer : layers) {
      for (std::size_t r = 0; r < layer.ranks.size(); ++r) {
        family.add(fmt::format("layer=\"{}\",rank=\"{}\"", layer.layer, r), value(layer.ranks[r]));
      }
    }
  };
  per_rank("sluice_dispatches_total", "Dispatches since creation.",
           [](const RankResult& r) { return r.totals.num_dispatches; });
  per_rank("sluice_saturated_values_total", "Values clipped to +-448 while quantizing to send.",
           [](const RankResult& r) { return r.totals.saturated_values; });
  per_rank("sluice_rebalances_total", "Times that the experts of the layer moved.",
           [](const RankResult& r) { return r.moves.num_rebalances; });
  per_rank("sluice_rebalance_received_experts_total", "Experts that came from other ranks.",
           [](const RankResult& r) { return r.moves.num_received; });
  per_rank("sluice_rebalance_sent_experts_total", "Experts that went to other ranks.",
           [](const RankResult& r) { return r.moves.num_sent; });
  per_rank("sluice_rebalance_copied_experts_total", "Experts copied between slots of the rank.",
           [](const RankResult& r) { return r.moves.num_copied; });
  per_rank("sluice_rebalance_received_bytes_total", "Bytes of experts from other ranks.",
           [](const RankResult& r) { return r.moves.received_bytes; });
  per_rank("sluice_rebalance_sent_bytes_total", "Bytes of experts to other ranks.",
           [](const RankResult& r) { return r.moves.sent_bytes; });
  per_rank("sluice_rebalance_seconds_total", "Time that rebalances took.",
           [](const RankResult& r) { return r.moves.seconds; });
}

/// The families of rows.
void add_rows(std::string& text, const std::vector<LayerRunResult>& layers) {
  std::vector<Balance> balances;
  for (const LayerRunResult& layer : layers) balances.push_back(balance_of(layer));
  {
    Family family(text, "sluice_expert_rows", "gauge", "Rows of each expert in the last forward.");
    for (std::size_t i = 0; i < layers.size(); ++i) {
      for (std::size_t e = 0; e < balances[i].rows_per_expert.size(); ++e) {
        family.add(fmt::format("layer=\"{}\",expert=\"{}\"", layers[i].layer, e),
                   balances[i].rows_per_expert[e]);
      }
    }
  }
  {
    Family family(text, "sluice_slot_rows_total", "counter",
                  "Rows that each expert slot of a rank has received since experts last moved; "
                  "expert is its logical expert.");
    for (const LayerRunResult& layer : layers) {
      for (std::size_t r = 0; r < layer.ranks.size(); ++r) {
        const auto& rows = counted_at_end(layer.ranks[r]);
        for (std::size_t i = 0; i < rows.size(); ++i) {
          const int expert = slots_at_end(layer, r)[i];
          if (expert == kEmptySlot) continue;
          family.add(fmt::format("layer=\"{}\",rank=\"{}\",slot=\"{}\",expert=\"{}\"", layer.layer,
                                 r, i, expert),
                     rows[i]);
        }
      }
    }
  }
  const auto per_layer = [&](const char* name, const char* help, double Balance::*value) {
    Family family(text, name, "gauge", help);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      family.add(fmt::format("layer=\"{}\"", layers[i].layer), balances[i].*value);
    }
  };
  per_layer("sluice_imbalance_max_over_mean", "Fullest expert over the mean expert.",
            &Balance::imbalance_max_over_mean);
  per_layer("sluice_rank_rows_max_over_mean", "Rows of the fullest rank over the mean rank.",
            &Balance::rank_max_over_mean);
}

}  // namespace

void write_metrics(const std::string& path, const std::vector<LayerRunResult>& layers,
                   const ModelGeometry& geometry) {
  std::string text;
  add_traffic(text, layers, geometry);
  add_ranks(text, layers);
  add_rows(text, layers);
  write_file(path, text);
}

}  // namespace sluice::cli
