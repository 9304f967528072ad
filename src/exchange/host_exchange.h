// host_exchange.h - the exchange for host memory, on one host: what its two modes share.
//
// Tokens are brought to the wire format once each, in `staged_`; the mode decides where they land.
// On the way home both modes are alike: each row goes to home[token][slot] of its source, which
// sums.
#pragma once

#include <memory>
#include <vector>

#include "backend/ops.h"
#include "exchange/host_protocol.h"
#include "exchange/host_rows.h"
#include "exchange/impl.h"
#include "exchange/staged_tokens.h"
#include "exchange/sum_parts.h"

namespace sluice {

class HostExchange : public Exchange::Impl {
 public:
  HostExchange(const ExchangeConfig& config, Transport& transport, Backend& backend);
  ~HostExchange() override;

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
  struct HostRoute final : Dispatched::Route {
    HostRoute(HostExchange& e, HostProtocol::Use u) : exchange(e), use(u) {}
    ~HostRoute() override;
    HostExchange& exchange;
    HostProtocol::Use use;
    Routing routing;
    std::vector<std::int32_t> slots;  // [num_tokens, num_topk], -1: none
    HostRows rows;
  };

  /// Sends this rank's tokens and raises kDispatched at every rank.
  virtual void send_rows(HostRoute& route, std::int64_t num_tokens) = 0;
  /// Every rank has raised kDispatched: fills `route` with what arrived.
  virtual void receive_rows(HostRoute& route) = 0;

  void count_sent(int peer, std::size_t bytes, std::uint64_t rows);

  HostLayout layout_;
  BackendOps& backend_;
  HostProtocol protocol_;
  StagedTokens staged_;
  ExchangeCounters counters_;
  std::vector<std::unique_ptr<DeviceBuffer>> expanded_;  // Normal mode: [num_slots] rows by expert.

 private:
  void send_home(const HostRoute& route, TensorView expert_y);
  void sum_home(const HostRoute& route, MutableTensorView y);
  void sum_home_by_parts(const HostRoute& route, MutableTensorView y);

  SumParts parts_;
};

[[nodiscard]] std::unique_ptr<HostExchange> make_host_low_latency(const ExchangeConfig& config,
                                                                  Transport& transport,
                                                                  Backend& backend);
[[nodiscard]] std::unique_ptr<HostExchange> make_host_normal(const ExchangeConfig& config,
                                                             Transport& transport,
                                                             Backend& backend);

}  // namespace sluice
