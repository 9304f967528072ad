#include "run_slots.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "sluice/error.h"
#include "sluice/placement_files.h"

namespace sluice::cli {
namespace {

template <class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> text, Args&&... args) {
  throw Error(ErrorCode::kInvalidArgument, fmt::format(text, std::forward<Args>(args)...));
}

/// Those of the file for the layers that run.
std::vector<Placement> read_placements_of(const std::string& path, int num_experts,
                                          const LayerRunConfig& config) {
  const std::vector<LayerPlacement> file = read_placements(path);
  std::vector<Placement> placements;
  for (const int layer : config.layers) {
    const auto found = std::ranges::find(file, layer, &LayerPlacement::layer);
    if (found == file.end()) refuse("--placement {} has no layer {}", path, layer);
    const Placement& placement = found->placement;
    if (placement.num_ranks() != config.num_ranks) {
      refuse("--placement {} is for {} ranks; there are {}", path, placement.num_ranks(),
             config.num_ranks);
    }
    if (placement.num_experts() != num_experts) {
      refuse("--placement {} is for {} experts; the checkpoint has {}", path,
             placement.num_experts(), num_experts);
    }
    placements.push_back(placement);
  }
  return placements;
}

}  // namespace

void resolve_slots(const SlotOptions& options, int num_experts, LayerRunConfig& config) {
  config.num_slots = options.num_slots;
  config.rebalances = options.rebalances;
  if (!options.placement.empty()) {
    if (options.num_slots != 0) refuse("--slots: --placement has a number of slots");
    config.placements = read_placements_of(options.placement, num_experts, config);
    config.num_slots = config.placements.front().num_slots();
  }
  if (options.rebalances && config.num_slots == 0) {
    refuse("--rebalance: needs slots that experts can move to; give --slots or --placement");
  }
  if (config.num_slots == 0) check_even(num_experts, config.num_ranks);
}

void check_even(int num_experts, int num_ranks) {
  if (num_experts % num_ranks == 0) return;
  refuse("{} experts are not divisible by {} ranks; give --slots, at least {}", num_experts,
         num_ranks, (num_experts + num_ranks - 1) / num_ranks * num_ranks);
}

}  // namespace sluice::cli
