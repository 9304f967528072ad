// synthetic_mxfp4.h - a synthetic matrix in MXFP4, after docs/formats.md.
#pragma once

#include <cstddef>
#include <vector>

#include "synthetic/random_weights.h"

namespace sluice {

/// The matrix' weights, each group of 32 quantized anew as the OCP specification says: the scale is
/// the power of two that brings the largest magnitude into [4, 8).
struct Mxfp4Bytes {
  std::vector<std::byte> codes;   ///< [n, k / 2] e2m1, even k in the low nibble.
  std::vector<std::byte> scales;  ///< [n, k / 32] e8m0
};
[[nodiscard]] Mxfp4Bytes mxfp4_bytes(const SyntheticMatrix& m);

/// Rows of bytes as gpt-oss has them: row 0 of `gate`, row 0 of `up`, row 1 of `gate` and so on.
[[nodiscard]] std::vector<std::byte> in_turn(const std::vector<std::byte>& gate,
                                             const std::vector<std::byte>& up, int num_rows);

}  // namespace sluice
