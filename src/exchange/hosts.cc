#include "sluice/hosts.h"

#include <algorithm>
#include <utility>

#include "core/fail.h"

namespace sluice {

Hosts Hosts::even(int num_hosts, int num_ranks) {
  check_argument(num_hosts >= 1 && num_ranks >= 1 && num_ranks % num_hosts == 0,
                 "hosts: {} hosts do not divide {} ranks", num_hosts, num_ranks);
  std::vector<int> host_of_rank;
  for (int r = 0; r < num_ranks; ++r) host_of_rank.push_back(r / (num_ranks / num_hosts));
  return create(std::move(host_of_rank));
}

Hosts Hosts::create(std::vector<int> host_of_rank) {
  check_argument(!host_of_rank.empty(), "hosts: there are no ranks");
  const auto num_ranks = static_cast<int>(host_of_rank.size());
  std::vector<std::vector<int>> ranks(1);
  for (int r = 0; r < num_ranks; ++r) {
    const int host = host_of_rank[static_cast<std::size_t>(r)];
    check_argument(host >= 0 && host < num_ranks, "hosts: rank {} is on host {}, not in [0, {})", r,
                   host, num_ranks);
    ranks.resize(std::max(ranks.size(), static_cast<std::size_t>(host) + 1));
    ranks[static_cast<std::size_t>(host)].push_back(r);
  }
  Hosts h;
  h.local_of_.resize(host_of_rank.size());
  h.begin_.push_back(0);
  for (std::size_t host = 0; host < ranks.size(); ++host) {
    check_argument(!ranks[host].empty(), "hosts: host {} of {} has no rank", host, ranks.size());
    int local = 0;
    for (const int r : ranks[host]) {
      h.local_of_[static_cast<std::size_t>(r)] = local++;
      h.ranks_.push_back(r);
    }
    h.begin_.push_back(static_cast<int>(h.ranks_.size()));
  }
  h.host_of_ = std::move(host_of_rank);
  return h;
}

std::vector<int> Hosts::sources_of(int relay_rank) const {
  std::vector<int> sources;
  for (int s = 0; s < num_ranks(); ++s) {
    if (relay(s, host_of(relay_rank)) == relay_rank) sources.push_back(s);
  }
  return sources;
}

bool Hosts::is_even() const noexcept {
  for (std::size_t h = 1; h + 1 < begin_.size(); ++h) {
    if (begin_[h + 1] - begin_[h] != begin_[1]) return false;
  }
  return true;
}

bool Hosts::is_in_order() const noexcept {
  return is_even() && std::ranges::is_sorted(host_of_);
}

std::string Hosts::to_string() const {
  if (num_hosts() == 1) return "one host";
  if (is_in_order()) {
    const std::size_t each = ranks_of(0).size();
    return fmt::format("{} hosts of {} rank{}", num_hosts(), each, each == 1 ? "" : "s");
  }
  std::string text = "ranks";
  for (int h = 0; h < num_hosts(); ++h) {
    if (h > 0) text += " |";
    for (const int r : ranks_of(h)) text += fmt::format(" {}", r);
  }
  return text;
}

}  // namespace sluice
