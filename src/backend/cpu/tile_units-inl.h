// tile_units-inl.h - the unit of work of tile_pipeline-inl.h; included per target.
#if defined(SLUICE_TILE_UNITS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_TILE_UNITS_INL_H_
#undef SLUICE_TILE_UNITS_INL_H_
#else
#define SLUICE_TILE_UNITS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "backend/cpu/digits.h"
#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/tile_rows.h"
#include "backend/cpu/tile_unit.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

inline constexpr int kGroupWeights = kGroup * kBlockN;   ///< Of one block: four B.
inline constexpr int kSumsOfTile = kTileRows * kBlockN;  ///< Of one C.
inline constexpr int kBlockScales = 4 * kBlockN;
inline constexpr int kTileWeights = kTileK * kBlockN;  ///< Of one B.

/// Bits of bf16 for a whole number of at most 8 bits.
constexpr std::uint16_t bf16_of_small(int value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(value)) >> 16);
}

/// The rows of a unit, one group of them.
template <int kRowTiles>
struct UnitRows {
  const DigitGroup* groups[kRowTiles];  ///< First row's of each tile.
  const std::uint8_t* digits[kRowTiles];
  const std::uint8_t* low[kRowTiles];
  const TileLows* lows = nullptr;  ///< [kRowTiles]
  std::int64_t first[kRowTiles];   ///< Row of each tile.
  int count[kRowTiles];            ///< Rows of each tile.

  [[nodiscard]] std::int64_t magnitude() const {
    std::int64_t most = 0;
    for (int t = 0; t < kRowTiles; ++t) most = std::max<std::int64_t>(most, lows[t].magnitude);
    return most;
  }
  [[nodiscard]] bool has_low() const {
    int rows_with_low = 0;
    for (int t = 0; t < kRowTiles; ++t) rows_with_low += lows[t].num_rows;
    return rows_with_low > 0;
  }
  [[nodiscard]] bool has_low_tile() const {
    bool any = false;
    for (int t = 0; t < kRowTiles; ++t) any |= lows[t].are_many;
    return any;
  }
};

/// What later units want in L1: codes of up to two blocks, and digits of kRowTiles tiles. Null is
/// nothing.
template <int kRowTiles>
struct Ahead {
  const std::uint8_t* codes[2] = {};
  const std::uint8_t* digits = nullptr;
  /// Asks for all of it.
  HWY_INLINE void ask() const { ask(0, 1); }
  /// Or for one of `num_shares`.
  HWY_INLINE void ask(int share, int num_shares) const {
    ask(codes[0], kGroupLines / num_shares, share);
    ask(codes[1], kGroupLines / num_shares, share);
    ask(digits, kRowTiles * kTileDigitBytes / kLineBytes / num_shares, share);
  }

 private:
  static HWY_INLINE void ask(const std::uint8_t* from, int lines, int share) {
    if (from == nullptr) return;
#pragma GCC unroll 8
    for (int i = 0; i < lines; ++i) __builtin_prefetch(from + (share * lines + i) * kLineBytes);
  }
};

/// What becomes of a unit's sums.
template <int kRowTiles>
struct UnitSums {
  alignas(64) float low[kRowTiles][2][kSumsOfTile];  ///< Of low digits: [tile][block][slot][16]
  float* acc[kRowTiles];  ///< First row's of each tile, of the first block.
  int count[kRowTiles];   ///< Rows of each tile.
  const TileLows* row_tiles = nullptr;
  const TileLows* lows = nullptr;  ///< The same. Null: no row has a low digit.
  const float* scales = nullptr;   ///< First block's [16]; the second's kBlockScales later.
  int num_blocks = 0;              ///< 0: nothing waits.

  /// `acc_of_row_0`: of the first block.
  HWY_INLINE void begin(const UnitRows<kRowTiles>& rows, int blocks, const float* first_scales,
                        float* acc_of_row_0) {
    for (int t = 0; t < kRowTiles; ++t) {
      acc[t] = acc_of_row_0 + rows.first[t] * kBlockN;
      count[t] = rows.count[t];
    }
    row_tiles = rows.lows;
    lows = rows.has_low() ? rows.lows : nullptr;
    scales = first_scales;
    num_blocks = blocks;
  }
};

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
