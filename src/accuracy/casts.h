// casts.h - every e4m3 cast of the layer, with what it did to the values.
#pragma once

#include <span>

#include "sluice/accuracy.h"
#include "sluice/quant.h"

namespace sluice::accuracy {

/// A scaled value beyond this would round past 448 if there were room: casting clips it.
inline constexpr float kSaturates = kE4m3Max + 16;  // Half of the largest values' step.

/// How GEMM1's input is made; recipes that make it alike share an entry.
enum class Gemm1Cast { kNone, kGroup, kStatic, kRequantized, kPow2 };
/// How GEMM2's input is made.
enum class Gemm2Cast { kNone, kGroup, kStatic };

[[nodiscard]] Gemm1Cast gemm1_cast(RecipeName name) noexcept;
[[nodiscard]] Gemm2Cast gemm2_cast(RecipeName name) noexcept;

/// GEMM2's input from h [intermediate], by group or with the static scale `s2`.
[[nodiscard]] Gemm1Row gemm2_row(Gemm2Cast cast, float s2, std::span<const float> h);

/// Value of each code times its scale, in float64.
void dequantize(const Gemm1Row& row, std::span<double> out);

CastCounts& operator+=(CastCounts& sum, const CastCounts& part) noexcept;

}  // namespace sluice::accuracy
