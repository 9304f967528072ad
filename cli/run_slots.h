// run_slots.h - where the experts of `sluice run` are, and whether they move.
#pragma once

#include <string>

#include "layer_run.h"

namespace sluice::cli {

/// --slots, --placement and --rebalance.
struct SlotOptions {
  int num_slots = 0;
  std::string placement;
  bool rebalances = false;
};

/// Sets slots and placements of `config`, whose layers and ranks are known. Throws:
/// kInvalidArgument naming the option, and one that would help.
void resolve_slots(const SlotOptions& options, int num_experts, LayerRunConfig& config);

/// Of ranks without slots. Throws: kInvalidArgument if they do not divide the experts, naming how
/// many --slots would do.
void check_even(int num_experts, int num_ranks);

}  // namespace sluice::cli
