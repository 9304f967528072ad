// host_exchange.h - the exchange for host memory: what its two modes share.
//
// Tokens are brought to the wire format once each, in `staging`; the mode decides where they land.
// On the way home both modes are alike: each row goes to home[token][slot] of its source, which
// sums.
#pragma once

#include <memory>
#include <vector>

#include "backend/ops.h"
#include "exchange/host_protocol.h"
#include "exchange/impl.h"

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

 protected:
  /// Where a received row came from.
  struct Origin {
    std::int32_t source;      ///< Rank.
    std::int32_t token_slot;  ///< token * num_topk + slot at the source.
  };

  struct HostRoute final : Dispatched::Route {
    HostRoute(HostExchange& e, HostProtocol::Use u) : exchange(e), use(u) {}
    ~HostRoute() override;
    HostExchange& exchange;
    HostProtocol::Use use;
    Routing routing;
    std::vector<std::int32_t> num_rows;   // [num_local_experts]
    std::vector<std::int64_t> row_begin;  // [num_local_experts]
    std::vector<Origin> origin;           // [rows, expert after expert]
  };

  /// Sends this rank's tokens and raises kDispatched at every rank.
  virtual void send_rows(HostRoute& route, std::int64_t num_tokens,
                         const std::vector<std::int32_t>& idx) = 0;
  /// Every rank has raised kDispatched: fills `route` with what arrived.
  virtual void receive_rows(HostRoute& route) = 0;

  [[nodiscard]] std::span<const std::byte> staged_payload(std::int64_t token) const;
  [[nodiscard]] std::span<const std::byte> staged_scales(std::int64_t token) const;
  void count_sent(int peer, std::size_t bytes, std::uint64_t rows);
  void fill_batch(HostRoute& route, std::byte* x, std::byte* scale, Shape shape) const;

  BackendOps& backend_;
  HostProtocol protocol_;
  ExchangeCounters counters_;
  std::vector<std::unique_ptr<DeviceBuffer>> expanded_;  // Normal mode: [num_slots] rows by expert.

 private:
  [[nodiscard]] std::vector<std::int32_t> checked_indices(const TensorView& topk_idx) const;
  void replace_by_slots(const ExpertSlots& slots, std::vector<std::int32_t>& idx) const;
  void stage(TensorView x, float static_scale, Stream stream);
  void send_home(const HostRoute& route, TensorView expert_y);
  void sum_home(const HostRoute& route, MutableTensorView y);

  std::unique_ptr<DeviceBuffer> staging_;  // payload [T], then scales [T]
};

[[nodiscard]] std::unique_ptr<HostExchange> make_host_low_latency(const ExchangeConfig& config,
                                                                  Transport& transport,
                                                                  Backend& backend);
[[nodiscard]] std::unique_ptr<HostExchange> make_host_normal(const ExchangeConfig& config,
                                                             Transport& transport,
                                                             Backend& backend);

}  // namespace sluice
