// impl.h - what an Exchange is made of: one implementation per memory kind.
//
// exchange.cc checks arguments, makes the ranks agree and picks the implementation; everything
// below may assume valid input.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "backend/rows.h"
#include "exchange/slot_ranks.h"
#include "sluice/exchange.h"

namespace sluice {

/// The way home for the rows of one dispatch. Its destructor returns the buffers to the exchange.
struct Dispatched::Route {
  virtual ~Route() = default;
  ExpertBatch batch;
  MutableTensorView expert_y;
  HomeRows home;  ///< For BackendOps::expert_stage_home(); no origin: there are none.
  // Set by Exchange:
  enum class Stage : std::uint8_t { kSent, kReceived, kReturning };
  Stage stage = Stage::kSent;
  std::int64_t num_tokens = 0;
  const void* owner = nullptr;  ///< The Exchange::Impl that made it.
  // Set by Layer::dispatch_send():
  std::uint64_t layer = 0;                   ///< Layer::Impl::id of the one that made it.
  std::shared_ptr<const void> is_in_flight;  ///< Of Layer::Impl, which counts its calls by them.
  std::shared_ptr<const void> keeps;  ///< What holds the exchange; goes after ~Route of the rest.
  Mode mode = Mode::kLowLatency;
  bool at_home = false;  ///< The rows went home already: combine() has none to bring, on any rank.
};

struct Exchange::Impl {
  virtual ~Impl() = default;
  /// `static_scale`: for WireFormat::kE4m3Static, else 0.
  [[nodiscard]] virtual std::unique_ptr<Dispatched::Route> dispatch_send(TensorView x,
                                                                         const Routing& routing,
                                                                         float static_scale,
                                                                         Stream stream) = 0;
  virtual void dispatch_receive(Dispatched::Route& route, Stream stream) = 0;
  virtual void combine_send(Dispatched::Route& route, TensorView expert_y, Stream stream) = 0;
  virtual void combine_receive(Dispatched::Route& route, MutableTensorView y, Stream stream) = 0;

  // Both halves at once, where that is cheaper than one after the other.
  [[nodiscard]] virtual std::unique_ptr<Dispatched::Route> dispatch(TensorView x,
                                                                    const Routing& routing,
                                                                    float static_scale,
                                                                    Stream stream) {
    auto route = dispatch_send(x, routing, static_scale, stream);
    dispatch_receive(*route, stream);
    return route;
  }
  virtual void combine(Dispatched::Route& route, TensorView expert_y, MutableTensorView y,
                       Stream stream) {
    combine_send(route, expert_y, stream);
    combine_receive(route, y, stream);
  }
  virtual void check() {}
  /// The layer of a dispatch that rank `source` has begun here and this rank has not; none: there
  /// is no such dispatch. After a wait for `source` elsewhere it says what that rank does instead.
  [[nodiscard]] virtual std::optional<int> layer_ahead(int source) const = 0;
  [[nodiscard]] virtual ExchangeCounters counters() const = 0;

  ExchangeConfig config;  ///< Checked; max_m resolved.
  int rank = 0;
  int num_ranks = 0;
  Device device;
  ExpertPlacement placement;   ///< Set by the implementation.
  std::int64_t max_rows = 0;   ///< Rows of batch().x; set by the implementation.
  std::size_t held_bytes = 0;  ///< Of its buffers and window; set by the implementation.
  /// Names the layer of a Routing::layer, for messages; empty: numbers are used.
  std::function<std::string(int)> layer_name;
  [[nodiscard]] std::string name_of_layer(int layer) const;
};

/// "rank(s) 1 dispatch for B, rank 0 for A: ranks must make the same calls in the same order".
/// Each list of ranks has a layer in common; all are named already.
[[nodiscard]] std::string different_calls(
    const std::vector<std::pair<std::string, std::string>>& ranks_and_layers,
    const std::string& own_rank, const std::string& own_layer);

/// All zero, for as many ranks.
[[nodiscard]] ExchangeCounters counters_for(int num_ranks);

// One implementation per kind of memory, and what it takes. Configurations are checked.
[[nodiscard]] std::size_t host_workspace_bytes(const ExchangeConfig& config, int num_ranks);
[[nodiscard]] std::size_t device_workspace_bytes(const ExchangeConfig& config, int num_ranks);
[[nodiscard]] std::unique_ptr<Exchange::Impl> make_host_exchange(const ExchangeConfig& config,
                                                                 Transport& transport,
                                                                 Backend& backend);
/// Defined where the CUDA backend is built.
[[nodiscard]] std::unique_ptr<Exchange::Impl> make_cuda_exchange(const ExchangeConfig& config,
                                                                 Transport& transport,
                                                                 Backend& backend);

}  // namespace sluice
