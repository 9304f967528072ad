// tile_pipeline-inl.h - products of tiles (tile_unit.h), and what becomes of their sums; included
// per target.
//
//   A    [16 rows][32 k] bf16           main digits (digits.h)
//   B    [16 steps][16 channels][2]     weights of 32 k, bf16
//   C    [16 rows][16 channels] f32     sums of one scale group, whole numbers
//
// A unit is 1 or 2 tiles of rows x 1 or 2 blocks x one scale group: 4 C, 2 A and 2 B are all
// registers there are. Its sums stay in C until the first products of the next unit want that
// register. Then they go through memory to the vector registers, which scale and add them between
// the next products: each takes 16 cycles, in which nothing else waits for it. What later units
// read is asked for there, too, a few lines at a time: where a tile's lines are not in L1, it waits
// for them, and the products behind it with it.
//
// Exact     digits.h says when float32 holds all sums of main digits. Rows for which it may not
//           (TileLows::magnitude) take each 32 k by itself and add them as integers. Low digits
//           meet their weights in vectors, or in tiles where they are many. Their sum is added
//           last, so that each sum is rounded once, as the conversion of an integer is.
// Bound     products: 16 cycles for 16 rows x 16 channels x 32 k.
#if defined(SLUICE_TILE_PIPELINE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_TILE_PIPELINE_INL_H_
#undef SLUICE_TILE_PIPELINE_INL_H_
#else
#define SLUICE_TILE_PIPELINE_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/tile_low-inl.h"
#include "backend/cpu/tile_sums-inl.h"
#include "backend/cpu/tile_unit.h"
#include "backend/cpu/tile_units-inl.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

inline constexpr std::int64_t kExactSum = 1 << 24;

/// Units in turn: products of one, and what is left to do for the one before.
template <class Tiles, int kScales, int kRowTiles>
class TilePipeline {
 public:
  /// `block_acc`: from acc of one block to that of the next.
  TilePipeline(std::int64_t block_acc, int largest_weight)
      : block_acc_(block_acc), largest_weight_(largest_weight) {}

  /// Blocks whose `weights` are kGroupWeights apart, and part `part` of a group; `acc` is row 0's
  /// of the first block.
  template <int kBlocks>
  HWY_NOINLINE void add(const std::uint16_t* weights, const UnitRows<kRowTiles>& rows, int part,
                        const float* scales, float* acc, const Ahead<kRowTiles>& ahead) {
    UnitSums<kRowTiles>& now = units_[next_];
    UnitSums<kRowTiles>& before = units_[next_ ^ 1];
    next_ ^= 1;
    now.begin(rows, kBlocks, scales, acc);
    const bool is_exact = kScales == 4 || rows.magnitude() * largest_weight_ <= kExactSum;
    const bool rolls = kScales == 1 && kBlocks == 2 && is_exact;
    if (in_tiles_ && (!rolls || rows.has_low_tile())) {  // Which needs the registers of C.
      store<2>();
      in_tiles_ = false;
    }
    if (now.lows != nullptr) {
      constexpr int kQuarters = 4 / kScales;
      multiply_low<kBlocks>(tiles_, weights, rows, part * kQuarters, (part + 1) * kQuarters, now);
    }
    if (!rolls || !in_tiles_) ahead.ask();
    if constexpr (kScales == 1 && kBlocks == 2) {
      constexpr int kSteps = kGroup / kTileK;
      if (rolls && in_tiles_) {
        multiply<2, true>(weights, rows.digits, 0, kSteps, Between(before, *this, ahead));
        before.num_blocks = 0;
        return;
      }
      if (rolls) {
        finish(before);
        multiply<2, false>(weights, rows.digits, 0, kSteps, [](int) HWY_ATTR {});
        in_tiles_ = true;
        return;
      }
    }
    if (!is_exact) {
      finish(before);
      return multiply_by_parts<kBlocks>(weights, rows, now);
    }
    constexpr int kSteps = kGroup / kScales / kTileK;
    multiply<kBlocks, false>(weights, rows.digits, part * kSteps, kSteps, [](int) HWY_ATTR {});
    finish(before);
    store<kBlocks>();
  }

  /// What is left of the last unit.
  void finish() {
    if (in_tiles_) store<2>();
    in_tiles_ = false;
    finish(units_[next_ ^ 1]);
  }

 private:
  /// After the `slot`th product of a unit: a share of the rows of the one before, once all its sums
  /// are in memory.
  class Between {
   public:
    HWY_INLINE Between(UnitSums<kRowTiles>& unit, TilePipeline& pipeline,
                       const Ahead<kRowTiles>& ahead)
        : unit_(unit),
          ahead_(ahead),
          sum_(pipeline.sum_[0][0]),
          block_acc_(pipeline.block_acc_),
          pipeline_(pipeline),
          row_tiles_(unit.row_tiles) {
      for (int t = 0; t < kRowTiles; ++t) acc_[t] = unit.acc[t];
      for (int p = 0; p < kParts; ++p) {
        const int at = p * (kRegBytes / 4);
        first_[p] = hn::LoadU(kF32, unit.scales + at);
        second_[p] = hn::LoadU(kF32, unit.scales + kBlockScales + at);
      }
    }
    HWY_INLINE void operator()(int slot) const {
      constexpr int kFirst = kRowTiles * 2, kSlots = 3 * kFirst, kRows = kRowTiles * kTileRows;
      static_assert(kFirst + kSlots == kGroup / kTileK * kRowTiles * 2);
      ahead_.ask(slot, kFirst + kSlots);
      if (slot < kFirst) return;
      if (slot == kFirst && unit_.lows != nullptr) add_low(unit_, pipeline_.sum_);
      const int first_row = (slot - kFirst) * kRows / kSlots;
#pragma GCC unroll 4
      for (int i = first_row; i < (slot - kFirst + 1) * kRows / kSlots; ++i) {
        const int t = i / kTileRows, row = i % kTileRows;
        const VF32 as = hn::Set(kF32, row_tiles_[t].scale[row]);
        const float* const sum = sum_ + (t * 2 * kTileRows + row) * kBlockN;
        float* const acc = acc_[t] + row * kBlockN;
        for (int p = 0; p < kParts; ++p) {
          // Both loads before either store: of 64 rows, blocks are 4096 bytes apart, and a load
          // waits for a store before it whose address ends with the same 12 bits.
          const int at = p * (kRegBytes / 4);
          const VF32 first = scaled_and_added(sum + at, first_[p], as, acc + at);
          const VF32 second =
              scaled_and_added(sum + kSumsOfTile + at, second_[p], as, acc + block_acc_ + at);
          hn::StoreU(first, kF32, acc + at);
          hn::StoreU(second, kF32, acc + block_acc_ + at);
        }
      }
    }

   private:
    UnitSums<kRowTiles>& unit_;
    const Ahead<kRowTiles> ahead_;
    const float* sum_;
    std::int64_t block_acc_;
    TilePipeline& pipeline_;
    const TileLows* row_tiles_;
    float* acc_[kRowTiles];  // Of its own: stores could change the unit's.
    VF32 first_[kParts], second_[kParts];
  };

  void finish(UnitSums<kRowTiles>& unit) {
    if (unit.num_blocks > 0) scale_and_add_all(unit, sum_, block_acc_);
  }

  /// C = products of steps [first, first + num_steps) of 32 k; between(i) after each. kRolls: what
  /// C held before goes to memory.
  template <int kBlocks, bool kRolls, class After>
  HWY_INLINE void multiply(const std::uint16_t* weights,
                           const std::uint8_t* const (&digits)[kRowTiles], int first, int num_steps,
                           const After& between) {
    constexpr std::int64_t kStepBytes = kTileRows * kTileRowBytes;
    int slot = 0;
#pragma GCC unroll 4
    for (int i = 0; i < num_steps; ++i) {
      const std::uint16_t* const b = weights + (first + i) * kTileWeights;
      const std::int64_t k = (first + i) * kStepBytes;
      tiles_.template load<6>(b, kTileRowBytes);
      tiles_.template load<4>(digits[0] + k, kTileRowBytes);
      if (i == 0) begin_sum<0, kRolls>();
      tiles_.template dot<0, 4, 6>();
      between(slot++);
      if constexpr (kBlocks == 2) {
        tiles_.template load<7>(b + kGroupWeights, kTileRowBytes);
        if (i == 0) begin_sum<1, kRolls>();
        tiles_.template dot<1, 4, 7>();
        between(slot++);
      }
      if constexpr (kRowTiles == 2) {
        tiles_.template load<5>(digits[1] + k, kTileRowBytes);
        if (i == 0) begin_sum<2, kRolls>();
        tiles_.template dot<2, 5, 6>();
        between(slot++);
        if constexpr (kBlocks == 2) {
          if (i == 0) begin_sum<3, kRolls>();
          tiles_.template dot<3, 5, 7>();
          between(slot++);
        }
      }
    }
  }

  template <int kTile, bool kRolls>
  HWY_INLINE void begin_sum() {
    if constexpr (kRolls) tiles_.template store<kTile>(sum_[kTile / 2][kTile % 2]);
    tiles_.template zero<kTile>();
  }

  template <int kBlocks>
  HWY_INLINE void store() {
    tiles_.template store<0>(sum_[0][0]);
    if constexpr (kBlocks == 2) tiles_.template store<1>(sum_[0][1]);
    if constexpr (kRowTiles == 2) {
      tiles_.template store<2>(sum_[1][0]);
      if constexpr (kBlocks == 2) tiles_.template store<3>(sum_[1][1]);
    }
  }

  /// The unit's sums, where float32 might not hold them: as integers, of 32 k at a time.
  template <int kBlocks>
  HWY_NOINLINE void multiply_by_parts(const std::uint16_t* weights, const UnitRows<kRowTiles>& rows,
                                      UnitSums<kRowTiles>& unit) {
    IntegerSums<kRowTiles> total;
    for (int step = 0; step < kGroup / kTileK; ++step) {
      multiply<kBlocks, false>(weights, rows.digits, step, 1, [](int) HWY_ATTR {});
      store<kBlocks>();
      total.add(unit, sum_);
    }
    if (unit.lows != nullptr) total.add_low(unit);
    unit.lows = nullptr;
    total.store(unit, sum_);
  }

  alignas(64) float sum_[kRowTiles][2][kSumsOfTile];  ///< [tile][block]
  UnitSums<kRowTiles> units_[2];
  Tiles tiles_;
  bool in_tiles_ = false;  ///< The last unit's sums have not been stored.
  int next_ = 0;
  std::int64_t block_acc_;
  int largest_weight_;
};

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
