#include "backend/cpu/tile_unit.h"

#include <bit>

namespace sluice::cpu {
namespace {

float first_of(std::uint32_t pair) {
  return std::bit_cast<float>(pair << 16);
}
float second_of(std::uint32_t pair) {
  return std::bit_cast<float>(pair & 0xffff0000u);
}

}  // namespace

void ScalarTiles::load_rows(int tile, const std::uint8_t* from, std::int64_t stride) {
  for (int row = 0; row < kTileRows; ++row) {
    std::memcpy(tiles_[tile][row], from + row * stride, kTileRowBytes);
  }
}

void ScalarTiles::add_products(Tile& c, const Tile& a, const Tile& b) {
  for (int row = 0; row < kTileRows; ++row) {
    for (int n = 0; n < kTileN; ++n) {
      float sum = std::bit_cast<float>(c[row][n]);
      for (int pair = 0; pair < kTileK / 2; ++pair) {
        sum += first_of(a[row][pair]) * first_of(b[pair][n]);
        sum += second_of(a[row][pair]) * second_of(b[pair][n]);
      }
      c[row][n] = std::bit_cast<std::uint32_t>(sum);
    }
  }
}

}  // namespace sluice::cpu
