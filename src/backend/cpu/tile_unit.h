// tile_unit.h - eight registers of up to 16 rows x 64 bytes, and products of them.
//
//   C [rows][16] int32  +=  A [rows][k] int8  x  B [k / 4][16][4] int8       k = 64 or 32
//
// AmxTiles has them in the processor, ScalarTiles in memory. Both have the same functions, so that
// a kernel written for one runs with the other: packing and layout can be tested on any machine,
// and the processor against a loop. A kernel makes a unit for one call and one thread. Registers
// 0 .. 3 are C, 4 and 5 are A, 6 and 7 are B.
#pragma once

#include <cstdint>
#include <cstring>

namespace sluice::cpu {

inline constexpr int kTileRows = 16;
inline constexpr int kTileN = 16;
inline constexpr int kTileK = 64;

struct TileShape {
  int rows = kTileRows;  ///< Of A and C.
  int k = kTileK;
};

/// Rows and bytes of a row of register `tile`.
struct TileExtent {
  int rows = 0, row_bytes = 0;
};
constexpr TileExtent tile_extent(const TileShape& shape, int tile) {
  if (tile < 4) return {shape.rows, kTileN * 4};
  return tile < 6 ? TileExtent{shape.rows, shape.k} : TileExtent{shape.k / 4, kTileN * 4};
}

#if defined(__x86_64__)

/// Instructions written out: they run only where cpu_features() says so, and need no flag of the
/// compiler. The registers are given back at the end: while a thread holds them, each change of
/// context saves 8 KB.
class AmxTiles {
 public:
  explicit AmxTiles(const TileShape& shape) {
    struct alignas(64) Palette {
      std::uint8_t id = 1, start_row = 0, reserved[14]{};
      std::uint16_t row_bytes[16]{};
      std::uint8_t rows[16]{};
    } palette;
    static_assert(sizeof palette == 64);
    for (int tile = 0; tile < 8; ++tile) {
      const TileExtent extent = tile_extent(shape, tile);
      palette.row_bytes[tile] = static_cast<std::uint16_t>(extent.row_bytes);
      palette.rows[tile] = static_cast<std::uint8_t>(extent.rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(palette));
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }

  template <int kTile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  /// Rows `stride` bytes apart.
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  void dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  /// Rows of 64 bytes without gaps.
  template <int kTile>
  void store(std::int32_t* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(std::int64_t{64}), "i"(kTile)
                 : "memory");
  }
};

#endif

/// The same, one product at a time.
class ScalarTiles {
 public:
  explicit ScalarTiles(const TileShape& shape) : shape_(shape) {}

  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof tiles_[kTile]);
  }
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    const TileExtent extent = tile_extent(shape_, kTile);
    zero<kTile>();  // As AMX does, beyond the extent.
    for (int row = 0; row < extent.rows; ++row) {
      std::memcpy(tiles_[kTile][row], static_cast<const std::uint8_t*>(from) + row * stride,
                  static_cast<std::size_t>(extent.row_bytes));
    }
  }
  template <int kC, int kA, int kB>
  void dot() {
    for (int row = 0; row < shape_.rows; ++row) {
      for (int n = 0; n < kTileN; ++n) {
        std::int32_t sum = 0;
        std::memcpy(&sum, &tiles_[kC][row][4 * n], 4);
        for (int k = 0; k < shape_.k; ++k) {
          sum += std::int32_t{tiles_[kA][row][k]} * tiles_[kB][k / 4][4 * n + k % 4];
        }
        std::memcpy(&tiles_[kC][row][4 * n], &sum, 4);
      }
    }
  }
  template <int kTile>
  void store(std::int32_t* to) {
    const TileExtent extent = tile_extent(shape_, kTile);
    std::memcpy(to, tiles_[kTile], static_cast<std::size_t>(extent.rows * extent.row_bytes));
  }

 private:
  TileShape shape_;
  std::int8_t tiles_[8][kTileRows][64]{};
};

}  // namespace sluice::cpu
