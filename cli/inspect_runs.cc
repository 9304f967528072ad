#include "inspect_runs.h"

#include <fmt/core.h>

#include <algorithm>

#include "report.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/recipe.h"

namespace sluice::cli {
namespace {

bool can_have(const Recipe& recipe, const std::optional<StaticScales>& scales) {
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    try {
      (void)resolve_recipe(recipe, mode, DispatchDtype::kAuto, scales, "the layer");
      return true;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
    }
  }
  return false;
}

RecipeGroup group_of(const Checkpoint& checkpoint, int layer) {
  const std::optional<StaticScales> scales = checkpoint.static_scales(layer);
  RecipeGroup group{.layers = {layer}, .recipes = {}, .static_scales = "none"};
  for (const NamedRecipe& named : named_recipes()) {
    if (can_have(named.recipe, scales)) group.recipes.emplace_back(named.name);
  }
  if (scales)
    group.static_scales = scales->s1 == 1 && scales->s2 == 1 ? "uncalibrated" : "calibrated";
  return group;
}

}  // namespace

std::vector<RecipeGroup> recipe_groups(const Checkpoint& checkpoint, std::span<const int> layers) {
  std::vector<RecipeGroup> groups;
  for (const int layer : layers) {
    RecipeGroup own = group_of(checkpoint, layer);
    const auto same = std::ranges::find_if(groups, [&](const RecipeGroup& g) {
      return g.recipes == own.recipes && g.static_scales == own.static_scales;
    });
    if (same == groups.end()) {
      groups.push_back(std::move(own));
    } else {
      same->layers.push_back(layer);
    }
  }
  return groups;
}

std::vector<ActivationGroup> activation_groups(const Checkpoint& checkpoint,
                                               std::span<const int> layers) {
  std::vector<ActivationGroup> groups;
  for (const int layer : layers) {
    const std::string own = to_string(checkpoint.activation(layer));
    const auto same = std::ranges::find(groups, own, &ActivationGroup::activation);
    if (same == groups.end()) {
      groups.push_back({.layers = {layer}, .activation = own});
    } else {
      same->layers.push_back(layer);
    }
  }
  return groups;
}

SampledCodes code_kind(std::span<const LayerSample> samples) {
  SampledCodes kind;
  for (const LayerSample& s : samples) {
    for (const std::int64_t count : s.codes) kind.num_codes += count;
    kind.num_minus_eight += s.codes[0];
  }
  return kind;
}

Device::Kind planned_device(const ModelGeometry& geometry) {
  // Biases are added on the CPU alone.
  return geometry.has_bias ? Device::Kind::kHost : Device::Kind::kCuda;
}

std::vector<RankMemory> memory_by_ranks(const Checkpoint& checkpoint, DType scale_dtype) {
  const ModelGeometry& g = checkpoint.geometry();
  LayerGroupConfig config{.geometry = g};
  config.low_latency.max_tokens_per_rank = kPlannedTokens;
  PlannedLayer layer{
      .weight_format = g.weight_format, .scale_dtype = scale_dtype, .group_size = g.group_size};
  layer.recipes = {.low_latency = parse_recipe(kRecommendedRecipe),
                   .dispatch_dtype = read_environment().dispatch_dtype};
  const std::vector<PlannedLayer> layers(checkpoint.moe_layers().size(), layer);
  std::vector<RankMemory> result;
  for (int ranks = 1; ranks <= 64 && g.num_experts % ranks == 0; ranks *= 2) {
    result.push_back({.num_ranks = ranks,
                      .num_local_experts = g.num_experts / ranks,
                      .memory = LayerGroup::plan_memory(config, layers, planned_device(g), ranks)});
  }
  return result;
}

std::string layer_list(std::span<const int> layers) {
  const bool is_run = layers.back() - layers.front() + 1 == static_cast<int>(layers.size());
  if (layers.size() > 2 && is_run) return fmt::format("{}..{}", layers.front(), layers.back());
  std::string text;
  for (const int layer : layers) text += (text.empty() ? "" : ", ") + std::to_string(layer);
  return text;
}

void print_activations(std::span<const ActivationGroup> groups) {
  if (groups.size() < 2) return;
  for (const ActivationGroup& g : groups) {
    fmt::print("activation layers {}: {}\n", layer_list(g.layers), g.activation);
  }
}

void print_runs(std::span<const RecipeGroup> groups, const std::optional<SampledCodes>& codes) {
  for (const RecipeGroup& g : groups) {
    std::string names;
    for (const std::string& name : g.recipes) {
      names += (names.empty() ? "" : ", ") + name;
      if (name == kRecommendedRecipe) names += " (recommended)";
    }
    fmt::print("recipes   layers {}: {}; static scales: {}\n", layer_list(g.layers), names,
               g.static_scales);
  }
  if (!codes) return;
  if (codes->fits_sign_magnitude()) {
    fmt::print(
        "codes     no -8 among the {} looked at: CUDA unpacks eight with 3 instructions, or "
        "with 6 or 7 if it meets one\n",
        codes->num_codes);
  } else {
    fmt::print(
        "codes     {} of the {} looked at are -8: CUDA unpacks eight with 6 or 7 instructions\n",
        codes->num_minus_eight, codes->num_codes);
  }
}

void print_memory(std::span<const RankMemory> memory, Device::Kind device) {
  fmt::print("memory    of all {}, {}, {}, low-latency mode, {} tokens per rank\n",
             counted(memory.front().memory.num_layers, "layer"),
             device == Device::Kind::kCuda ? "CUDA" : "CPU", kRecommendedRecipe, kPlannedTokens);
  Table table({"ranks", "experts each", "weights each", "buffers each", "total each"});
  for (const RankMemory& m : memory) {
    const auto total = static_cast<double>(m.memory.total_bytes());
    const auto weights = static_cast<double>(m.memory.prepared_bytes);
    table.add({std::to_string(m.num_ranks), std::to_string(m.num_local_experts),
               human_bytes(weights), human_bytes(total - weights), human_bytes(total)});
  }
  fmt::print("{}\n", table.to_string());
}

nlohmann::ordered_json to_json(const ActivationGroup& group) {
  return {{"layers", group.layers}, {"activation", group.activation}};
}

nlohmann::ordered_json to_json(const RecipeGroup& group) {
  return {{"layers", group.layers},
          {"recipes", group.recipes},
          {"recommended", kRecommendedRecipe},
          {"static_scales", group.static_scales}};
}

nlohmann::ordered_json to_json(const SampledCodes& codes) {
  return {{"looked_at", codes.num_codes},
          {"minus_eight", codes.num_minus_eight},
          {"cuda_code", codes.fits_sign_magnitude() ? "sign-magnitude" : "ones-complement"}};
}

nlohmann::ordered_json to_json(const RankMemory& m) {
  return {{"ranks", m.num_ranks},
          {"experts_per_rank", m.num_local_experts},
          {"prepared_bytes", m.memory.prepared_bytes},
          {"exchange_bytes", m.memory.exchange_bytes},
          {"scratch_bytes", m.memory.scratch_bytes},
          {"total_bytes", m.memory.total_bytes()}};
}

}  // namespace sluice::cli
