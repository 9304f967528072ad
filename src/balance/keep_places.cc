#include "balance/keep_places.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>

namespace sluice {
namespace {

using Sets = std::vector<std::vector<int>>;  // Experts, each set in ascending order.

std::ptrdiff_t num_common(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> common;
  std::ranges::set_intersection(a, b, std::back_inserter(common));
  return std::ssize(common);
}

/// For each set of `to`, the set of `from` that takes its number: the pair with the most in common
/// first, and of pairs with as many the first.
std::vector<std::size_t> match(const Sets& from, const Sets& to) {
  const std::size_t n = from.size();
  std::vector<std::ptrdiff_t> common(n * n);
  for (std::size_t f = 0; f < n; ++f) {
    for (std::size_t t = 0; t < n; ++t) common[f * n + t] = num_common(from[f], to[t]);
  }
  std::vector<std::size_t> pairs(n * n);
  for (std::size_t p = 0; p < pairs.size(); ++p) pairs[p] = p;
  std::ranges::stable_sort(pairs, std::greater{}, [&](std::size_t p) { return common[p]; });
  std::vector<std::size_t> source(n, n);
  std::vector<char> is_taken(n);
  for (const std::size_t p : pairs) {
    if (is_taken[p / n] || source[p % n] != n) continue;
    is_taken[p / n] = 1;
    source[p % n] = p / n;
  }
  return source;
}

/// The union of `count` sets from `first` on, in ascending order.
std::vector<int> join(const Sets& sets, std::size_t first, std::size_t count) {
  std::vector<int> all;
  for (std::size_t i = first; i < first + count; ++i) {
    all.insert(all.end(), sets[i].begin(), sets[i].end());
  }
  std::ranges::sort(all);
  return all;
}

Sets ranks_of(std::span<const int> slots, std::size_t num_ranks) {
  Sets sets(num_ranks);
  for (std::size_t s = 0; s < slots.size(); ++s) {
    if (slots[s] >= 0) sets[s / (slots.size() / num_ranks)].push_back(slots[s]);
  }
  for (std::vector<int>& set : sets) std::ranges::sort(set);
  return sets;
}

}  // namespace

void keep_ranks(std::vector<std::vector<int>>& experts, std::span<const int> previous,
                int num_hosts) {
  const Sets old = ranks_of(previous, experts.size());
  const auto hosts = static_cast<std::size_t>(num_hosts);
  const std::size_t per_host = experts.size() / hosts;
  Sets new_hosts, old_hosts;
  for (std::size_t h = 0; h < hosts; ++h) {
    new_hosts.push_back(join(experts, h * per_host, per_host));
    old_hosts.push_back(join(old, h * per_host, per_host));
  }
  const std::vector<std::size_t> host_source = match(new_hosts, old_hosts);
  Sets kept;
  for (std::size_t h = 0; h < hosts; ++h) {
    const auto part = [&](const Sets& sets, std::size_t host) {
      const auto begin = sets.begin() + static_cast<std::ptrdiff_t>(host * per_host);
      return Sets(begin, begin + static_cast<std::ptrdiff_t>(per_host));
    };
    Sets mine = part(experts, host_source[h]);
    for (const std::size_t source : match(mine, part(old, h))) {
      kept.push_back(std::move(mine[source]));
    }
  }
  experts = std::move(kept);
}

std::vector<int> fill_slots(const std::vector<std::vector<int>>& experts, int num_slots,
                            std::span<const int> previous) {
  std::vector<int> slots(static_cast<std::size_t>(num_slots), -1);
  const std::size_t per_rank = slots.size() / experts.size();
  for (std::size_t r = 0; r < experts.size(); ++r) {
    const std::span<int> mine = std::span(slots).subspan(r * per_rank, per_rank);
    std::vector<int> arriving = experts[r];
    for (std::size_t s = 0; !previous.empty() && s < per_rank; ++s) {
      const auto stays = std::ranges::find(arriving, previous[r * per_rank + s]);
      if (stays == arriving.end()) continue;
      mine[s] = *stays;
      arriving.erase(stays);
    }
    std::size_t s = 0;
    for (const int e : arriving) {
      while (mine[s] >= 0) ++s;
      mine[s] = e;
    }
  }
  return slots;
}

}  // namespace sluice
