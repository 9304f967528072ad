// safety.h - static scales: calibrating them, and holding them against what tokens contain.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "accuracy/evaluator.h"
#include "sluice/lab/accuracy.h"

namespace sluice::accuracy {

/// s1 and s2 = amax / 448 of what GEMM1 and GEMM2 are fed by `tokens`, without headroom.
[[nodiscard]] StaticScales calibrate(const LayerSource& source, const Workload& tokens,
                                     ThreadPool& pool, const Progress& progress);

/// Static scales: those of the layer, and each expert's own, which may be empty.
struct JudgedScales {
  std::optional<StaticScales> layer;
  std::string origin;
  std::span<const InputScales> experts;
};

/// h: [rows, intermediate], exact.
[[nodiscard]] ScaleSafety judge_scales(const RowPlan& plan, const Workload& tokens,
                                       std::span<const double> h, const ModelGeometry& geometry,
                                       const JudgedScales& scales);

}  // namespace sluice::accuracy
