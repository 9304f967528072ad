// two_level_exchange.h - the exchange for host memory over several hosts.
//
//   source rank ==network==> relay --host--> ranks with the experts        dispatch
//   source rank <==network== relay <--host-- ranks with the experts        combine
//                one row,      adds its host's rows
//                or two        in a fixed order
//
// A rank is its own relay on its own host, so that its own tokens take the same way, without the
// network. Steps and flags are in slot_rules.h, bytes in network_record.h and two_level_layout.h,
// the order of the sum in sum_parts.h; docs/exchange.md#several-hosts tells why.
#pragma once

#include <memory>
#include <vector>

#include "exchange/host_exchange.h"
#include "exchange/two_level_layout.h"

namespace sluice {

class TwoLevelExchange final : public HostExchange {
 public:
  TwoLevelExchange(const ExchangeConfig& config, Transport& transport, Backend& backend);

 private:
  void send_tokens(HostRoute& route, std::int64_t num_tokens) override;
  void relay_tokens(HostRoute& route) override;
  void send_rows_home(const HostRoute& route, TensorView expert_y) override;
  void relay_rows_home(const HostRoute& route) override;
  void sum_rows(const HostRoute& route, MutableTensorView y) override;

  [[nodiscard]] PieceView piece(const HostRoute& route, std::size_t relayed_index);
  void relay_alone(const HostRoute& route, std::size_t relayed_index);
  void relay_sums(const HostRoute& route, std::size_t relayed_index);
  void sum_hosts(const HostRoute& route, MutableTensorView y);
  void add_own_host(const HostRoute& route, std::int64_t token);
  void add_other_host(const HostRoute& route, std::int64_t token, int host);
  /// Within this host.
  [[nodiscard]] int part_here(int slot) const {
    return parts_.part_of(slot) - host_ * parts_.parts_per_host();
  }
  /// This rank's relayed index at its relay on `host`.
  [[nodiscard]] int own_index(int host) const { return own_index_[static_cast<std::size_t>(host)]; }

  TwoLevelLayout relay_layout_;
  int host_;
  std::vector<int> host_of_slot_;  // [total_slots]
  std::vector<int> relayed_;       // [relayed index] rank: whose relay this one is, with itself
  std::vector<int> index_here_;    // [num_ranks] relayed index at the relay on this host
  std::vector<int> own_index_;     // [num_hosts]
  std::vector<std::byte> record_;  // One, on its way.
  PartSum host_sum_, hosts_sum_;   // Of the parts of this host; of the hosts.
};

}  // namespace sluice
