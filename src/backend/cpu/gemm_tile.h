// gemm_tile.h - 4-bit weights x e4m3 rows for a few blocks of 16 output channels.
//
// Maths     acc[r, n] = sum_g f32(S[r, n, g]) * (ws[n, g] * as[r, g])     g ascending, f32, no fma
//           S[r, n, g] = sum_{k in g} w[n, k] * q[r, k]                   exact int32 (digits.h)
//           g runs over the weights' scale groups (128 or 32 k). Of e2m1, w is twice the value,
//           which is an integer, and ws half the scale, which is exact.
//
// Operands  codes  [blocks][K / 8][64]             PreparedMatrix: streamed once from memory
//           scales [blocks][K / group_size][16]    bf16, f32 or e8m0
//           digits [K / 128][rows][256]            DigitRows: per block, from L1 or L2; kTiles:
//                  [K / 128][tile][K / 32 of them][row][64]
//           low    [K / 128][rows][256]            only the steps that DigitGroup::low names
//           lows   [K / 128][tiles]                of kTiles: the same, listed by tile
//           acc    [blocks][acc_rows()][16] f32
//
// Tile      16 channels x `rows` rows x 128 k. Few rows: a line of weights is widened to bytes in
//           registers and meets 1, 2 (AVX2) or up to 8 (AVX-512 VNNI) rows there. More rows: the
//           weights of 128 k are widened once, in L1, to bf16 (AMX: gemm_tiles-inl.h), to bytes
//           (VNNI) or to int16 (all others: gemm_words-inl.h), and meet up to 32 (AMX) or 8 rows
//           at once from there.
//
// Bits      the same for every instruction set, every number of rows and every position of a row.
// Bound     few rows: bytes of codes. Many: dot products, for each weight and row two of bytes
//           or one of int16 or bf16.
#pragma once

#include <cstdint>

#include "backend/cpu/digits.h"
#include "backend/cpu/prepared_experts.h"
#include "backend/cpu/tile_rows.h"

namespace sluice::cpu {

/// Rows of one GEMM operand, split into digits: group-major, so that the rows of one group are
/// contiguous.
struct DigitRows {
  DigitLayout layout = DigitLayout::kBytes;
  std::uint8_t* digits = nullptr;  ///< [K / 128][rows][kMainDigitBytes]; kTiles: padded() rows.
  std::uint8_t* low = nullptr;     ///< [K / 128][rows][kLowDigitBytes]
  DigitGroup* groups = nullptr;    ///< [K / 128][rows]
  TileLows* lows = nullptr;        ///< [K / 128][RowTiles(rows).count], of kTiles.
  int rows = 0;

  /// Rows with those that do not count: how far apart blocks are in GemmTile::acc.
  [[nodiscard]] int acc_rows() const {
    return layout == DigitLayout::kTiles ? RowTiles(rows).padded() : rows;
  }
  /// Splits one group of one row into its place.
  void set(std::int64_t group, int row, const std::uint8_t* codes, float scale) const {
    const std::int64_t i = group * rows + row;
    std::uint8_t* const low_digits = low + i * kLowDigitBytes;
    if (layout == DigitLayout::kTiles) {
      const RowTiles cut(rows);
      const std::int64_t tile = group * cut.count + row / kTileRows;
      groups[i] = split_digits_for_tiles(
          codes, scale, digits + tile * kTileDigitBytes + row % kTileRows * kTileRowBytes,
          kTileRows * kTileRowBytes, low_digits);
    } else {
      groups[i] = split_digits(layout, codes, scale, digits + i * kMainDigitBytes, low_digits);
    }
  }
  /// To be called when all rows of a group are set.
  void complete(std::int64_t group) const {
    if (layout != DigitLayout::kTiles) return;
    const RowTiles cut(rows);
    for (int t = 0; t < cut.count; ++t) {
      const std::int64_t i = group * rows + t * kTileRows;
      lows[group * cut.count + t].fill(groups + i, low + i * kLowDigitBytes, cut.rows_of(t));
    }
  }
};

/// Rows per call that keep digits and accumulators in cache.
inline constexpr int kMaxTileRows = 64;

struct GemmTile {
  const PreparedMatrix* weights = nullptr;
  std::int64_t first_block = 0;  ///< Of 16 channels.
  int num_blocks = 0;
  DigitRows x;
  float* acc = nullptr;  ///< [num_blocks][x.acc_rows()][16], overwritten.
};

/// The layout of digits with which gemm_tile() is best for `rows` rows on this machine.
[[nodiscard]] DigitLayout digit_layout(int rows);

/// The layout of tile.x decides which kernel runs.
void gemm_tile(const GemmTile& tile);

/// "AVX2", "AVX-512", "AVX-512 VNNI", "AVX-512 VNNI, AMX": what the kernels use on this machine.
[[nodiscard]] const char* instruction_set();

}  // namespace sluice::cpu
