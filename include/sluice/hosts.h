// hosts.h - which rank is on which host.
//
//   host 0             host 1
//   ranks 0  1  2  3   ranks 4  5  6  7      Hosts::even(2, 8)
//            |                  |
//            +----- network ----+            rank 1 sends to rank 5 there, and to no other
//
// With more than one host an exchange works in two levels. A token crosses the network once for
// each host that needs it, to one rank there, its *relay*, which spreads it inside the host. On the
// way back the relay adds what its host's experts made of the token, and sends one row home
// (docs/exchange.md#several-hosts). A host may be virtual: a name for a part of the ranks that are
// really on one machine.
//
// A plain value, the same on every rank.
#pragma once

#include <span>
#include <string>
#include <vector>

namespace sluice {

class Hosts {
 public:
  /// All ranks on one host, however many there are: an exchange of one level.
  Hosts() = default;

  /// Host h has ranks [h * R / H, (h + 1) * R / H) of R ranks on H hosts.
  /// Throws: kInvalidArgument naming both numbers unless num_hosts >= 1 divides num_ranks.
  [[nodiscard]] static Hosts even(int num_hosts, int num_ranks);

  /// host_of_rank: [num_ranks] each rank's host, in [0, H); every host has a rank.
  /// Throws: kInvalidArgument naming the rank or the host.
  [[nodiscard]] static Hosts create(std::vector<int> host_of_rank);

  [[nodiscard]] int num_hosts() const noexcept {
    return begin_.empty() ? 1 : static_cast<int>(begin_.size()) - 1;
  }
  /// 0: as many as there are, on one host.
  [[nodiscard]] int num_ranks() const noexcept { return static_cast<int>(host_of_.size()); }
  [[nodiscard]] int host_of(int rank) const {
    return host_of_.empty() ? 0 : host_of_[static_cast<std::size_t>(rank)];
  }
  /// Index of a rank among those of its host.   Requires: num_ranks() > 0, here and below.
  [[nodiscard]] int local_of(int rank) const { return local_of_[static_cast<std::size_t>(rank)]; }
  /// Ascending; at least one.
  [[nodiscard]] std::span<const int> ranks_of(int host) const {
    const auto h = static_cast<std::size_t>(host);
    const auto first = static_cast<std::size_t>(begin_[h]);
    return std::span(ranks_).subspan(first, static_cast<std::size_t>(begin_[h + 1]) - first);
  }

  /// The rank of `host` that speaks with rank `source`: the one of the same local index, counted
  /// around where the host has fewer ranks. On a rank's own host it is the rank itself. With as
  /// many ranks on each host, the ranks of one local index speak with each other and with no rank
  /// of another host else: they form a rail.
  [[nodiscard]] int relay(int source, int host) const {
    const std::span<const int> there = ranks_of(host);
    return there[static_cast<std::size_t>(local_of(source)) % there.size()];
  }
  /// Ranks s with relay(s, host_of(relay)) == relay, ascending; itself is one of them.
  [[nodiscard]] std::vector<int> sources_of(int relay) const;

  /// As many ranks on each host.
  [[nodiscard]] bool is_even() const noexcept;
  /// And each host's ranks follow each other, host 0's first: even().
  [[nodiscard]] bool is_in_order() const noexcept;

  /// "one host", "2 hosts of 4 ranks", or, where they are not even(), "ranks 0 2 | 1 3 4".
  [[nodiscard]] std::string to_string() const;

  [[nodiscard]] friend bool operator==(const Hosts& a, const Hosts& b) noexcept {
    return a.host_of_ == b.host_of_;
  }

 private:
  std::vector<int> host_of_, local_of_;  // [num_ranks]
  std::vector<int> begin_, ranks_;       // Ranks by host, one host after the other.
};

}  // namespace sluice
