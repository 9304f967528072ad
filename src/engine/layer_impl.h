// layer_impl.h - what a LayerGroup and a Layer are made of.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "backend/ops.h"
#include "engine/experts_impl.h"
#include "engine/mover_memory.h"
#include "exchange/slot_ranks.h"
#include "sluice/error.h"
#include "sluice/layer.h"
#include "sluice/loading.h"

namespace sluice {

/// A layer on its way: what ranks agreed on before its experts are prepared.
struct AgreedLayer {
  std::string name;
  int number = 0;                                     ///< Routing::layer, on every rank the same.
  std::array<std::optional<LayerRecipe>, 2> recipes;  ///< By Mode.
  Placement placement;
};

struct LayerGroup::Impl {
  LayerGroupConfig config;
  Transport* transport = nullptr;
  std::uint64_t group_number = 0;  ///< Agreed on: no other group of `transport` has it.
  BackendOps* backend = nullptr;
  ExpertPlacement placement;  ///< Of slots over ranks: experts lie as each layer says.

  /// By what tells them apart. Layers point at the exchanges: a map does not move them.
  std::map<std::pair<Mode, WireFormat>, Exchange> exchanges;
  std::shared_ptr<ExpertScratch> scratch;
  std::unique_ptr<DeviceBuffer>
      expert_y;                          ///< [max_rows, hidden] bf16; where the exchange has none.
  std::unique_ptr<StreamOrder> order;    ///< Of calls: they share scratch, SMs and peers.
  LayerGroupMemory layers;               ///< Of the layers that are alive: the sums over layers.
  std::vector<std::string> layer_names;  ///< Of all layers that ranks agreed on, in order.
  /// Of a Routing::layer.
  [[nodiscard]] std::string name_of_layer(int number) const;
  /// group_number, as ranks compare it before they do something with `layer`.
  [[nodiscard]] std::pair<std::string, std::string> group_of(const std::string& layer) const;
  /// Runs `dispatch`, the part of a call of layer `number` that waits for other ranks' dispatches.
  /// Throws: what it throws; kTransport instead of kPeerTimeout where a rank that is missing in
  /// `exchange` has begun a dispatch in another exchange of the group that this rank has not.
  template <class Dispatch>
  auto dispatch_in(const Exchange& exchange, int number, const Dispatch& dispatch) {
    try {
      return dispatch();
    } catch (const Error& error) {
      explain_timeout(error, exchange, number);
    }
  }
  /// Throws `error`, or what dispatch_in() says.
  [[noreturn]] void explain_timeout(const Error& error, const Exchange& exchange, int number) const;

  /// Tokens of all `hidden` channels, for callers who bring the model's own; null where these are
  /// as many. In padded_x the channels behind the model's are zeros.
  std::unique_ptr<DeviceBuffer> padded_x, padded_y;
  /// x, or padded_x with its rows, if it has the model's own width.   Throws: kInvalidArgument.
  [[nodiscard]] TensorView padded(const TensorView& x, Stream stream) const;
  /// y, or as many rows of padded_y.   Throws: the same.
  [[nodiscard]] MutableTensorView padded(const MutableTensorView& y) const;
  /// The model's channels of padded(y) into y.
  void copy_padded(const MutableTensorView& y, Stream stream) const;

  LoadStats load_stats;                       ///< Of all layers that came from a checkpoint.
  std::unique_ptr<MoverMemory> mover_memory;  ///< During a move, and after one that keeps it.

  /// `wanted`, or what an empty one stands for.   Throws: kInvalidArgument if it does not fit.
  [[nodiscard]] Placement placement_or_default(const Placement& wanted) const;
  /// Collective. `shapes`: this rank's experts, whose data is not looked at.
  /// Throws: as add_layer(), before anything is made.
  [[nodiscard]] AgreedLayer agree(std::string name, const ExpertWeights& shapes,
                                  std::uint64_t identity, const ModeRecipes& recipes,
                                  const Placement& placement);
  /// Collective: runs `body`, and lets the ranks tell each other whether theirs succeeded. Throws:
  /// what `body` throws here; kTransport naming the ranks where it failed.
  void together(const std::string& name, const std::function<void()>& body);
  /// Collective, between calls: connected memory of `bytes` bytes at least, that of the last move
  /// where it was kept.   Throws: kOutOfMemory, kTransport, kPeerTimeout; nothing has moved.
  [[nodiscard]] MoverMemory& memory_for_moves(const std::string& name, std::size_t bytes);
  /// Collective.
  void free_memory_for_moves();
  /// Collective. The layer, with what it is the first to need.
  [[nodiscard]] std::unique_ptr<Layer::Impl> attach(const std::shared_ptr<Impl>& self,
                                                    const AgreedLayer& agreed,
                                                    const ExpertWeights& shapes,
                                                    std::shared_ptr<PreparedExperts> prepared);
  /// Collective. Makes the exchange if this is the first layer that needs it.
  [[nodiscard]] Exchange& exchange_for(const LayerRecipe& recipe);
};

struct Layer::Impl {
  /// Counts the experts, made of `shapes`, with the group.
  Impl(std::shared_ptr<LayerGroup::Impl> group, const AgreedLayer& agreed,
       const ExpertWeights& shapes, std::shared_ptr<PreparedExperts> prepared);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  /// One mode of the layer: its recipe, and the exchange of the group that has its wire format.
  struct ModeOfLayer {
    LayerRecipe recipe;
    Exchange* exchange;
  };
  [[nodiscard]] ModeOfLayer& mode(Mode mode);
  /// Whether GEMM2 writes this call's rows straight to their tokens' ranks.
  [[nodiscard]] bool rows_go_home(const ModeOfLayer& mode, const Dispatched::Route& route) const;
  /// Everything after the dispatch.
  void run(ModeOfLayer& mode, Dispatched dispatched, MutableTensorView y, Stream stream);

  std::shared_ptr<LayerGroup::Impl> group;
  std::uint64_t id;  ///< Of this layer alone in this process; an address may be used again.
  std::string name;
  int number;  ///< Routing::layer
  Experts::Impl experts;
  std::array<std::optional<ModeOfLayer>, 2> modes;  ///< By Mode.

  Placement fixed_placement;                  ///< Without slots: the identity.
  std::optional<ExpertSlots> slots;           ///< Where the group has slots.
  std::vector<std::uint64_t> expert_digests;  ///< [num_experts], where the group has slots.
  std::optional<Error> half_moved;            ///< A rebalance() that failed: no call may follow it.
  RebalanceCounters moves;                    ///< Of every rebalance() to another placement.
  /// Shared with each call between dispatch_send() and finish(), which keep the experts in place.
  std::shared_ptr<const void> in_flight = std::make_shared<char>();
  [[nodiscard]] const Placement& placement() const noexcept {
    return slots ? slots->placement() : fixed_placement;
  }
  /// `routing` with this layer's number and slots.
  /// Throws: kTransport if the experts are half moved.
  [[nodiscard]] Routing placed(const Routing& routing) const;
  /// Collective: moves the experts, and lets calls see it. After an error half-way the layer is
  /// half_moved.
  [[nodiscard]] RebalanceStats move_experts(const Placement& to, Stream stream,
                                            const RebalanceOptions& options);
  /// Collective, once, where the group has slots: lets every rank store weights alike, and tells
  /// every rank every expert's checksum.
  /// Throws: kTransport naming the slots if replicas differ.
  void settle_slots(const ExpertWeights& shapes);

  bool records_stats = false, records_digest = false, counts_rows = false;
  std::unique_ptr<DeviceBuffer> row_totals;  ///< [num_local] int64, once rows have been counted.
  /// `routing`, counted if count_rows(true).
  [[nodiscard]] Routing counted(Routing routing) const;
  ForwardStats stats;
  std::uint64_t digest = 0;

  using Clock = std::chrono::steady_clock;
  Clock::time_point started, mark;  ///< Of the call in progress, and of its stage.
  void record_rows(const ExpertBatch& batch, Stream stream);
  void record_digest(const RowRanges& rows, const Fp8RowsView& in, Stream stream);
  /// Microseconds since `start`, which moves on; 0 unless stats are recorded.
  [[nodiscard]] double stage_us(Clock::time_point& start, Stream stream);
};

/// Routing::layer of the layer that ranks agreed on after `count` others.
[[nodiscard]] int layer_number(std::size_t count);
/// Of one mode: ranks, capacity and wire format decide everything that an exchange is.
[[nodiscard]] ExchangeConfig exchange_config(const LayerGroupConfig& config, Mode mode,
                                             WireFormat wire, Device::Kind device);
/// Throws: kInvalidArgument unless every rank gets as many experts, or slots.
void check_divisible(const ModelGeometry& geometry, int num_slots, int num_ranks);
/// Rows of the scratch: those of the larger mode.   Throws: kInvalidArgument naming the field.
[[nodiscard]] std::int64_t checked_max_rows(const LayerGroupConfig& config, int num_ranks,
                                            Device::Kind device);
/// Bytes of LayerGroup::Impl::padded_x, and of padded_y.
[[nodiscard]] std::size_t padded_bytes(const LayerGroupConfig& config);
/// Bytes of LayerGroup::Impl::expert_y.
[[nodiscard]] std::size_t expert_y_bytes(const LayerGroupConfig& config, std::int64_t max_rows,
                                         Device::Kind device);
/// The recipe of each mode that the group has, by Mode.   Throws: as LayerGroup::add_layer().
[[nodiscard]] std::array<std::optional<LayerRecipe>, 2> resolve_recipes(
    const LayerGroupConfig& config, const ModeRecipes& recipes,
    const std::optional<StaticScales>& scales, const std::string& layer_name);

}  // namespace sluice
