// random_experts.h - expert weights and activation rows from nothing but a seed, in memory.
#pragma once

#include <cstdint>

#include "sluice/checkpoint.h"

namespace sluice {

enum class CodeRange {
  kAll,        ///< -8..7
  kSymmetric,  ///< -7..7, as quantizers make them; CUDA has a cheaper form for these.
};

/// Uniform codes of geometry.weight_format, and scales that let the layer neither grow nor shrink
/// its input much: of int4 within a factor of two of 2^-8, of mxfp4 2^-9 .. 2^-6. `range` is for
/// int4. `storage` owns everything.
[[nodiscard]] ExpertWeights random_experts(const ModelGeometry& geometry, DType scale_dtype,
                                           std::uint64_t seed, CodeRange range = CodeRange::kAll);

/// Codes of normal values whose groups reach their largest code, and scales near 2^-7. codes:
/// [rows, width], scale: [rows, width / 128].
void random_rows(std::uint64_t seed, std::int64_t rows, std::int64_t width, std::uint8_t* codes,
                 float* scale);

}  // namespace sluice
