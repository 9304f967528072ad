// layer_impl.h - what a LayerGroup and a Layer are made of.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "backend/ops.h"
#include "engine/experts_impl.h"
#include "exchange/placement.h"
#include "sluice/layer.h"

namespace sluice {

struct LayerGroup::Impl {
  LayerGroupConfig config;
  Transport* transport = nullptr;
  BackendOps* backend = nullptr;
  ExpertPlacement placement;

  /// By what tells them apart. Layers point at the exchanges: a map does not move them.
  std::map<std::pair<Mode, WireFormat>, Exchange> exchanges;
  std::shared_ptr<ExpertScratch> scratch;
  std::unique_ptr<DeviceBuffer>
      expert_y;                        ///< [max_rows, hidden] bf16; where the exchange has none.
  std::unique_ptr<StreamOrder> order;  ///< Of calls: they share scratch, SMs and peers.
  LayerGroupMemory layers;             ///< Of the layers that are alive: the sums over layers.

  /// Collective. Makes the exchange if this is the first layer that needs it.
  [[nodiscard]] Exchange& exchange_for(const LayerRecipe& recipe);
};

struct Layer::Impl {
  /// Repacks the experts and counts them with the group.
  Impl(std::shared_ptr<LayerGroup::Impl> group, std::string name, const ExpertWeights& weights);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  /// One mode of the layer: its recipe, and the exchange of the group that has its wire format.
  struct ModeOfLayer {
    LayerRecipe recipe;
    Exchange* exchange;
  };
  [[nodiscard]] ModeOfLayer& mode(Mode mode);
  /// Everything after the dispatch.
  void run(ModeOfLayer& mode, Dispatched dispatched, MutableTensorView y, Stream stream);

  std::shared_ptr<LayerGroup::Impl> group;
  std::uint64_t id;  ///< Of this layer alone in this process; an address may be used again.
  std::string name;
  Experts::Impl experts;
  std::array<std::optional<ModeOfLayer>, 2> modes;  ///< By Mode.

  bool records_stats = false, records_digest = false;
  ForwardStats stats;
  std::uint64_t digest = 0;

  using Clock = std::chrono::steady_clock;
  Clock::time_point started, mark;  ///< Of the call in progress, and of its stage.
  void record_rows(const ExpertBatch& batch, Stream stream);
  void record_digest(const RowRanges& rows, const Fp8RowsView& in, Stream stream);
  /// Microseconds since `start`, which moves on; 0 unless stats are recorded.
  [[nodiscard]] double stage_us(Clock::time_point& start, Stream stream);
};

/// Of one mode: ranks, capacity and wire format decide everything that an exchange is.
[[nodiscard]] ExchangeConfig exchange_config(const LayerGroupConfig& config, Mode mode,
                                             WireFormat wire, Device::Kind device);
/// Rows of the scratch: those of the larger mode.   Throws: kInvalidArgument naming the field.
[[nodiscard]] std::int64_t checked_max_rows(const LayerGroupConfig& config, int num_ranks,
                                            Device::Kind device);
/// Bytes of LayerGroup::Impl::expert_y.
[[nodiscard]] std::size_t expert_y_bytes(const LayerGroupConfig& config, std::int64_t max_rows,
                                         Device::Kind device);
/// The recipe of each mode that the group has, by Mode.   Throws: as LayerGroup::add_layer().
[[nodiscard]] std::array<std::optional<LayerRecipe>, 2> resolve_recipes(
    const LayerGroupConfig& config, const ModeRecipes& recipes,
    const std::optional<StaticScales>& scales, const std::string& layer_name);

}  // namespace sluice
