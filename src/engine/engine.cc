#include "sluice/engine.h"

#include <array>

#include "core/fail.h"

namespace sluice {
namespace {

LayerGroupConfig config_of_group(const EngineConfig& config, const ModelGeometry& geometry) {
  check_argument(config.low_latency || config.normal,
                 "the engine has a recipe for neither mode: set low_latency, normal or both");
  check_argument(config.max_tokens_per_rank > 0, "max_tokens_per_rank {} is not positive",
                 config.max_tokens_per_rank);
  LayerGroupConfig group{
      .geometry = geometry,
      .num_slots = config.num_slots != 0 ? config.num_slots : config.placement.num_slots(),
      .hosts = config.hosts,
      .sum_parts = config.sum_parts,
      .routed_scaling_factor = config.routed_scaling_factor,
      .peer_timeout = config.peer_timeout};
  if (config.low_latency) group.low_latency = {config.max_tokens_per_rank, config.max_m};
  if (config.normal) group.normal = {.max_tokens_per_rank = config.max_tokens_per_rank};
  return group;
}

ModeRecipes recipes_of(const EngineConfig& config) {
  return {.low_latency = config.low_latency,
          .normal = config.normal,
          .dispatch_dtype = config.dispatch_dtype};
}

}  // namespace

LayerGroupMemory Engine::plan_memory(const EngineConfig& config, const ModelGeometry& geometry,
                                     DType scale_dtype, Device::Kind device, int num_ranks) {
  const std::array layers{PlannedLayer{.recipes = recipes_of(config),
                                       .weight_format = geometry.weight_format,
                                       .scale_dtype = scale_dtype,
                                       .group_size = geometry.group_size}};
  return LayerGroup::plan_memory(config_of_group(config, geometry), layers, device, num_ranks);
}

Engine Engine::create(const EngineConfig& config, const Checkpoint& checkpoint,
                      Transport& transport, Backend& backend) {
  LayerGroup group =
      LayerGroup::create(config_of_group(config, checkpoint.geometry()), transport, backend);
  LoadOptions options;
  if (config.placement.num_slots() != 0) options.placements = {config.placement};
  Layer layer = group.add_layer(checkpoint, config.layer, recipes_of(config), options);
  return {std::move(group), std::move(layer)};
}

}  // namespace sluice
