// tile_sums-inl.h - what becomes of the sums of a unit; included per target.
#if defined(SLUICE_TILE_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_TILE_SUMS_INL_H_
#undef SLUICE_TILE_SUMS_INL_H_
#else
#define SLUICE_TILE_SUMS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/tile_low-inl.h"
#include "backend/cpu/tile_unit.h"
#include "backend/cpu/tile_units-inl.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

/// acc + sum * (ws * as)
HWY_INLINE VF32 scaled_and_added(const float* sum, VF32 scales, VF32 as, const float* acc) {
  const VF32 product = hn::Mul(hn::Load(kF32, sum), hn::Mul(scales, as));
  return hn::Add(hn::LoadU(kF32, acc), product);
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
