// matrix_source.h - where one matrix of one expert lies, and in which order (repack.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice {

/// How the four bits of a weight are to be read.
enum class CodeKind : std::uint8_t {
  kTwosComplement,  ///< -8 .. 7, as W4AFP8 publishes them.
  kOffset,          ///< Weight + 8, 0 .. 15: "uint4b8" of compressed-tensors.
};

/// One matrix [n, k] of one expert, read where it lies. Strides are not negative.
///
/// Weight (row, k) is nibble k % 8, counted from the lowest, of the four bytes at
///     codes + row * row_bytes + (k / 8) * word_bytes
/// Scale (row, g) is element
///     row * scale_row + (g / a) * scale_block + (g % a) * scale_group,   a = groups_per_block
struct MatrixSource {
  const std::byte* codes = nullptr;  ///< Even, as are the strides.
  std::int64_t row_bytes = 0;        ///< k / 2 where rows are dense.
  std::int64_t word_bytes = 4;       ///< 4 where rows are dense.
  const std::byte* scales = nullptr;
  std::int64_t scale_row = 0;
  std::int64_t scale_block = 1;
  std::int64_t scale_group = 0;
  int groups_per_block = 1;
};

}  // namespace sluice
