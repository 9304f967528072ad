// inspect_runs.h - how a checkpoint can be run: recipes by layer, the kernel's code, memory.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "inspect_sample.h"
#include "sluice/checkpoint.h"
#include "sluice/layer.h"

namespace sluice::cli {

/// Layers that can have the same recipes.
struct RecipeGroup {
  std::vector<int> layers;
  std::vector<std::string> recipes;  ///< Names, in either mode.
  std::string static_scales;         ///< "none", "uncalibrated" or "calibrated".
};

/// `direct` has the smallest error of all recipes and needs no static scales (docs/accuracy.md).
constexpr const char* kRecommendedRecipe = "direct";

/// Of `layers`, which Checkpoint::check() has passed.
[[nodiscard]] std::vector<RecipeGroup> recipe_groups(const Checkpoint& checkpoint,
                                                     std::span<const int> layers);

/// Layers whose experts have the same activation function.
struct ActivationGroup {
  std::vector<int> layers;
  std::string activation;
};

/// Of `layers`, which Checkpoint::check() has passed.
[[nodiscard]] std::vector<ActivationGroup> activation_groups(const Checkpoint& checkpoint,
                                                             std::span<const int> layers);

/// Codes that were looked at, and how the CUDA backend stores them.
struct SampledCodes {
  std::int64_t num_codes = 0, num_minus_eight = 0;
  /// The cheaper code has no -8. The backend looks at all codes when it loads them.
  [[nodiscard]] bool fits_sign_magnitude() const noexcept { return num_minus_eight == 0; }
};
[[nodiscard]] SampledCodes code_kind(std::span<const LayerSample> samples);

/// One number of expert-parallel ranks.
struct RankMemory {
  int num_ranks = 1, num_local_experts = 0;
  LayerGroupMemory memory;
};

/// Tokens per rank that memory is planned for.
constexpr int kPlannedTokens = 128;

/// What memory is planned for: CUDA, unless it does not compute such weights or their biases.
[[nodiscard]] Device::Kind planned_device(const ModelGeometry& geometry);

/// What all layers take on each of 1, 2, 4 .. 64 ranks, as far as they divide the experts:
/// planned_device(), recommended recipe, low-latency mode, kPlannedTokens.
[[nodiscard]] std::vector<RankMemory> memory_by_ranks(const Checkpoint& checkpoint,
                                                      DType scale_dtype);

/// A line for each, if there are several: of a single one the model's line tells.
void print_activations(std::span<const ActivationGroup> groups);
/// `codes` of int4, if the weights are.
void print_runs(std::span<const RecipeGroup> groups, const std::optional<SampledCodes>& codes);
void print_memory(std::span<const RankMemory> memory, Device::Kind device);
[[nodiscard]] nlohmann::ordered_json to_json(const ActivationGroup& group);
[[nodiscard]] nlohmann::ordered_json to_json(const RecipeGroup& group);
[[nodiscard]] nlohmann::ordered_json to_json(const SampledCodes& codes);
[[nodiscard]] nlohmann::ordered_json to_json(const RankMemory& memory);

/// "3..60" where they follow each other, else "3, 4, 6".
[[nodiscard]] std::string layer_list(std::span<const int> layers);

}  // namespace sluice::cli
