// tile_pipeline-inl.h - products of tiles (tile_unit.h), and what becomes of their sums; included
// per target.
//
//   A    [rows][64 k] int8           a digit of up to 16 rows, DigitLayout::kTiles
//   B    [16 steps][16 channels][4]  weights of 64 k, signed
//   C    [rows][16 channels] int32   mid and low digits together, high digits: of one group
//
// Mid and high digits meet 8 * w, low ones w, so that low ones are added where mid ones are. A unit
// is 2 blocks x up to 16 rows x one scale group: 4 C, 2 A and 2 B are all registers there are. Its
// sums go through memory to the vector registers, which scale and add them while the next unit's
// products are under way.
//
// Bound     products: two of bytes for each weight and row, three for units with a low digit.
#if defined(SLUICE_TILE_PIPELINE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_TILE_PIPELINE_INL_H_
#undef SLUICE_TILE_PIPELINE_INL_H_
#else
#define SLUICE_TILE_PIPELINE_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "backend/cpu/digits.h"
#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/tile_unit.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

inline constexpr int kGroupWeights = kGroup * kBlockN;   ///< Of one block: two B.
inline constexpr int kSumsOfTile = kTileRows * kBlockN;  ///< Of one C.
inline constexpr int kBlockScales = 4 * kBlockN;

/// Weights of kTileBlocks blocks and one group.
struct WideBlocks {
  const std::int8_t* eight = nullptr;  ///< [block][kGroupWeights], times 8.
  const std::int8_t* one = nullptr;    ///< The same times 1. Null: no row has a low digit.
};

/// Digits of a unit's rows.
struct TileDigits {
  const std::uint8_t* main = nullptr;
  const std::uint8_t* low = nullptr;  ///< Null: none is other than zero.
};

/// What becomes of a unit's sums.
struct TileSums {
  const DigitGroup* groups = nullptr;  ///< First row's.
  const float* scales = nullptr;       ///< First block's [16]; the second's kBlockScales later.
  float* acc = nullptr;                ///< First row's of the first block.
  int first = 0, rows = 0;             ///< Rows [first, rows) count.
};

/// Units in turn: products of one, then what is left to do for the one before.
template <class Tiles, int kScales>
class TilePipeline {
 public:
  /// `block_acc`: from acc of one block to that of the next.
  TilePipeline(const TileShape& shape, std::int64_t block_acc)
      : tiles_(shape), block_acc_(block_acc) {}

  /// kBlocks blocks and part `part` of a group.
  template <int kBlocks>
  HWY_INLINE void add(const WideBlocks& weights, const TileDigits& digits, int part,
                      const TileSums& sums) {
    multiply<kBlocks>(weights, digits, part);
    finish();
    waiting_.groups = sums.groups;
    waiting_.scales = sums.scales;
    waiting_.acc = sums.acc;
    waiting_.first = sums.first;
    waiting_.rows = sums.rows;
    num_waiting_ = kBlocks;
    tiles_.template store<0>(sums_[0][0]);
    tiles_.template store<1>(sums_[0][1]);
    if constexpr (kBlocks == 2) {
      tiles_.template store<2>(sums_[1][0]);
      tiles_.template store<3>(sums_[1][1]);
    }
  }

  /// acc += f32(sum) * (ws * as) of the unit before.
  HWY_INLINE void finish() {
    for (int b = 0; b < num_waiting_; ++b) {
      const std::int32_t* const mid = sums_[b][0];
      const std::int32_t* const high = sums_[b][1];
      const float* const scales = waiting_.scales + b * kBlockScales;
      const DigitGroup* const groups = waiting_.groups;
      float* const acc = waiting_.acc + b * block_acc_;
      const int rows = waiting_.rows;
      for (int row = waiting_.first; row < rows; ++row) {
        IntRegs sum;
        for (int p = 0; p < kParts; ++p) {
          const int at = row * kBlockN + p * (kRegBytes / 4);
          sum.v[p] = hn::Add(hn::ShiftLeft<kHighShift - kMidShift>(hn::Load(kI32, high + at)),
                             hn::Load(kI32, mid + at));
        }
        scale_and_add(sum, 0, groups[row].scale, scales, acc + row * kBlockN);
      }
    }
    num_waiting_ = 0;
  }

 private:
  template <int kBlocks>
  HWY_INLINE void multiply(const WideBlocks& weights, const TileDigits& digits, int part) {
    constexpr int kK = kScales == 1 ? kTileK : kGroup / kScales;
    constexpr int kSteps = kGroup / kScales / kK;
    const auto load_weights = [&](const std::int8_t* from, int k) HWY_ATTR {
      tiles_.template load<6>(from + k * kBlockN, kLineBytes);
      if constexpr (kBlocks == 2) {
        tiles_.template load<7>(from + k * kBlockN + kGroupWeights, kLineBytes);
      }
    };
    tiles_.template zero<0>(), tiles_.template zero<1>();
    if constexpr (kBlocks == 2) tiles_.template zero<2>(), tiles_.template zero<3>();
    for (int step = 0; step < kSteps; ++step) {
      const int k = (part * kSteps + step) * kK;
      const std::uint8_t* const at = digits.main + k / kTileK * 2 * kTileK + k % kTileK;
      tiles_.template load<4>(at, kMainDigitBytes);
      load_weights(weights.eight, k);
      tiles_.template load<5>(at + kTileK, kMainDigitBytes);
      tiles_.template dot<0, 4, 6>();
      if constexpr (kBlocks == 2) tiles_.template dot<2, 4, 7>();
      tiles_.template dot<1, 5, 6>();
      if constexpr (kBlocks == 2) tiles_.template dot<3, 5, 7>();
      if (digits.low == nullptr) continue;
      tiles_.template load<4>(digits.low + k, kLowDigitBytes);
      load_weights(weights.one, k);
      tiles_.template dot<0, 4, 6>();
      if constexpr (kBlocks == 2) tiles_.template dot<2, 4, 7>();
    }
  }

  alignas(64) std::int32_t sums_[2][2][kSumsOfTile];  ///< [block][mid, high]
  Tiles tiles_;
  TileSums waiting_;
  std::int64_t block_acc_;
  int num_waiting_ = 0;
};

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
