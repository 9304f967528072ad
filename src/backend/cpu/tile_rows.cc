#include "backend/cpu/tile_rows.h"

#include <bit>

namespace sluice::cpu {

void TileLows::fill(const DigitGroup* groups, const std::uint8_t* low, int count) {
  magnitude = 0;
  num_rows = 0;
  int digits = 0;
  for (int row = 0; row < count; ++row) {
    scale[row] = groups[row].scale;
    magnitude = std::max(magnitude, groups[row].magnitude);
    if (groups[row].low != 0) rows[num_rows++] = static_cast<std::uint8_t>(row);
    digits += std::popcount(groups[row].low);
  }
  are_many = digits > kMostDigits;
  std::fill_n(begin, 5, std::uint8_t{0});
  if (are_many) {
    num_rows = static_cast<std::uint8_t>(count);
    for (int row = 0; row < count; ++row) rows[row] = static_cast<std::uint8_t>(row);
    return;
  }
  int filled = 0;
  for (int quarter = 0; quarter < 4 && digits > 0; ++quarter) {
    for (int slot = 0; slot < num_rows; ++slot) {
      std::uint64_t steps = groups[rows[slot]].low & (std::uint64_t{0xffff} << (16 * quarter));
      for (; steps != 0; steps &= steps - 1) {
        const int step = std::countr_zero(steps);
        const std::uint8_t* const at = low + rows[slot] * kLowDigitBytes + 2 * step;
        pairs[filled++] = {.slot = static_cast<std::uint8_t>(slot),
                           .step = static_cast<std::uint8_t>(step),
                           .first = static_cast<std::int8_t>(at[0]),
                           .second = static_cast<std::int8_t>(at[1])};
      }
    }
    begin[quarter + 1] = static_cast<std::uint8_t>(filled);
  }
}

}  // namespace sluice::cpu
