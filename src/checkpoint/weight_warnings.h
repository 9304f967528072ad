// weight_warnings.h - weights that are implausible: by themselves, beside the expert's other
// matrices, beside other experts, beside other layers.
//
// Thresholds. Trained weights are near 1 / sqrt(K) (weight_stats.h). The same matrix of different
// experts and layers varies by a factor of about 5 in published models. So
//   30 and more from 1 / sqrt(K)                        is implausible;
//   10 and more between matrices that play the same part (gate and up, experts, layers) is;
//   30 and more between gate or up and down is, because a norm's weights may be folded into the
//   first two.
// Known faults lie above: scales 118 times too large, 1/448 twice, reciprocals.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/findings.h"
#include "checkpoint/weight_stats.h"

namespace sluice {

/// One expert that was looked at.
struct ExpertLook {
  int layer = 0, expert = 0;
  std::array<WeightStats, 3> matrices;  ///< gate, up, down
};

/// Names of the tensors that hold a matrix's codes and its scales; `matrix` is 0, 1, 2.
struct WeightNames {
  using Name = std::function<std::string(int layer, int expert, std::size_t matrix)>;
  Name codes, scales;
};

/// Layers that are out of line with the others, judged by few experts: worth more of them.
[[nodiscard]] std::vector<int> outlying_layers(const std::vector<ExpertLook>& looks);

/// `expects_minus_eight`: the format's quantizer makes codes of -8.
void check_weights(const std::vector<ExpertLook>& looks, const WeightNames& names,
                   bool expects_minus_eight, Findings& out);

}  // namespace sluice
