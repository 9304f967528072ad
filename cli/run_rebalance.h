// run_rebalance.h - what `sluice run --rebalance` says of experts that moved.
#pragma once

#include <nlohmann/json.hpp>

#include "layer_run.h"

namespace sluice::cli {

/// A line on what moved in one layer and what that changed, and the same in `json`. False if an
/// output has other bits than before.
/// Requires: LayerRunConfig::rebalances.
[[nodiscard]] bool report_rebalance(const LayerRunResult& result, nlohmann::ordered_json& json);

}  // namespace sluice::cli
