// model_parts.h - what the sources of the network's model share.
#pragma once

#include <cstddef>
#include <span>

#include "sluice/lab/network_model.h"

namespace sluice {

/// Between two kernels of a graph lie 1.2 to 1.8 us (1.8 at most in
/// docs/performance-kernels.md, "What is missed, and why").
inline constexpr double kLaunchUs = 1.5;

/// Throws: kInvalidArgument naming the field.
void check_layer(const MachineModel& machine, const ClusterLayer& layer, const TokenSpread& spread);

/// The table for the layer's weights and recipe. Throws: kUnsupported.
[[nodiscard]] const StageTable& find_stage(const MachineModel& machine, const ClusterLayer& layer);

struct StagePrediction {
  double weights_us = 0;   ///< If every expert that has rows had one.
  double products_us = 0;  ///< What its rows take beyond that.
  double cast_us = 0;      ///< The receiver's cast before GEMM1.
};
[[nodiscard]] StagePrediction predict_stage_parts(const MachineModel& machine,
                                                  const ClusterLayer& layer,
                                                  const TokenSpread& spread);

/// Of `num_parts` equal parts of `values`, the one with the largest sum.
[[nodiscard]] double largest_sum(std::span<const double> values, std::size_t num_parts);

}  // namespace sluice
