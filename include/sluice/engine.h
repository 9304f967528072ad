// engine.h - one MoE layer of a checkpoint, ready to run: the short way for a single layer.
//
// An Engine is a Layer in a group of its own. Layers that belong to one model share buffers; for
// those see LayerGroup in layer.h, which also says everything about threads, ranks and streams.
#pragma once

#include "sluice/layer.h"

namespace sluice {

struct EngineConfig {
  int layer = 0;
  /// Recipe of each mode; a mode without one cannot be called. Two layers of one model may differ.
  std::optional<Recipe> low_latency = Recipe{};         ///< direct
  std::optional<Recipe> normal = Recipe{};              ///< direct
  DispatchDtype dispatch_dtype = DispatchDtype::kAuto;  ///< As in ModeRecipes.
  int max_tokens_per_rank = 0;                          ///< Of either mode.
  int max_m = 0;                       ///< ExchangeConfig::max_m of the low-latency mode.
  int num_slots = 0;                   ///< As in LayerGroupConfig; 0: those of `placement`.
  Placement placement = {};            ///< Of the experts; empty: Placement::even().
  Hosts hosts = {};                    ///< As in LayerGroupConfig.
  int sum_parts = 0;                   ///< As in ExchangeConfig.
  float routed_scaling_factor = 1.0f;  ///< 1: the host model applies it.
  std::chrono::milliseconds peer_timeout{10'000};
};

class Engine : public Layer {
 public:
  /// What create() will take on each of `num_ranks` ranks, for experts of `geometry` with scales of
  /// `scale_dtype`. Needs neither checkpoint nor device.   Throws: as create().
  [[nodiscard]] static LayerGroupMemory plan_memory(const EngineConfig& config,
                                                    const ModelGeometry& geometry,
                                                    DType scale_dtype, Device::Kind device,
                                                    int num_ranks);

  /// A LayerGroup and, in it, this layer of `checkpoint`. Borrows `transport` and `backend`;
  /// `checkpoint` is not needed afterwards.   Ranks: collective.
  /// Throws: as LayerGroup::create(), read_layer() and LayerGroup::add_layer().
  [[nodiscard]] static Engine create(const EngineConfig& config, const Checkpoint& checkpoint,
                                     Transport& transport, Backend& backend);

  /// What create() took on this rank, counted from the buffers there are: plan_memory() named it.
  [[nodiscard]] LayerGroupMemory memory() const noexcept { return group_.memory(); }
  [[nodiscard]] const LayerGroupConfig& group_config() const noexcept { return group_.config(); }

 private:
  Engine(LayerGroup group, Layer layer) noexcept
      : Layer(std::move(layer)), group_(std::move(group)) {}
  LayerGroup group_;
};

}  // namespace sluice
