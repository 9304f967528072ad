// gemm_tile.h - 4-bit weights x e4m3 rows for a few blocks of 16 output channels.
//
// Maths     acc[r, n] = sum_g f32(S[r, n, g]) * (ws[n, g] * as[r, g])     g ascending, f32, no fma
//           S[r, n, g] = sum_{k in g} w[n, k] * q[r, k]                   exact int32 (digits.h)
//           g runs over the weights' scale groups (128 or 32 k). Of e2m1, w is twice the value,
//           which is an integer, and ws half the scale, which is exact.
//
// Operands  codes  [blocks][K / 8][64]             PreparedMatrix: streamed once from memory
//           scales [blocks][K / group_size][16]    bf16, f32 or e8m0
//           digits [K / 128][rows][256]            DigitRows: read per block, from L1 or L2
//           low    [K / 128][rows][256]            only the steps that DigitGroup::low names
//           acc    [blocks][rows][16] f32
//
// Tile      16 channels x `rows` rows x 128 k. Few rows: a line of weights is widened to bytes in
//           registers and meets 1, 2 (AVX2) or up to 8 (AVX-512 VNNI) rows there. More rows: the
//           weights of 128 k are widened once, in L1, to signed bytes (AMX: gemm_tiles-inl.h), to
//           bytes (VNNI) or to int16 (all others: gemm_words-inl.h), and meet up to 16 (AMX) or 8
//           rows at once from there.
//
// Bits      the same for every instruction set, every number of rows and every position of a row.
// Bound     few rows: bytes of codes. Many: dot products, for each weight and row two of bytes
//           or one of int16. AMX: its two are as fast as the sums' way to the outputs.
#pragma once

#include <cstdint>

#include "backend/cpu/digits.h"
#include "backend/cpu/prepared_experts.h"

namespace sluice::cpu {

/// Rows of one GEMM operand, split into digits: group-major, so that the rows of one group are
/// contiguous.
struct DigitRows {
  DigitLayout layout = DigitLayout::kBytes;
  std::uint8_t* digits = nullptr;  ///< [K / 128][rows][kMainDigitBytes]
  std::uint8_t* low = nullptr;     ///< [K / 128][rows][kLowDigitBytes]
  DigitGroup* groups = nullptr;    ///< [K / 128][rows]
  int rows = 0;

  /// Splits one group of one row into its place.
  void set(std::int64_t group, int row, const std::uint8_t* codes, float scale) const {
    const std::int64_t i = group * rows + row;
    groups[i] =
        split_digits(layout, codes, scale, digits + i * kMainDigitBytes, low + i * kLowDigitBytes);
  }
};

/// Rows per call that keep digits and accumulators in cache.
inline constexpr int kMaxTileRows = 64;

struct GemmTile {
  const PreparedMatrix* weights = nullptr;
  std::int64_t first_block = 0;  ///< Of 16 channels.
  int num_blocks = 0;
  DigitRows x;
  float* acc = nullptr;  ///< [num_blocks][x.rows][16], overwritten.
};

/// The layout of digits with which gemm_tile() is best for `rows` rows on this machine.
[[nodiscard]] DigitLayout digit_layout(int rows);

/// The layout of tile.x decides which kernel runs.
void gemm_tile(const GemmTile& tile);

/// "AVX2", "AVX-512", "AVX-512 VNNI", "AVX-512 VNNI, AMX": what the kernels use on this machine.
[[nodiscard]] const char* instruction_set();

}  // namespace sluice::cpu
