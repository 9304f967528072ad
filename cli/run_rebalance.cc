#include "run_rebalance.h"

#include <fmt/core.h>

#include <algorithm>
#include <numeric>

#include "report.h"
#include "sluice/balance.h"
#include "sluice/lab/median.h"

namespace sluice::cli {
namespace {

double sum_of(const std::vector<std::int64_t>& rows) {
  return static_cast<double>(std::accumulate(rows.begin(), rows.end(), std::int64_t{0}));
}

}  // namespace

bool report_rebalance(const LayerRunResult& result, nlohmann::ordered_json& json) {
  std::vector<double> rows_before, rows_after;
  RebalanceCounters all;
  bool same_bits = true;
  for (const RankResult& rank : result.ranks) {
    rows_before.push_back(sum_of(rank.stats.rows_per_expert));
    rows_after.push_back(sum_of(rank.rebalance->rows));
    all.num_received += rank.moves.num_received;
    all.received_bytes += rank.moves.received_bytes;
    all.num_rounds = std::max(all.num_rounds, rank.moves.num_rounds);
    all.seconds = std::max(all.seconds, rank.moves.seconds);
    same_bits = same_bits && rank.rebalance->has_same_bits;
  }
  const double before = max_over_mean(rows_before), after = max_over_mean(rows_after);
  const std::vector<double>& times = result.ranks.front().rebalance->total_us;
  fmt::print(
      "rebalance layer {}: {} to other ranks, {} in {} and {:.2f} ms; fullest rank "
      "over mean {:.3f}, then {:.3f}; total {:.2f}, then {:.2f} ms; outputs {}\n",
      result.layer, counted(all.num_received, "expert"),
      human_bytes(static_cast<double>(all.received_bytes)), counted(all.num_rounds, "round"),
      all.seconds * 1e3, before, after, median(result.total_us) / 1000, median(times) / 1000,
      same_bits ? "the same bits" : "DIFFERENT");
  json["rebalance"] = {{"num_experts", all.num_received},
                       {"bytes", all.received_bytes},
                       {"num_rounds", all.num_rounds},
                       {"seconds", all.seconds},
                       {"rank_rows_max_over_mean_before", before},
                       {"rank_rows_max_over_mean_after", after},
                       {"rows_per_rank_after", rows_after},
                       {"repeats_us_after", times},
                       {"slot_experts_after", result.ranks.front().rebalance->slot_experts},
                       {"same_bits", same_bits}};
  return same_bits;
}

}  // namespace sluice::cli
