// traffic.h - bytes of dispatch and combine: the exchange's formulas (docs/exchange.md).
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "sluice/lab/network_model.h"
#include "sluice/network_bytes.h"

namespace sluice {

inline double sum_of(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

inline double align16(double bytes) {
  return std::ceil(bytes / 16) * 16;
}

/// What one rank moves in one direction: the mean over the ranks, and what the busiest waits for.
struct Moved {
  double mean = 0, most = 0;
};

/// Before the rows of a home piece: kNetworkHomeHeaderBytes. No other host is left out of a piece.
inline constexpr double kHomeHeader = static_cast<double>(kNetworkHomeHeaderBytes);

/// Everything that the formulas share.
class TrafficModel {
 public:
  TrafficModel(const MachineModel& machine, const ClusterLayer& layer, const TokenSpread& spread)
      : machine_(machine),
        layer_(layer),
        spread_(spread),
        hosts_(layer.num_hosts),
        ranks_(layer.num_ranks),
        ranks_per_host_(layer.num_ranks / layer.num_hosts),
        tokens_(layer.tokens_per_rank),
        topk_(layer.geometry.num_topk),
        token_(static_cast<double>(wire_bytes_per_token(layer.recipe.wire, layer.geometry.hidden))),
        row_(2.0 * layer.geometry.hidden),
        has_parts_(layer.sum_parts != 1) {}

  [[nodiscard]] bool is_normal() const {
    return machine_.rules == ExchangeRules::kDeepEpNormal ||
           (machine_.rules == ExchangeRules::kSluice && layer_.mode == Mode::kNormal);
  }

  /// Over the network, out of a rank or into it.
  [[nodiscard]] Moved network_dispatch() const {
    if (hosts_ == 1) return {};
    if (machine_.rules == ExchangeRules::kDeepEpLowLatency)
      return by_host(rows_of_hosts(), token_ + 16);
    if (machine_.rules == ExchangeRules::kDeepEpNormal) return by_host(spread_.hosts, token_);
    const double record = align16(token_ + 4 + 4 * topk_ + (has_parts_ ? 4 * topk_ : 0.0));
    const double header =
        align16(8 + (is_normal() ? 0.0 : 4.0 * static_cast<double>(spread_.slots.size())));
    const double headers = (hosts_ - 1) * header;
    if (!is_normal()) {
      const double piece = (hosts_ - 1) * (header + piece_tokens() * record);
      return {piece, piece};
    }
    const Moved records = by_host(spread_.hosts, record);
    return {headers + records.mean, headers + records.most};
  }

  /// Two rows' bytes for a sum in float32, one row's for the only entry of a token on a host.
  [[nodiscard]] Moved network_combine() const {
    if (hosts_ == 1) return {};
    if (machine_.rules == ExchangeRules::kDeepEpLowLatency) return by_host(rows_of_hosts(), row_);
    if (machine_.rules == ExchangeRules::kDeepEpNormal) return by_host(spread_.hosts, row_);
    if (!is_normal()) {
      const double rows = has_parts_ ? std::min(topk_, 2.0) : topk_;
      const double piece = (hosts_ - 1) * (kHomeHeader + piece_tokens() * rows * row_);
      return {piece, piece};
    }
    std::vector<double> rows;
    for (std::size_t h = 0; has_parts_ && h < spread_.hosts.size(); ++h) {
      rows.push_back(2 * spread_.hosts[h] - spread_.one_entry[h]);
    }
    const Moved home = by_host(has_parts_ ? rows : rows_of_hosts(), row_);
    return {home.mean + (hosts_ - 1) * kHomeHeader, home.most + (hosts_ - 1) * kHomeHeader};
  }

  /// Over the link between the devices of a host.
  [[nodiscard]] Moved link_dispatch() const {
    if (machine_.rules == ExchangeRules::kDeepEpLowLatency)
      return within_host(rows_of_ranks(), token_ + 16);
    if (machine_.rules == ExchangeRules::kDeepEpNormal) return inside(spread_.ranks, token_);
    const double counts =
        8.0 * layer_.geometry.num_experts * (ranks_per_host_ - machine_.ranks_per_device);
    Moved moved = is_normal() ? inside(spread_.ranks, token_) : inside(rows_of_ranks(), token_ + 8);
    if (is_normal()) {
      const Moved lists = inside(rows_of_ranks(), 16);
      moved.mean += lists.mean, moved.most += lists.most;
    }
    return {moved.mean + counts, moved.most + counts};
  }

  [[nodiscard]] Moved link_combine() const {
    if (machine_.rules == ExchangeRules::kDeepEpLowLatency)
      return within_host(rows_of_ranks(), row_);
    if (machine_.rules == ExchangeRules::kDeepEpNormal) return inside(spread_.ranks, row_);
    return inside(rows_of_ranks(), row_);
  }

  /// The sender's tokens read and its own rows put into place, of all ranks of a device.
  [[nodiscard]] double place_bytes() const {
    const double one_rank = 1.0 / ranks_per_host_;
    const double rows = is_normal()
                            ? tokens_ * topk_ * one_rank + copies_from(own_share() - one_rank)
                            : tokens_ * topk_ * own_share();
    return machine_.ranks_per_device * (tokens_ * row_ + rows * token_);
  }

  /// Normal mode: what a receiver copies from a token's first row to its others.
  [[nodiscard]] double copy_bytes() const {
    const double others = 1 - 1.0 / ranks_per_host_;
    const double arrived = copies_from(others);
    const double more = std::max(0.0, tokens_ * topk_ * others - arrived);
    return machine_.ranks_per_device * token_ * (more + std::min(more, arrived));
  }

  /// Rows that combine reads from its own device's memory, its outputs, and sums of other hosts.
  [[nodiscard]] double sum_bytes(double share_of_rows) const {
    const double away = hosts_ > 1 ? tokens_ * sum_of(spread_.hosts) * (hosts_ - 1) / hosts_ : 0.0;
    return machine_.ranks_per_device * row_ *
           (tokens_ * topk_ * share_of_rows + tokens_ + 2 * away);
  }

  /// Of a rank's rows, those that come from ranks of its own device.
  [[nodiscard]] double own_share() const {
    return static_cast<double>(machine_.ranks_per_device) / ranks_per_host_;
  }

 private:
  [[nodiscard]] double piece_tokens() const {
    return layer_.piece_tokens > 0 ? layer_.piece_tokens : tokens_;
  }

  /// Token copies that a rank receives from the given share of the ranks of its host, which relay
  /// those of other hosts.
  [[nodiscard]] double copies_from(double share) const {
    return tokens_ * sum_of(spread_.ranks) * share;
  }
  [[nodiscard]] std::vector<double> rows_of(int num_places) const {
    std::vector<double> rows;
    const std::size_t size = spread_.slots.size() / static_cast<std::size_t>(num_places);
    for (std::size_t p = 0; p < static_cast<std::size_t>(num_places); ++p) {
      rows.push_back(sum_of(std::span(spread_.slots).subspan(p * size, size)));
    }
    return rows;
  }
  [[nodiscard]] std::vector<double> rows_of_hosts() const { return rows_of(hosts_); }
  [[nodiscard]] std::vector<double> rows_of_ranks() const { return rows_of(ranks_); }

  /// `each`: what a token sends to a host, in units of `bytes`. A host's ranks share what leaves it
  /// and what comes to it.
  [[nodiscard]] Moved by_host(std::span<const double> each, double bytes) const {
    const double all = sum_of(each);
    Moved moved{.mean = tokens_ * all * (hosts_ - 1) / hosts_ * bytes};
    for (const double one : each) {
      moved.most = std::max(
          {moved.most, tokens_ * (all - one) * bytes, tokens_ * (hosts_ - 1) * one * bytes});
    }
    return moved;
  }

  /// `each`: what all tokens together bring to a rank, through the ranks of its host alike.
  [[nodiscard]] Moved inside(std::span<const double> each, double bytes) const {
    const double share = (1 - own_share()) * tokens_ * bytes;
    return {sum_of(each) * share, std::max(1.0, largest_over_mean(each)) * sum_of(each) * share};
  }

  /// The same for rows that cross the link only if their token is of the same host.
  [[nodiscard]] Moved within_host(std::span<const double> each, double bytes) const {
    const Moved all = inside(each, bytes);
    return {all.mean / hosts_, all.most / hosts_};
  }

  [[nodiscard]] static double largest_over_mean(std::span<const double> values) {
    const double sum = sum_of(values);
    return sum > 0 ? *std::ranges::max_element(values) * static_cast<double>(values.size()) / sum
                   : 0.0;
  }

  const MachineModel& machine_;
  const ClusterLayer& layer_;
  const TokenSpread& spread_;
  int hosts_, ranks_, ranks_per_host_;
  double tokens_, topk_, token_, row_;
  bool has_parts_;
};

}  // namespace sluice
