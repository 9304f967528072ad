#include "backend/cpu/tile_rows.h"

#include <bit>
#include <cstring>

namespace sluice::cpu {

void TileLows::fill(const DigitGroup* groups, const std::uint8_t* low, int count) {
  magnitude = 0;
  num_rows = 0;
  int num_pairs = 0;
  for (int row = 0; row < count; ++row) {
    scale[row] = groups[row].scale;
    magnitude = std::max(magnitude, groups[row].magnitude);
    if (groups[row].low != 0) rows[num_rows++] = static_cast<std::uint8_t>(row);
    num_pairs += std::popcount(groups[row].low);
  }
  std::fill(scale + count, scale + kTileRows, 0.0f);
  are_many = num_pairs > kMostPairs;
  if (are_many) {
    num_rows = static_cast<std::uint8_t>(count);
    for (int row = 0; row < count; ++row) rows[row] = static_cast<std::uint8_t>(row);
    return;
  }
  std::uint32_t* pair = pairs;
  for (int slot = 0; slot < num_rows; ++slot) {
    const int row = rows[slot];
    steps[slot] = groups[row].low;
    for (std::uint64_t left = steps[slot]; left != 0; left &= left - 1) {
      std::memcpy(pair++, low + row * kLowDigitBytes + std::countr_zero(left) * 4, 4);
    }
  }
}

}  // namespace sluice::cpu
