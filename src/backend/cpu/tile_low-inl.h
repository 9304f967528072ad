// tile_low-inl.h - what low digits (tile_rows.h) add to the sums of a unit; included per target.
#if defined(SLUICE_TILE_LOW_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_TILE_LOW_INL_H_
#undef SLUICE_TILE_LOW_INL_H_
#else
#define SLUICE_TILE_LOW_INL_H_
#endif

#include <hwy/highway.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/tile_rows.h"
#include "backend/cpu/tile_unit.h"
#include "backend/cpu/tile_units-inl.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

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

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
