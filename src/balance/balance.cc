#include "sluice/balance.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <queue>

#include "balance/keep_places.h"
#include "balance/rank_bins.h"
#include "core/fail.h"

namespace sluice {
namespace {

using Rows = std::span<const std::int64_t>;

/// Whoever calls names these numbers in another way: BalanceConfig, Python or the command line.
void check(Rows rows, const BalanceConfig& c) {
  const auto num_experts = static_cast<int>(rows.size());
  check_argument(num_experts > 0, "rows of no experts are given");
  for (int e = 0; e < num_experts; ++e) {
    const std::int64_t n = rows[static_cast<std::size_t>(e)];
    check_argument(n >= 0, "expert {} has {} rows", e, n);
  }
  check_argument(c.num_ranks > 0 && c.num_ranks <= BalanceConfig::kMaxRanks,
                 "{} ranks are not in [1, {}]", c.num_ranks, int{BalanceConfig::kMaxRanks});
  check_argument(c.num_slots >= num_experts, "{} slots are fewer than {} experts", c.num_slots,
                 num_experts);
  check_argument(c.num_slots % c.num_ranks == 0, "{} slots are no multiple of {} ranks",
                 c.num_slots, c.num_ranks);
  check_argument(c.num_hosts > 0 && c.num_ranks % c.num_hosts == 0,
                 "{} hosts do not divide {} ranks", c.num_hosts, c.num_ranks);
  if (c.num_groups == 0) return;
  check_argument(c.num_groups > 0 && num_experts % c.num_groups == 0,
                 "{} groups do not divide {} experts", c.num_groups, num_experts);
  const int per_host = (c.num_groups + c.num_hosts - 1) / c.num_hosts;
  const int most = per_host * (num_experts / c.num_groups);
  check_argument(most <= c.num_slots / c.num_hosts,
                 "{} groups: a host has up to {} of {} experts, and {} slots give it {}",
                 c.num_groups, per_host, num_experts / c.num_groups, c.num_slots,
                 c.num_slots / c.num_hosts);
}

/// How many replicas each of `experts` gets in `num_slots` slots: [num_experts], 0 for the others.
/// One by one, slots go to the expert with the most rows per replica, until it has one on each
/// rank. That makes the largest replica as small as it can be.
std::vector<int> count_replicas(Rows rows, std::span<const int> experts, int num_slots,
                                int num_ranks) {
  struct Candidate {
    double rows_per_replica;
    int expert;
    bool operator<(const Candidate& other) const {  // The largest, then the first, is on top.
      if (rows_per_replica != other.rows_per_replica) {
        return rows_per_replica < other.rows_per_replica;
      }
      return expert > other.expert;
    }
  };
  std::vector<int> count(rows.size(), 0);
  std::priority_queue<Candidate> queue;
  for (const int e : experts) {
    count[static_cast<std::size_t>(e)] = 1;
    queue.push({static_cast<double>(rows[static_cast<std::size_t>(e)]), e});
  }
  for (int spare = num_slots - static_cast<int>(experts.size()); spare > 0 && !queue.empty();) {
    Candidate top = queue.top();
    queue.pop();
    int& replicas = count[static_cast<std::size_t>(top.expert)];
    if (replicas == num_ranks || top.rows_per_replica == 0) continue;
    ++replicas, --spare;
    top.rows_per_replica =
        static_cast<double>(rows[static_cast<std::size_t>(top.expert)]) / replicas;
    queue.push(top);
  }
  return count;
}

/// The experts of each host: whole groups, as many on each host as evenness allows.
std::vector<std::vector<int>> split_over_hosts(Rows rows, const BalanceConfig& c, bool improved) {
  const std::size_t num_groups =
      c.num_groups == 0 ? rows.size() : static_cast<std::size_t>(c.num_groups);
  const std::size_t group_size = rows.size() / num_groups;
  const auto num_hosts = static_cast<std::size_t>(c.num_hosts);
  std::vector<double> group_rows(num_groups);
  for (std::size_t e = 0; e < rows.size(); ++e) {
    group_rows[e / group_size] += static_cast<double>(rows[e]);
  }
  RankBins hosts(num_hosts, (num_groups + num_hosts - 1) / num_hosts, std::move(group_rows),
                 std::vector<int>(num_groups, 1));
  hosts.pack();
  if (improved) hosts.improve(/*may_repeat=*/false);
  std::vector<std::vector<int>> experts(num_hosts);
  for (std::size_t h = 0; h < num_hosts; ++h) {
    for (const std::size_t group : hosts.items(h)) {
      for (std::size_t i = 0; i < group_size; ++i) {
        experts[h].push_back(static_cast<int>(group * group_size + i));
      }
    }
    std::ranges::sort(experts[h]);
  }
  return experts;
}

/// The experts of each rank, and the rows of the fullest rank.
struct Solution {
  std::vector<std::vector<int>> experts;  // [num_ranks][at most num_slots / num_ranks], ascending
  double fullest = 0;
};

// An empty slot has to gain this much: a replica more helps when other experts become hot.
constexpr double kWorthEmptySlots = 0.995;

/// One host's experts on its ranks. Replicas for every free slot are not always best: many small
/// ones leave fewer ways to make two ranks even. So where they do not come out even, half of the
/// free slots and none are tried, too.
RankBins place_on_ranks(Rows rows, std::span<const int> experts, int num_slots, int num_ranks) {
  const std::vector<double> all_rows(rows.begin(), rows.end());
  const int spare = num_slots - static_cast<int>(experts.size());
  std::optional<RankBins> best;
  for (const int filled : {spare, spare / 2, 0}) {
    if (best && (best->is_even() || filled == spare)) break;
    RankBins ranks(static_cast<std::size_t>(num_ranks),
                   static_cast<std::size_t>(num_slots / num_ranks), all_rows,
                   count_replicas(rows, experts, num_slots - spare + filled, num_ranks));
    ranks.pack();
    ranks.improve(/*may_repeat=*/true);
    if (!best || ranks.fullest_rows() < best->fullest_rows() * kWorthEmptySlots) {
      best = std::move(ranks);
    }
  }
  return *best;
}

Solution solve(Rows rows, const BalanceConfig& c, bool with_even_hosts) {
  Solution solution;
  const int ranks_per_host = c.num_ranks / c.num_hosts;
  for (const std::vector<int>& experts : split_over_hosts(rows, c, with_even_hosts)) {
    const RankBins ranks = place_on_ranks(rows, experts, c.num_slots / c.num_hosts, ranks_per_host);
    for (std::size_t r = 0; r < static_cast<std::size_t>(ranks_per_host); ++r) {
      std::vector<int>& mine = solution.experts.emplace_back();
      for (const std::size_t e : ranks.items(r)) mine.push_back(static_cast<int>(e));
      std::ranges::sort(mine);
    }
    solution.fullest = std::max(solution.fullest, ranks.fullest_rows());
  }
  return solution;
}

void check_previous(const Placement& previous, int num_experts, const BalanceConfig& c) {
  const auto check_same = [](const char* what, int is, int wanted) {
    check_argument(is == wanted, "previous placement: {} {}, expected {}", what, is, wanted);
  };
  check_same("num_experts", previous.num_experts(), num_experts);
  check_same("num_ranks", previous.num_ranks(), c.num_ranks);
  check_same("num_slots", previous.num_slots(), c.num_slots);
}

}  // namespace

Placement balance(std::span<const std::int64_t> rows_per_expert, const BalanceConfig& config,
                  const Placement& previous) {
  check(rows_per_expert, config);
  const auto num_experts = static_cast<int>(rows_per_expert.size());
  if (previous.num_slots() > 0) check_previous(previous, num_experts, config);
  Solution best = solve(rows_per_expert, config, /*with_even_hosts=*/true);
  if (config.num_hosts > 1) {
    // Hosts with the same rows are not always those whose ranks come out best.
    Solution other = solve(rows_per_expert, config, /*with_even_hosts=*/false);
    if (other.fullest < best.fullest) best = std::move(other);
  }
  const std::span<const int> old = previous.slot_experts();
  if (!old.empty()) keep_ranks(best.experts, old, config.num_hosts);
  return Placement::create(num_experts, config.num_ranks,
                           fill_slots(best.experts, config.num_slots, old));
}

std::vector<double> expected_rows(std::span<const std::int64_t> rows_per_expert,
                                  const Placement& placement) {
  check_argument(rows_per_expert.size() == static_cast<std::size_t>(placement.num_experts()),
                 "rows of {} experts are given, and the placement has {}", rows_per_expert.size(),
                 placement.num_experts());
  std::vector<double> rows(static_cast<std::size_t>(placement.num_ranks()), 0.0);
  for (int s = 0; s < placement.num_slots(); ++s) {
    const int e = placement.expert_of(s);
    if (e == kEmptySlot) continue;
    rows[static_cast<std::size_t>(placement.rank_of(s))] +=
        static_cast<double>(rows_per_expert[static_cast<std::size_t>(e)]) /
        placement.num_replicas(e);
  }
  return rows;
}

double max_over_mean(std::span<const double> values) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    check_argument(std::isfinite(values[i]) && values[i] >= 0,
                   "values[{}] = {} is not a finite number, 0 or above", i, values[i]);
  }
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  if (!(sum > 0)) return 0;
  return std::ranges::max(values) * static_cast<double>(values.size()) / sum;
}

int count_moves(const Placement& from, const Placement& to) {
  check_argument(from.num_experts() == to.num_experts(), "placements of {} experts and of {}",
                 from.num_experts(), to.num_experts());
  check_argument(from.num_ranks() == to.num_ranks(), "placements over {} ranks and over {}",
                 from.num_ranks(), to.num_ranks());
  int moves = 0;
  for (int r = 0; r < to.num_ranks(); ++r) {
    const std::span<const int> before = from.slot_experts(r);
    for (const int e : to.slot_experts(r)) {
      if (e != kEmptySlot && std::ranges::find(before, e) == before.end()) ++moves;
    }
  }
  return moves;
}

}  // namespace sluice
