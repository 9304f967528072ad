// casts.h - every e4m3 cast of the layer, with what it did to the values.
#pragma once

#include <span>

#include "sluice/lab/accuracy.h"
#include "sluice/quant.h"

namespace sluice::accuracy {

/// A scaled value beyond this would round past 448 if there were room: casting clips it.
inline constexpr float kSaturates = kE4m3Max + 16;  // Half of the largest values' step.

/// GEMM2's input from h [intermediate] by `cast`, which is not kNone; `s2` is for a static one.
[[nodiscard]] Gemm1Row gemm2_row(Cast cast, float s2, std::span<const float> h);

/// Value of each code times its scale, in float64.
void dequantize(const Gemm1Row& row, std::span<double> out);

CastCounts& operator+=(CastCounts& sum, const CastCounts& part) noexcept;

}  // namespace sluice::accuracy
