// host_exchange.h - the exchange for host memory: what it is on one host and over several.
//
//   dispatch_send      own tokens to the wire format, once each, and on their way
//   dispatch_receive   the ranks of this host have spread what this one's experts get: take it
//   combine_send       each row to where it is added up
//   combine_receive    add up
//
// A rank spreads tokens over the ranks of its host: low-latency, every row goes to its final place;
// normal, each token goes once to each rank that needs it, which copies it for its experts. On one
// host a rank spreads its own tokens (one_host_exchange.h), over several those of all ranks that it
// relays for (two_level_exchange.h).
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/ops.h"
#include "exchange/host_layout.h"
#include "exchange/host_protocol.h"
#include "exchange/host_rows.h"
#include "exchange/impl.h"
#include "exchange/staged_tokens.h"
#include "exchange/sum_parts.h"
#include "exchange/wire_token.h"

namespace sluice {

class HostExchange : public Exchange::Impl {
 public:
  ~HostExchange() override;

  [[nodiscard]] std::unique_ptr<Dispatched::Route> dispatch_send(TensorView x,
                                                                 const Routing& routing,
                                                                 float static_scale,
                                                                 Stream stream) final;
  void dispatch_receive(Dispatched::Route& route, Stream stream) final;
  void combine_send(Dispatched::Route& route, TensorView expert_y, Stream stream) final;
  void combine_receive(Dispatched::Route& route, MutableTensorView y, Stream stream) final;
  [[nodiscard]] ExchangeCounters counters() const final { return counters_; }
  [[nodiscard]] std::optional<int> layer_ahead(int source) const final {
    return protocol_.layer_ahead(source);
  }

 protected:
  struct HostRoute final : Dispatched::Route {
    HostRoute(HostExchange& e, HostProtocol::Use u) : exchange(e), use(u) {}
    ~HostRoute() override;
    HostExchange& exchange;
    HostProtocol::Use use;
    Routing routing;
    std::vector<std::int32_t> slots;  // [num_tokens, num_topk], -1: none
    HostRows rows;
  };

  /// Tokens of one rank, to spread; slots on other hosts are -1.
  struct SpreadTokens {
    int source = 0;  ///< Rank.
    std::int64_t num_tokens = 0;
    std::function<WireToken(std::int64_t i)> token;
    std::span<const std::byte> counts;  ///< Low-latency: [num_slots] i32, its rows for each slot.
  };

  HostExchange(const ExchangeConfig& config, const ReceiveLayout& layout,
               std::span<const ProtocolStep> steps, ProtocolPeers peers, Transport& transport,
               Backend& backend);

  /// The tokens are staged: sends them to where they are spread.
  virtual void send_tokens(HostRoute& route, std::int64_t num_tokens) = 0;
  /// Spreads what other hosts sent.
  virtual void relay_tokens(HostRoute&) {}
  /// expert_y: the rows of the batch. Raises the flag that says that they are there.
  virtual void send_rows_home(const HostRoute& route, TensorView expert_y) = 0;
  /// Sends the sources what they get of this host.
  virtual void relay_rows_home(const HostRoute&) {}
  /// All that this rank gets for its tokens is there: y.
  virtual void sum_rows(const HostRoute& route, MutableTensorView y) = 0;

  /// One of this rank's own, as staged.
  [[nodiscard]] WireToken own_token(const HostRoute& route, std::int64_t token_idx) const;
  /// Up to kDispatched at every rank of the host.
  void spread(const HostRoute& route, std::span<const SpreadTokens> from);
  /// One row of bf16 for each of this rank's entries, [num_tokens, num_topk] from `offset` on.
  void sum_entries(const HostRoute& route, std::size_t offset, MutableTensorView y);

  /// This rank's own bytes of the route's slot.
  template <class T>
  [[nodiscard]] const T* received(const HostRoute& route, std::size_t offset) {
    return reinterpret_cast<const T*>(protocol_.local(route.use) + offset);
  }
  /// Puts, and counts as dispatched.
  void send(const HostRoute& route, int peer, std::size_t offset, std::span<const std::byte> data);
  /// Puts, and counts as combined.
  void send_back(const HostRoute& route, int peer, std::size_t offset,
                 std::span<const std::byte> data);
  void count_rows_sent(int peer, std::int64_t rows) {
    counters_.dispatch_rows[static_cast<std::size_t>(peer)] += static_cast<std::uint64_t>(rows);
  }

  ReceiveLayout layout_;
  HostProtocol protocol_;
  SumParts parts_;

 private:
  void spread_rows(const HostRoute& route, std::span<const SpreadTokens> from);
  void send_counts(const HostRoute& route, std::span<const SpreadTokens> from);
  void send_row(const HostRoute& route, const WireToken& token, int k, std::int64_t row_of_expert);
  void spread_copies(const HostRoute& route, std::span<const SpreadTokens> from);
  void send_copies(const HostRoute& route, int peer, const SpreadTokens& from);
  void take_rows(HostRoute& route);

  BackendOps& backend_;
  StagedTokens staged_;
  ExchangeCounters counters_;
  std::vector<std::unique_ptr<DeviceBuffer>> expanded_;  // Normal mode: [num_slots] rows by expert.
};

}  // namespace sluice
