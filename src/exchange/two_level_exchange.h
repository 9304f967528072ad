// two_level_exchange.h - the exchange for host memory over several hosts: what its modes share.
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

#include "backend/ops.h"
#include "exchange/host_protocol.h"
#include "exchange/host_rows.h"
#include "exchange/impl.h"
#include "exchange/staged_tokens.h"
#include "exchange/sum_parts.h"
#include "exchange/two_level_layout.h"

namespace sluice {

class TwoLevelExchange : public Exchange::Impl {
 public:
  TwoLevelExchange(const ExchangeConfig& config, Transport& transport, Backend& backend);
  ~TwoLevelExchange() override;

  [[nodiscard]] std::unique_ptr<Dispatched::Route> dispatch_send(TensorView x,
                                                                 const Routing& routing,
                                                                 float static_scale,
                                                                 Stream stream) override;
  void dispatch_receive(Dispatched::Route& route, Stream stream) override;
  void combine_send(Dispatched::Route& route, TensorView expert_y, Stream stream) override;
  void combine_receive(Dispatched::Route& route, MutableTensorView y, Stream stream) override;
  [[nodiscard]] ExchangeCounters counters() const override { return counters_; }
  [[nodiscard]] std::optional<int> layer_ahead(int source) const override {
    return protocol_.layer_ahead(source);
  }

 protected:
  struct TwoLevelRoute final : Dispatched::Route {
    TwoLevelRoute(TwoLevelExchange& e, HostProtocol::Use u) : exchange(e), use(u) {}
    ~TwoLevelRoute() override;
    TwoLevelExchange& exchange;
    HostProtocol::Use use;
    Routing routing;
    std::vector<std::int32_t> slots;  // [num_tokens, num_topk], -1: none
    HostRows rows;
  };

  /// The pieces of all relayed ranks are here: spreads them over this host, up to kDispatched.
  virtual void spread(TwoLevelRoute& route) = 0;
  /// Every rank of this host has raised kDispatched: fills `route` with what arrived.
  virtual void receive_rows(TwoLevelRoute& route) = 0;

  /// Ranks whose relay this one is, itself included: relayed index -> rank.
  [[nodiscard]] const std::vector<int>& relayed() const noexcept { return relayed_; }
  [[nodiscard]] PieceView piece(const TwoLevelRoute& route, std::size_t relayed_index);
  template <class T>
  [[nodiscard]] const T* received(const TwoLevelRoute& route, std::size_t offset) {
    return reinterpret_cast<const T*>(protocol_.local(route.use) + offset);
  }
  /// Puts, and counts as dispatched.
  void send(const TwoLevelRoute& route, int peer, std::size_t offset,
            std::span<const std::byte> data);
  void count_rows_sent(int peer, std::uint64_t rows) {
    counters_.dispatch_rows[static_cast<std::size_t>(peer)] += rows;
  }

  TwoLevelLayout layout_;
  BackendOps& backend_;
  HostProtocol protocol_;
  std::vector<std::unique_ptr<DeviceBuffer>> expanded_;  // Normal mode: [num_slots] rows by expert.

 private:
  void send_pieces(const TwoLevelRoute& route);
  void send_back(const TwoLevelRoute& route, int peer, std::size_t offset,
                 std::span<const std::byte> data);
  void send_home(const TwoLevelRoute& route);
  void send_home_alone(const TwoLevelRoute& route, std::size_t relayed_index);
  void send_home_sums(const TwoLevelRoute& route, std::size_t relayed_index);
  void sum_entries(const TwoLevelRoute& route, MutableTensorView y);
  void sum_hosts(const TwoLevelRoute& route, MutableTensorView y);
  void add_own_host(const TwoLevelRoute& route, std::int64_t token);
  void add_other_host(const TwoLevelRoute& route, std::int64_t token, int host);
  /// Within this host.
  [[nodiscard]] int part_here(int slot) const {
    return parts_.part_of(slot) - host_ * parts_.parts_per_host();
  }

  int host_;
  StagedTokens staged_;
  SumParts parts_;
  std::vector<int> host_of_slot_;  // [total_slots]
  std::vector<int> relayed_;       // [relayed index]
  std::vector<int> index_here_;    // [num_ranks] relayed index at the relay on this host
  std::vector<int> own_index_;     // [num_hosts] of this rank at its relay there
  std::vector<std::byte> record_;  // One, on its way.
  PartSum host_sum_, hosts_sum_;   // Of the parts of this host; of the hosts.
  ExchangeCounters counters_;
};

[[nodiscard]] std::unique_ptr<Exchange::Impl> make_two_level_exchange(const ExchangeConfig& config,
                                                                      Transport& transport,
                                                                      Backend& backend);
[[nodiscard]] std::unique_ptr<TwoLevelExchange> make_two_level_low_latency(
    const ExchangeConfig& config, Transport& transport, Backend& backend);
[[nodiscard]] std::unique_ptr<TwoLevelExchange> make_two_level_normal(const ExchangeConfig& config,
                                                                      Transport& transport,
                                                                      Backend& backend);

}  // namespace sluice
