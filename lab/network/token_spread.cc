#include "sluice/lab/token_spread.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/counter_rng.h"
#include "core/fail.h"

namespace sluice {
namespace {

void check_rule(const RoutingRule& rule) {
  check_argument(rule.num_experts >= 1, "num_experts {}; at least one", rule.num_experts);
  check_argument(rule.num_topk >= 1 && rule.num_topk <= rule.num_experts,
                 "num_topk {} is not in 1 .. num_experts {}", rule.num_topk, rule.num_experts);
  check_argument(rule.num_groups >= 1 && rule.num_experts % rule.num_groups == 0,
                 "num_groups {} does not divide num_experts {}", rule.num_groups, rule.num_experts);
  check_argument(rule.num_topk_groups >= 1 && rule.num_topk_groups <= rule.num_groups,
                 "num_topk_groups {} is not in 1 .. num_groups {}", rule.num_topk_groups,
                 rule.num_groups);
  const int chosen = rule.num_experts / rule.num_groups * rule.num_topk_groups;
  check_argument(rule.num_topk <= chosen, "num_topk {}: {} of {} groups have {} experts",
                 rule.num_topk, rule.num_topk_groups, rule.num_groups, chosen);
}

void check_hosts(const Placement& placement, int num_hosts) {
  check_argument(num_hosts >= 1 && placement.num_ranks() % num_hosts == 0,
                 "num_hosts {} does not divide num_ranks {}", num_hosts, placement.num_ranks());
}

/// A polynomial in x up to degree num_topk, for sets of experts by their number: the coefficient of
/// x^j is at [j]. `none` weighs sets by the chance that no entry of theirs is in the place, `one`
/// by the chance that exactly one is.
struct Sets {
  std::vector<double> none, one;

  explicit Sets(std::size_t degree) : none(degree + 1, 0.0), one(degree + 1, 0.0) {}

  /// One more expert, of whose replicas the share `q` lies in the place.
  void add_expert(double q) {
    for (std::size_t j = none.size() - 1; j > 0; --j) {
      one[j] += (1 - q) * one[j - 1] + q * none[j - 1];
      none[j] += (1 - q) * none[j - 1];
    }
  }
  /// this += a * b
  void add_product(const Sets& a, const Sets& b) {
    for (std::size_t i = 0; i < none.size(); ++i) {
      for (std::size_t j = 0; i + j < none.size(); ++j) {
        none[i + j] += a.none[i] * b.none[j];
        one[i + j] += a.none[i] * b.one[j] + a.one[i] * b.none[j];
      }
    }
  }
};

/// The chances that none or exactly one of a token's entries goes to a place.
struct Chances {
  double none = 0, one = 0;
};

/// An expert, and the share of its replicas that lies in a place.
using ExpertShare = std::pair<int, double>;

class Router {
 public:
  explicit Router(const RoutingRule& rule)
      : rule_(rule),
        per_group_(static_cast<std::size_t>(rule.num_experts / rule.num_groups)),
        elsewhere_(static_cast<std::size_t>(rule.num_topk)) {
    elsewhere_.none[0] = 1;
    for (std::size_t e = 0; e < per_group_; ++e) elsewhere_.add_expert(0);
    num_sets_ = sum_over_groups({}).none;
  }

  /// here: each expert once, in ascending order.
  [[nodiscard]] Chances chances(std::span<const ExpertShare> here) const {
    const Chances sum = sum_over_groups(here);
    return {sum.none / num_sets_, sum.one / num_sets_};
  }

 private:
  /// Of one group. `at`: where its experts begin in `here`; moves behind them.
  [[nodiscard]] Sets sets_of_group(std::size_t group, std::span<const ExpertShare> here,
                                   std::size_t& at) const {
    const std::size_t first = at, begin = group * per_group_, end = begin + per_group_;
    while (at < here.size() && static_cast<std::size_t>(here[at].first) < end) ++at;
    if (at == first) return elsewhere_;
    Sets sets(static_cast<std::size_t>(rule_.num_topk));
    sets.none[0] = 1;
    for (std::size_t i = first; i < at; ++i) sets.add_expert(here[i].second);
    for (std::size_t n = at - first; n < per_group_; ++n) sets.add_expert(0);
    return sets;
  }

  /// Coefficient of z^num_topk_groups x^num_topk of the product over the groups of 1 + z sets.
  [[nodiscard]] Chances sum_over_groups(std::span<const ExpertShare> here) const {
    const auto k = static_cast<std::size_t>(rule_.num_topk);
    const auto most = static_cast<std::size_t>(rule_.num_topk_groups);
    std::vector<Sets> taken(most + 1, Sets(k));  // [groups taken]
    taken[0].none[0] = 1;
    std::size_t at = 0;
    for (std::size_t g = 0; g < static_cast<std::size_t>(rule_.num_groups); ++g) {
      const Sets own = sets_of_group(g, here, at);
      for (std::size_t n = most; n > 0; --n) taken[n].add_product(taken[n - 1], own);
    }
    return {taken[most].none[k], taken[most].one[k]};
  }

  RoutingRule rule_;
  std::size_t per_group_;
  Sets elsewhere_;       ///< Of a group without an expert in the place.
  double num_sets_ = 1;  ///< That a token may choose.
};

/// Replicas of each expert; empty slots have none.
std::vector<int> count_replicas(const Placement& placement) {
  std::vector<int> replicas(static_cast<std::size_t>(placement.num_experts()), 0);
  for (const int e : placement.slot_experts()) {
    if (e != kEmptySlot) ++replicas[static_cast<std::size_t>(e)];
  }
  return replicas;
}

/// Of `num_places` even parts of the slots.
std::vector<Chances> chances_of(const Router& router, const Placement& placement,
                                const std::vector<int>& replicas, int num_places) {
  const std::span<const int> slots = placement.slot_experts();
  const std::size_t size = slots.size() / static_cast<std::size_t>(num_places);
  std::vector<Chances> result;
  std::vector<ExpertShare> here;
  for (std::size_t p = 0; p < static_cast<std::size_t>(num_places); ++p) {
    const auto first = slots.begin() + static_cast<std::ptrdiff_t>(p * size);
    std::vector<int> experts(first, first + static_cast<std::ptrdiff_t>(size));
    std::ranges::sort(experts);
    here.clear();
    for (const int e : experts) {
      if (e == kEmptySlot) continue;
      if (here.empty() || here.back().first != e) here.emplace_back(e, 0.0);
      here.back().second += 1.0 / replicas[static_cast<std::size_t>(e)];
    }
    result.push_back(router.chances(here));
  }
  return result;
}

/// Adds one to each distinct place, and to those that occur once. Returns how many are distinct.
std::size_t count_places(std::vector<std::size_t>& places, std::vector<double>& distinct,
                         std::vector<double>* once) {
  std::ranges::sort(places);
  std::size_t count = 0;
  for (auto first = places.begin(); first != places.end(); ++count) {
    const auto last = std::find_if(first, places.end(), [&](auto p) { return p != *first; });
    distinct[*first] += 1;
    if (once != nullptr && last - first == 1) (*once)[*first] += 1;
    first = last;
  }
  return count;
}

double sum_of(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

}  // namespace

double TokenSpread::hosts_per_token() const {
  return sum_of(hosts);
}

double TokenSpread::ranks_per_token() const {
  return sum_of(ranks);
}

TokenSpread even_spread(const RoutingRule& rule, const Placement& placement, int num_hosts) {
  check_rule(rule);
  check_hosts(placement, num_hosts);
  check_argument(placement.num_experts() == rule.num_experts,
                 "the placement has {} experts, the routing {}", placement.num_experts(),
                 rule.num_experts);
  const std::vector<int> replicas = count_replicas(placement);
  const Router router(rule);
  TokenSpread spread;
  for (const Chances& host : chances_of(router, placement, replicas, num_hosts)) {
    spread.hosts.push_back(1 - host.none), spread.one_entry.push_back(host.one);
  }
  for (const Chances& rank : chances_of(router, placement, replicas, placement.num_ranks())) {
    spread.ranks.push_back(1 - rank.none);
  }
  for (const int e : placement.slot_experts()) {
    spread.slots.push_back(e == kEmptySlot ? 0.0
                                           : static_cast<double>(rule.num_topk) / rule.num_experts /
                                                 replicas[static_cast<std::size_t>(e)]);
  }
  return spread;
}

TokenSpread count_spread(std::span<const std::int32_t> topk_idx, int num_topk, int tokens_per_rank,
                         const Placement& placement, int num_hosts) {
  check_hosts(placement, num_hosts);
  check_argument(num_topk >= 1 && !topk_idx.empty() &&
                     topk_idx.size() % static_cast<std::size_t>(num_topk) == 0,
                 "topk_idx has {} entries, not a multiple of num_topk {}", topk_idx.size(),
                 num_topk);
  check_argument(tokens_per_rank >= 1, "tokens_per_rank {}; at least one", tokens_per_rank);
  const auto num_ranks = static_cast<std::size_t>(placement.num_ranks());
  const std::size_t ranks_per_host = num_ranks / static_cast<std::size_t>(num_hosts);
  TokenSpread spread{.hosts = std::vector<double>(static_cast<std::size_t>(num_hosts)),
                     .one_entry = std::vector<double>(static_cast<std::size_t>(num_hosts)),
                     .ranks = std::vector<double>(num_ranks),
                     .slots = std::vector<double>(static_cast<std::size_t>(placement.num_slots()))};
  const auto k = static_cast<std::size_t>(num_topk);
  const std::size_t num_tokens = topk_idx.size() / k;
  std::vector<std::size_t> ranks, hosts;  // Of each entry of a token.
  double squares = 0;
  for (std::size_t t = 0; t < num_tokens; ++t) {
    ranks.clear(), hosts.clear();
    const auto source = static_cast<int>(t / static_cast<std::size_t>(tokens_per_rank) % num_ranks);
    const auto token = static_cast<int>(t % static_cast<std::size_t>(tokens_per_rank));
    for (std::size_t i = 0; i < k; ++i) {
      const std::int32_t e = topk_idx[t * k + i];
      check_argument(e >= -1 && e < placement.num_experts(),
                     "topk_idx[{}, {}] is {}; there are {} experts", t, i, e,
                     placement.num_experts());
      if (e < 0) continue;
      const int slot = placement.slot_of_row(e, source, token, static_cast<int>(i));
      ranks.push_back(static_cast<std::size_t>(placement.rank_of(slot)));
      hosts.push_back(ranks.back() / ranks_per_host);
      spread.slots[static_cast<std::size_t>(slot)] += 1;
    }
    (void)count_places(ranks, spread.ranks, nullptr);
    const auto distinct = static_cast<double>(count_places(hosts, spread.hosts, &spread.one_entry));
    squares += distinct * distinct;
  }
  const auto n = static_cast<double>(num_tokens);
  for (auto* const values : {&spread.hosts, &spread.one_entry, &spread.ranks, &spread.slots}) {
    for (double& value : *values) value /= n;
  }
  const double mean = spread.hosts_per_token();
  spread.standard_error = std::sqrt(std::max(0.0, squares / n - mean * mean) / n);
  return spread;
}

namespace {

/// How often a token chooses each expert: num_topk * rows / sum(rows).
std::vector<double> shares_of(const RoutingRule& rule, std::span<const std::int64_t> rows) {
  check_argument(rows.size() == static_cast<std::size_t>(rule.num_experts),
                 "rows of {} experts, the routing has {}", rows.size(), rule.num_experts);
  std::int64_t all = 0;
  for (std::size_t e = 0; e < rows.size(); ++e) {
    check_argument(rows[e] >= 0, "expert {} has {} rows", e, rows[e]);
    all += rows[e];
  }
  std::vector<double> shares;
  for (std::size_t e = 0; e < rows.size(); ++e) {
    shares.push_back(
        all > 0 ? rule.num_topk * static_cast<double>(rows[e]) / static_cast<double>(all) : 0);
    check_argument(shares.back() <= 1,
                   "expert {} has {} of {} rows; with top-{} that is more than one for each token",
                   e, rows[e], all, rule.num_topk);
  }
  const auto used = std::ranges::count_if(shares, [](double share) { return share > 0; });
  check_argument(used >= rule.num_topk, "{} experts have rows; top-{} needs as many", used,
                 rule.num_topk);
  return shares;
}

using Order = std::vector<std::pair<double, std::int32_t>>;

/// Systematic sampling: the experts in an order of their own for each token, their shares end to
/// end as an interval of length num_topk, and one point in each unit of it.
void sample_by_shares(const CounterRng& rng, std::span<const double> shares, int num_topk,
                      Order& order, std::vector<std::int32_t>& result) {
  order.clear();
  for (std::size_t e = 0; e < shares.size(); ++e) {
    order.emplace_back(rng.uniform(e), static_cast<std::int32_t>(e));
  }
  std::ranges::sort(order);
  const std::size_t first = result.size();
  double next = rng.uniform(shares.size()), sum = 0;
  for (const auto& [key, expert] : order) {
    sum += shares[static_cast<std::size_t>(expert)];
    if (sum > next && result.size() - first < static_cast<std::size_t>(num_topk)) {
      result.push_back(expert), next += 1;
    }
  }
  result.resize(first + static_cast<std::size_t>(num_topk),
                -1);  // Where rounding ate the last one.
}

/// Of which groups a token's experts may come: [num_groups].
std::vector<bool> choose_groups(const RoutingRule& rule, const std::vector<double>& arrival) {
  const auto num_groups = static_cast<std::size_t>(rule.num_groups);
  const std::size_t size = arrival.size() / num_groups;
  std::vector<std::pair<double, std::size_t>> order;
  for (std::size_t g = 0; g < num_groups; ++g) {
    double first = HUGE_VAL, second = HUGE_VAL;
    for (std::size_t e = g * size; e < (g + 1) * size; ++e) {
      if (arrival[e] < first)
        second = std::exchange(first, arrival[e]);
      else
        second = std::min(second, arrival[e]);
    }
    order.emplace_back(size > 1 ? std::log(first) + std::log(second) : std::log(first), g);
  }
  std::ranges::sort(order);
  std::vector<bool> chosen(num_groups, false);
  for (int n = 0; n < rule.num_topk_groups; ++n)
    chosen[order[static_cast<std::size_t>(n)].second] = true;
  return chosen;
}

}  // namespace

std::vector<std::int32_t> sample_routing(const RoutingRule& rule,
                                         std::span<const std::int64_t> rows, int num_tokens,
                                         std::uint64_t seed) {
  check_rule(rule);
  check_argument(num_tokens >= 1, "num_tokens {}; at least one", num_tokens);
  const std::vector<double> shares = shares_of(rule, rows);
  const std::size_t per_group = shares.size() / static_cast<std::size_t>(rule.num_groups);
  std::vector<std::int32_t> result;
  std::vector<double> arrival(shares.size());
  Order order;
  for (int t = 0; t < num_tokens; ++t) {
    const CounterRng rng(seed, static_cast<std::uint64_t>(t));
    if (rule.num_topk_groups == rule.num_groups) {
      sample_by_shares(rng, shares, rule.num_topk, order, result);
      continue;
    }
    for (std::size_t e = 0; e < shares.size(); ++e) {
      const double rate = -std::log1p(-shares[e]);
      arrival[e] = rate > 0 ? -std::log1p(-rng.uniform(e)) / rate : HUGE_VAL;
    }
    const std::vector<bool> chosen = choose_groups(rule, arrival);
    order.clear();
    for (std::size_t e = 0; e < shares.size(); ++e) {
      if (chosen[e / per_group]) order.emplace_back(arrival[e], static_cast<std::int32_t>(e));
    }
    std::partial_sort(order.begin(), order.begin() + rule.num_topk, order.end());
    for (int i = 0; i < rule.num_topk; ++i) {
      const auto& [time, expert] = order[static_cast<std::size_t>(i)];
      result.push_back(std::isinf(time) ? -1 : expert);
    }
  }
  return result;
}

}  // namespace sluice
