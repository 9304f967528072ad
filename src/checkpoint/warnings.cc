#include <algorithm>

#include "checkpoint/checkpoint_impl.h"

namespace sluice {

std::vector<CheckpointWarning> Checkpoint::warnings(int layer) const {
  std::vector<CheckpointWarning> result;
  const std::vector<InputScales> scales = input_scales(layer);
  const bool is_uncalibrated = !scales.empty() && std::ranges::all_of(scales, [](const auto& s) {
    return s.w1 == 1.0f && s.w2 == 1.0f && s.w3 == 1.0f;
  });
  if (is_uncalibrated) {
    result.push_back({.tensor = tensor_name(layer, 0, ExpertPart::kW1InputScale),
                      .text = "every input scale of the layer is exactly 1.0: uncalibrated"});
  }
  return result;
}

}  // namespace sluice
