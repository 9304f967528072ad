// tile_rows.h - how rows are cut into tiles (tile_unit.h), and what a tile's rows have besides the
// digits that it multiplies: scales, and low digits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/cpu/digits.h"
#include "backend/cpu/tile_unit.h"

namespace sluice::cpu {

inline constexpr int kTileDigitBytes = kTileRows * kMainDigitBytes;  ///< Of one tile and group.

/// 1, 2 or 4 tiles of 16 rows. The last rows may not count: they are computed like all others, from
/// whatever lies there, which takes less time than a way of their own, and nobody looks at them.
struct RowTiles {
  explicit RowTiles(int num_rows)
      : rows(num_rows),
        count(num_rows <= kTileRows       ? 1
              : num_rows <= 2 * kTileRows ? 2
                                          : 4) {}
  [[nodiscard]] int rows_of(int tile) const {
    return std::clamp(rows - tile * kTileRows, 0, kTileRows);
  }
  /// Rows with those that do not count.
  [[nodiscard]] int padded() const { return count * kTileRows; }
  int rows, count;
};

/// Of one tile's rows and one group. Products with main digits alone are what tiles multiply. Low
/// digits are few: the two of a step meet its weights in vectors. Where they are many, they are a
/// tile of their own.
struct TileLows {
  static constexpr int kMostPairs = 64;
  float scale[kTileRows]{};    ///< DigitGroup::scale of each row; of those that do not count, 0.
  std::int32_t magnitude = 0;  ///< The largest of the rows.
  bool are_many = false;  ///< Then `rows` has all rows of the tile, `steps` and `pairs` nothing.
  std::uint8_t num_rows = 0;          ///< That have a low digit.
  std::uint8_t rows[kTileRows]{};     ///< Of each slot, in the tile.
  std::uint64_t steps[kTileRows]{};   ///< Of each slot: DigitGroup::low of its row.
  std::uint32_t pairs[kMostPairs]{};  ///< Of each slot, of each of its steps: two bf16.

  /// Of a tile of `count` rows; `groups` and `low` (kLowDigitBytes apart) are the first one's.
  void fill(const DigitGroup* groups, const std::uint8_t* low, int count);
};

}  // namespace sluice::cpu
