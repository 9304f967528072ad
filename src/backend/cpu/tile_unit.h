// tile_unit.h - eight registers of 16 rows x 64 bytes, and products of them.
//
//   C [16][16] f32  +=  A [16][32] bf16  x  B [16][16][2] bf16, of k 2i and 2i + 1 in row i
//
// AmxTiles has them in the processor, ScalarTiles in memory. Both have the same functions, so that
// a kernel written for one runs with the other: packing and layout can be tested on any machine,
// and the processor against a loop. They agree on sums that float32 holds exactly, whatever the
// order of the additions. A kernel makes a unit for one call and one thread. Registers 0 .. 3 are
// C, 4 and 5 are A, 6 and 7 are B.
#pragma once

#include <cstdint>
#include <cstring>

namespace sluice::cpu {

inline constexpr int kTileRows = 16;
inline constexpr int kTileN = 16;
inline constexpr int kTileK = 32;
inline constexpr int kTileRowBytes = 64;

#if defined(__x86_64__)

/// Instructions written out: they run only where cpu_features() says so, and need no flag of the
/// compiler. All but zero() keep their place among accesses to memory, which a kernel has put
/// between them on purpose. The registers are given back at the end: while a thread holds them,
/// each change of context saves 8 KB.
class AmxTiles {
 public:
  /// Of bf16 in vectors (AVX-512 bf16): cpu_features() has it wherever it has these tiles.
  static constexpr bool kHasDots = true;

  AmxTiles() {
    struct alignas(64) Palette {
      std::uint8_t id = 1, start_row = 0, reserved[14]{};
      std::uint16_t row_bytes[16]{};
      std::uint8_t rows[16]{};
    } palette;
    static_assert(sizeof palette == 64);
    for (int tile = 0; tile < 8; ++tile) {
      palette.row_bytes[tile] = kTileRowBytes;
      palette.rows[tile] = kTileRows;
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
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB) : "memory");
  }
  /// Rows of 64 bytes without gaps.
  template <int kTile>
  void store(float* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(std::int64_t{kTileRowBytes}),
                 "i"(kTile)
                 : "memory");
  }
};

#endif

/// The same, one product at a time.
class ScalarTiles {
 public:
  static constexpr bool kHasDots = false;

  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, sizeof tiles_[kTile]);
  }
  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    load_rows(kTile, static_cast<const std::uint8_t*>(from), stride);
  }
  template <int kC, int kA, int kB>
  void dot() {
    add_products(tiles_[kC], tiles_[kA], tiles_[kB]);
  }
  template <int kTile>
  void store(float* to) {
    std::memcpy(to, tiles_[kTile], sizeof tiles_[kTile]);
  }

 private:
  using Tile = std::uint32_t[kTileRows][kTileN];

  void load_rows(int tile, const std::uint8_t* from, std::int64_t stride);
  static void add_products(Tile& c, const Tile& a, const Tile& b);

  Tile tiles_[8]{};
};

/// Beside the processor's dot products of bf16.
class ScalarTilesAndDots : public ScalarTiles {
 public:
  static constexpr bool kHasDots = true;
};

}  // namespace sluice::cpu
