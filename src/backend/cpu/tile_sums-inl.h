// tile_sums-inl.h - the unit of work of tile_pipeline-inl.h, and what becomes of its sums; included
// per target.
#if defined(SLUICE_TILE_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_TILE_SUMS_INL_H_
#undef SLUICE_TILE_SUMS_INL_H_
#else
#define SLUICE_TILE_SUMS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

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

/// acc + sum * (ws * as)
HWY_INLINE VF32 scaled_and_added(const float* sum, VF32 scales, VF32 as, const float* acc) {
  const VF32 product = hn::Mul(hn::Load(kF32, sum), hn::Mul(scales, as));
  return hn::Add(hn::LoadU(kF32, acc), product);
}

/// sum[channel] += w * digit for both k of a step: `weights` of its 16 channels, `pair` of a row.
template <bool kHasDots>
HWY_INLINE void add_pair(const std::uint16_t* weights, std::uint32_t pair, VF32 (&sum)[kParts]) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kHasDots) {
    const __m512i digits = _mm512_set1_epi32(static_cast<int>(pair));
    asm("vdpbf16ps %2, %1, %0"
        : "+v"(sum[0].raw)
        : "v"(digits), "m"(*reinterpret_cast<const __m512i*>(weights)));
    return;
  }
#endif
  const hn::Repartition<std::uint32_t, TagF32> u32;
  const VF32 first = hn::Set(kF32, std::bit_cast<float>(pair << 16));
  const VF32 second = hn::Set(kF32, std::bit_cast<float>(pair & 0xffff0000u));
  for (int p = 0; p < kParts; ++p) {
    const int at = p * (kRegBytes / 4);
    const auto both =
        hn::BitCast(u32, hn::Load(kF32, reinterpret_cast<const float*>(weights) + at));
    const VF32 w0 = hn::BitCast(kF32, hn::ShiftLeft<16>(both));
    const VF32 w1 = hn::BitCast(kF32, hn::And(both, hn::Set(u32, 0xffff0000u)));
    sum[p] = hn::Add(sum[p], hn::Add(hn::Mul(w0, first), hn::Mul(w1, second)));
  }
}

/// Low digits of all rows of tile `t` with steps [first, last) of 32 k, as a tile. Uses all C.
template <int kBlocks, class Tiles, int kRowTiles>
HWY_NOINLINE void multiply_low_tile(Tiles& tiles, const std::uint16_t* weights,
                                    const UnitRows<kRowTiles>& rows, int t, int first, int last,
                                    UnitSums<kRowTiles>& unit) {
  alignas(64) std::uint8_t digits[kTileRows * kLowDigitBytes];
  for (int row = 0; row < rows.count[t]; ++row) {
    std::uint8_t* const to = digits + row * kLowDigitBytes;
    if (rows.groups[t][row].low != 0) {
      std::memcpy(to, rows.low[t] + row * kLowDigitBytes, kLowDigitBytes);
    } else {
      std::memset(to, 0, kLowDigitBytes);
    }
  }
  std::memset(digits + rows.count[t] * kLowDigitBytes, 0,
              static_cast<std::size_t>(kTileRows - rows.count[t]) * kLowDigitBytes);
  tiles.template zero<0>(), tiles.template zero<1>();
  for (int i = first; i < last; ++i) {
    tiles.template load<4>(digits + i * kTileRowBytes, kLowDigitBytes);
    tiles.template load<6>(weights + i * kTileWeights, kTileRowBytes);
    tiles.template dot<0, 4, 6>();
    if constexpr (kBlocks == 2) {
      tiles.template load<7>(weights + kGroupWeights + i * kTileWeights, kTileRowBytes);
      tiles.template dot<1, 4, 7>();
    }
  }
  tiles.template store<0>(unit.low[t][0]);
  if constexpr (kBlocks == 2) tiles.template store<1>(unit.low[t][1]);
}

/// unit.low of one tile, slot by slot, of the steps in `part`.
template <int kBlocks, bool kHasDots>
HWY_INLINE void multiply_pairs(const std::uint16_t* weights, const TileLows& lows,
                               std::uint64_t part, float (&low)[2][kSumsOfTile]) {
  const std::uint32_t* pair = lows.pairs;
  for (int slot = 0; slot < lows.num_rows; ++slot) {
    VF32 sum[kBlocks][kParts];
    for (int b = 0; b < kBlocks; ++b) {
      for (int p = 0; p < kParts; ++p) sum[b][p] = hn::Zero(kF32);
    }
    for (std::uint64_t left = lows.steps[slot]; left != 0; left &= left - 1, ++pair) {
      const int step = std::countr_zero(left);
      if ((part >> step & 1) == 0) continue;
      const std::uint16_t* const at = weights + step * 2 * kBlockN;
      for (int b = 0; b < kBlocks; ++b) add_pair<kHasDots>(at + b * kGroupWeights, *pair, sum[b]);
    }
    for (int b = 0; b < kBlocks; ++b) {
      for (int p = 0; p < kParts; ++p) {
        hn::Store(sum[b][p], kF32, low[b] + slot * kBlockN + p * (kRegBytes / 4));
      }
    }
  }
}

/// unit.low of quarters [first, last) of a group.
template <int kBlocks, class Tiles, int kRowTiles>
HWY_NOINLINE void multiply_low(Tiles& tiles, const std::uint16_t* weights,
                               const UnitRows<kRowTiles>& rows, int first, int last,
                               UnitSums<kRowTiles>& unit) {
  const std::uint64_t part = ~std::uint64_t{0} >> (64 - 16 * (last - first)) << (16 * first);
  for (int t = 0; t < kRowTiles; ++t) {
    if (rows.lows[t].are_many) {
      multiply_low_tile<kBlocks>(tiles, weights, rows, t, first, last, unit);
    } else {
      multiply_pairs<kBlocks, Tiles::kHasDots>(weights, rows.lows[t], part, unit.low[t]);
    }
  }
}

/// sum += low, row by row.
template <int kRowTiles>
HWY_NOINLINE void add_low(UnitSums<kRowTiles>& unit, float (&sums)[kRowTiles][2][kSumsOfTile]) {
  for (int t = 0; t < kRowTiles; ++t) {
    const TileLows& lows = unit.lows[t];
    for (int slot = 0; slot < lows.num_rows; ++slot) {
      for (int b = 0; b < unit.num_blocks; ++b) {
        float* const sum = sums[t][b] + lows.rows[slot] * kBlockN;
        const float* const low = unit.low[t][b] + slot * kBlockN;
        for (int p = 0; p < kParts; ++p) {
          const int at = p * (kRegBytes / 4);
          hn::Store(hn::Add(hn::Load(kF32, sum + at), hn::Load(kF32, low + at)), kF32, sum + at);
        }
      }
    }
  }
  unit.lows = nullptr;
}

/// acc += sum * (ws * as) of all rows, and nothing waits any more.
template <int kRowTiles>
HWY_NOINLINE void scale_and_add_all(UnitSums<kRowTiles>& unit,
                                    float (&sums)[kRowTiles][2][kSumsOfTile],
                                    std::int64_t block_acc) {
  if (unit.lows != nullptr) add_low(unit, sums);
  for (int b = 0; b < unit.num_blocks; ++b) {
    for (int i = 0; i < kRowTiles * kTileRows; ++i) {
      const int t = i / kTileRows, row = i % kTileRows;
      if (row >= unit.count[t]) continue;
      const VF32 as = hn::Set(kF32, unit.row_tiles[t].scale[row]);
      for (int p = 0; p < kParts; ++p) {
        const int at = p * (kRegBytes / 4);
        const VF32 scales = hn::LoadU(kF32, unit.scales + b * kBlockScales + at);
        float* const acc = unit.acc[t] + b * block_acc + row * kBlockN + at;
        hn::StoreU(scaled_and_added(sums[t][b] + row * kBlockN + at, scales, as, acc), kF32, acc);
      }
    }
  }
  unit.num_blocks = 0;
}

/// Of one unit, where float32 might not hold them.
template <int kRowTiles>
class IntegerSums {
 public:
  using Sums = float[kRowTiles][2][kSumsOfTile];

  void add(const UnitSums<kRowTiles>& unit, const Sums& sums) {
    for (int t = 0; t < kRowTiles; ++t) {
      for (int b = 0; b < unit.num_blocks; ++b) {
        const float* const from = sums[t][b];
        std::int32_t* const to = total_[t][b];
        for (int i = 0; i < unit.count[t] * kBlockN; ++i) {
          to[i] += static_cast<std::int32_t>(from[i]);
        }
      }
    }
  }
  void add_low(const UnitSums<kRowTiles>& unit) {
    for (int t = 0; t < kRowTiles; ++t) {
      const TileLows& lows = unit.lows[t];
      for (int i = 0; i < lows.num_rows * kBlockN; ++i) {
        const int at = lows.rows[i / kBlockN] * kBlockN + i % kBlockN;
        for (int b = 0; b < unit.num_blocks; ++b) {
          total_[t][b][at] += static_cast<std::int32_t>(unit.low[t][b][i]);
        }
      }
    }
  }
  void store(const UnitSums<kRowTiles>& unit, Sums& sums) const {
    for (int t = 0; t < kRowTiles; ++t) {
      for (int b = 0; b < unit.num_blocks; ++b) {
        const std::int32_t* const from = total_[t][b];
        float* const to = sums[t][b];
        for (int i = 0; i < unit.count[t] * kBlockN; ++i) to[i] = static_cast<float>(from[i]);
      }
    }
  }

 private:
  std::int32_t total_[kRowTiles][2][kSumsOfTile] = {};
};

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
