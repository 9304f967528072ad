// rail_exchange.h - the exchange for CUDA memory over several hosts: slots, epochs and pieces on
// the host side of the kernels.
//
//   dispatch_send     route, pack, pieces over the rail
//   dispatch_receive  place, spread                     inside the host
//   combine_send      give
//   combine_receive   relay, home rows over the rail, sum
//
// Low-latency mode sends pieces of fixed size: the host waits for nothing, and all of it may be
// captured. Normal mode exchanges headers first and waits for them, then sends what there is.
// docs/exchange.md#several-hosts has the protocol, rail_params.h the words.
#pragma once

#include <memory>
#include <vector>

#include "backend/ops.h"
#include "exchange/cuda/rail_device.h"
#include "exchange/cuda/rail_faults.h"
#include "exchange/cuda/rail_layout.h"
#include "exchange/impl.h"
#include "exchange/sum_parts.h"
#include "transport/rails.h"

namespace sluice {

class RailExchange final : public Exchange::Impl {
 public:
  /// Ranks: collective.   Throws: as Exchange::create().
  RailExchange(const ExchangeConfig& config, RailTransport& transport, Backend& backend,
               std::unique_ptr<RailDevice> device);

  [[nodiscard]] std::unique_ptr<Dispatched::Route> dispatch_send(TensorView x,
                                                                 const Routing& routing,
                                                                 float static_scale,
                                                                 Stream stream) override;
  void dispatch_receive(Dispatched::Route& route, Stream stream) override;
  void combine_send(Dispatched::Route& route, TensorView expert_y, Stream stream) override;
  void combine_receive(Dispatched::Route& route, MutableTensorView y, Stream stream) override;
  void combine(Dispatched::Route& route, TensorView expert_y, MutableTensorView y,
               Stream stream) override;
  void check() override;
  [[nodiscard]] ExchangeCounters counters() const override;
  /// Nobody looks: over hosts a rank that is missing is named by the rail.
  [[nodiscard]] std::optional<int> layer_ahead(int) const override { return {}; }

 private:
  /// One of the dispatches that may be in flight.
  struct Slot {
    cuda::RailSlot params{};
    std::vector<cuda::RailSizes> sizes;  // [num_hosts] of the last dispatch, in normal mode.
    bool busy = false;
    std::unique_ptr<StreamOrder> order;  // One dispatch after the other, whatever their streams.
  };
  struct RailRoute final : Dispatched::Route {
    RailRoute(RailExchange& e, Slot& s, Stream on) : exchange(e), slot(s), stream(on) {
      slot.busy = true;
    }
    ~RailRoute() override { exchange.release(*this); }
    RailExchange& exchange;
    Slot& slot;
    Stream stream;  // Of the route's latest call.
    cuda::RailTokens tokens{};
    cuda::RailSlot params{};  // The slot's, with the dispatch's placement.
    bool received = false, returned = false;
  };
  /// The rail's thread looks at the slots' words from watch() on, until this is gone.
  struct Watches {
    explicit Watches(Rail& r) : rail(r) {}
    ~Watches();
    Rail& rail;
    std::vector<int> numbers;
  };

  void share_window(Transport& mates);
  void upload_tables();
  void make_slots();
  void watch();
  void meet();
  void release(RailRoute& route) noexcept;
  void exchange_pieces(Slot& slot, Stream stream);
  void exchange_records(Slot& slot, Stream stream);
  void exchange_home(const Slot& slot, Stream stream);
  void receive(RailRoute& route, Stream stream);
  void keep_rows(const RailRoute& route, TensorView expert_y, Stream stream);
  void return_rows(RailRoute& route, MutableTensorView y, bool also_send, Stream stream);
  [[nodiscard]] int ctas_for(std::int64_t work) const;

  Backend& backend_;
  std::unique_ptr<RailDevice> rail_device_;
  Rail& rail_;
  RailLayout layout_;
  SumParts parts_;
  int host_, local_;
  // Host-mapped: faults [2], stop, then [num_slots] begun and done, then RailSizes.
  std::shared_ptr<std::byte> mapped_;
  RailFaults faults_;
  Watches watches_;  // Goes after the memory that kernels may still use.
  std::vector<std::shared_ptr<std::byte>> windows_;  // [mates]; mates may hold them longer.
  std::unique_ptr<DeviceBuffer> private_, tables_, state_;
  std::vector<Slot> slots_;
  int max_ctas_ = 1;
  std::uint64_t num_dispatches_ = 0;
  std::vector<std::uint64_t> records_to_, home_to_;  // [num_hosts] normal mode: records, bytes.
};

[[nodiscard]] std::unique_ptr<Exchange::Impl> make_rail_exchange(
    const ExchangeConfig& config, Transport& transport, Backend& backend,
    std::unique_ptr<RailDevice> device);

}  // namespace sluice
