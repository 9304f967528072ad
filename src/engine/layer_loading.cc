// Layers of a checkpoint: mapped for who wants their weights, or loaded straight to the backend.
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>

#include "backend/traits.h"
#include "core/fail.h"
#include "engine/expert_loader.h"
#include "engine/layer_impl.h"
#include "sluice/transport.h"

namespace sluice {
namespace {

std::string name_of(int layer) {
  return fmt::format("model.layers.{}.mlp.experts", layer);
}

void check_layer(const Checkpoint& checkpoint, int layer) {
  check_argument(std::ranges::binary_search(checkpoint.moe_layers(), layer),
                 "layer {} of {} holds no routed experts", layer, checkpoint.path().string());
}

/// The experts of `rank`.   Throws: kInvalidArgument.
std::pair<int, int> experts_of(const Checkpoint& checkpoint, int layer, int rank, int num_ranks) {
  check_layer(checkpoint, layer);
  check_divisible(checkpoint.geometry(), 0, num_ranks);
  check_argument(rank >= 0 && rank < num_ranks, "rank {} is not in [0, {})", rank, num_ranks);
  const ExpertPlacement placement(checkpoint.geometry().num_experts, num_ranks);
  return {placement.expert_of(rank, 0), placement.num_local()};
}

/// The experts that this rank reads, one for each of its slots: an empty slot takes the rank's
/// first expert, so that every slot holds weights.
std::vector<int> experts_to_read(const Placement& placement, int rank) {
  const std::span<const int> slots = placement.slot_experts(rank);
  const auto found = std::ranges::find_if(slots, [](int e) { return e != kEmptySlot; });
  const int first = found == slots.end() ? 0 : *found;
  std::vector<int> experts;
  for (const int e : slots) experts.push_back(e == kEmptySlot ? first : e);
  return experts;
}

/// Names a file that could not be read, where `recipes` need the scales that it may hold.
void check_static_scales(const Checkpoint& checkpoint, const LayerGroupConfig& config,
                         const ModeRecipes& recipes, const ExpertWeights& shapes,
                         const std::string& name) {
  if (shapes.static_scales) return;
  const auto& warnings = checkpoint.warnings();
  const auto lost = std::ranges::find(warnings, "unreadable-file", &CheckpointWarning::kind);
  if (lost == warnings.end()) return;
  try {
    (void)resolve_recipes(config, recipes, std::nullopt, name);
  } catch (const Error& error) {
    // With scales this throws what has another cause.
    (void)resolve_recipes(config, recipes, StaticScales{1, 1}, name);
    fail(error.code(), "{}; {} {}", error.what(), lost->tensor, lost->text);
  }
}

}  // namespace

LayerSpec read_layer(const Checkpoint& checkpoint, int layer, int rank, int num_ranks) {
  const auto [first, count] = experts_of(checkpoint, layer, rank, num_ranks);
  return {.name = name_of(layer),
          .weights = checkpoint.load_experts(layer, first, count),
          .identity = checkpoint.identity()};
}

Layer LayerGroup::add_layer(const Checkpoint& checkpoint, int layer, const ModeRecipes& recipes,
                            const LoadOptions& options) {
  const std::array layers{layer};
  return std::move(add_layers(checkpoint, layers, recipes, options).front());
}

std::vector<Layer> LayerGroup::add_layers(const Checkpoint& checkpoint, std::span<const int> layers,
                                          const ModeRecipes& recipes, const LoadOptions& options) {
  Impl& self = *impl_;
  if (layers.empty()) return {};
  std::vector<std::unique_ptr<ExpertReader>> readers;
  std::vector<AgreedLayer> agreed;
  check_argument(options.placements.empty() || options.placements.size() == layers.size(),
                 "{} placements are given for {} layers", options.placements.size(), layers.size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    check_layer(checkpoint, layers[i]);
    const Placement placement =
        self.placement_or_default(options.placements.empty() ? Placement() : options.placements[i]);
    readers.push_back(
        std::make_unique<ExpertReader>(checkpoint, layers[i], experts_to_read(placement, rank()),
                                       traits_of(self.backend->device().kind).load_piece_bytes));
    check_static_scales(checkpoint, self.config, recipes, readers.back()->shapes(),
                        name_of(layers[i]));
    agreed.push_back(self.agree(name_of(layers[i]), readers.back()->shapes(), checkpoint.identity(),
                                recipes, placement));
  }

  // Ranks meet after each layer, while their threads go on with the next. So a wait is for one
  // layer of a slower rank, and a failure ends the load everywhere before all layers are there.
  std::size_t num_met = 0;
  bool is_meeting = false;
  std::vector<std::unique_ptr<PreparedExperts>> prepared;
  const auto meet = [&](std::size_t layer) {
    is_meeting = true;
    self.together(agreed[layer].name, [] {});
    is_meeting = false;
    num_met = layer + 1;
  };
  try {
    prepared = load_prepared(*self.backend, readers, options, self.load_stats, meet);
  } catch (...) {
    if (is_meeting) throw;  // Another rank's failure, or another rank is gone.
    self.together(agreed[std::min(num_met, agreed.size() - 1)].name, [] { throw; });
  }
  std::vector<Layer> made;
  self.together(agreed.back().name, [] {});
  for (std::size_t i = 0; i < readers.size(); ++i) {
    made.push_back(
        Layer(self.attach(impl_, agreed[i], readers[i]->shapes(), std::move(prepared[i]))));
  }
  (void)self.transport->all_gather({}, self.config.peer_timeout);  // As add_layer() of a spec.
  return made;
}

}  // namespace sluice
