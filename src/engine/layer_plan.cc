// What a group will take, counted from the same sizes that its buffers are made with.
#include <set>
#include <utility>

#include "backend/traits.h"
#include "core/fail.h"
#include "engine/layer_impl.h"
#include "sluice/layer.h"

namespace sluice {
LayerGroupMemory LayerGroup::plan_memory(const LayerGroupConfig& config,
                                         std::span<const PlannedLayer> layers, Device::Kind device,
                                         int num_ranks) {
  const ModelGeometry& g = config.geometry;
  check_bias(g, device);
  const std::int64_t max_rows = checked_max_rows(config, num_ranks, device);
  const int num_local = (config.num_slots != 0 ? config.num_slots : g.num_experts) / num_ranks;
  LayerGroupMemory memory;
  memory.num_layers = static_cast<int>(layers.size());
  memory.scratch_bytes = expert_y_bytes(config, max_rows, device) +
                         fp8_code_bytes(max_rows, g.intermediate) +
                         fp8_scale_bytes(max_rows, g.intermediate) + 2 * padded_bytes(config);
  const std::size_t weights = static_cast<std::size_t>(num_local) * 3u *
                              static_cast<std::size_t>(g.hidden) *
                              static_cast<std::size_t>(g.intermediate);
  std::set<std::pair<Mode, WireFormat>> exchanges;
  bool has_x_scale = false;
  for (const PlannedLayer& layer : layers) {
    check_argument(allows_group_size(layer.weight_format, layer.group_size), "group_size {} is {}",
                   layer.group_size, group_size_refusal(layer.weight_format));
    check_argument(allows_scale_dtype(layer.weight_format, layer.scale_dtype),
                   "scales are {}, expected {}", to_string(layer.scale_dtype),
                   scale_dtype_names(layer.weight_format));
    memory.codes_bytes += code_bytes(layer.weight_format, weights);
    memory.scales_bytes +=
        weights / static_cast<std::size_t>(layer.group_size) * size_bytes(layer.scale_dtype);
    ModelGeometry own = g;
    own.weight_format = layer.weight_format;
    own.group_size = layer.group_size;
    memory.prepared_bytes += traits_of(device).prepared_bytes(own, num_local, layer.scale_dtype);
    // Sizes do not depend on the values of static scales.
    for (const auto& recipe :
         resolve_recipes(config, layer.recipes, StaticScales{1, 1}, "the layer")) {
      if (!recipe) continue;
      exchanges.emplace(recipe->mode, recipe->wire);
      has_x_scale = has_x_scale || scales_per_row(recipe->gemm1, g.hidden) > 0;
    }
  }
  for (const auto& [mode, wire] : exchanges) {
    memory.exchange_bytes +=
        Exchange::workspace_bytes(exchange_config(config, mode, wire, device), num_ranks, device);
  }
  // Their codes lie in expert_y.
  if (has_x_scale) memory.scratch_bytes += fp8_scale_bytes(max_rows, g.hidden);
  return memory;
}

}  // namespace sluice
