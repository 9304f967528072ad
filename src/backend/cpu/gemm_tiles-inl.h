// gemm_tiles-inl.h - many rows where the processor multiplies tiles (tile_unit.h); included per
// target.
//
//   A    [rows][64 k] int8           a digit of up to 16 rows, DigitLayout::kTiles
//   B    [16 steps][16 channels][4]  weights of 64 k, signed, made once per block and group
//   C    [rows][16 channels] int32   mid and low digits together, high digits: of one group
//
// Mid and high digits meet 8 * w, low ones w, so that low ones are added where mid ones are. A unit
// is 2 blocks x up to 16 rows x one scale group: 4 C, 2 A and 2 B are all registers there are. Its
// sums go through memory to the vector registers, which scale and add them while the next unit's
// products are under way.
//
// Bound     products: two of bytes for each weight and row, three for units with a low digit.
#if defined(SLUICE_GEMM_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_GEMM_TILES_INL_H_
#undef SLUICE_GEMM_TILES_INL_H_
#else
#define SLUICE_GEMM_TILES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/gemm_tile.h"
#include "backend/cpu/tile_unit.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

inline constexpr int kGroupWeights = kGroup * kBlockN;   ///< Of one block: two B.
inline constexpr int kSumsOfTile = kTileRows * kBlockN;  ///< Of one C.

/// One block's 128 k as signed bytes, times 2^kShift. Half a line, 4 k of 16 channels, is a row of
/// B.
template <class Code, int kShift>
void widen_signed(const std::uint8_t* codes, std::int8_t* wide) {
  static_assert((Code::kLargest << kShift) < 256 && (Code::kOffset << kShift) <= 128);
  const hn::Repartition<std::uint16_t, TagU8> u16;
  const VI8 offset = hn::Set(kI8, static_cast<std::int8_t>(Code::kOffset << kShift));
  const auto put = [&](VU8 bytes, std::int8_t* to) HWY_ATTR {
    const VU8 shifted = hn::BitCast(kU8, hn::ShiftLeft<kShift>(hn::BitCast(u16, bytes)));
    hn::Store(hn::Sub(hn::BitCast(kI8, shifted), offset), kI8, to);
  };
  for (int line = 0; line < kGroupLines; ++line) {
    ByteRegs even, odd;
    PackedLines<Code>{codes}.load(line, even, odd);
    std::int8_t* const to = wide + line * 2 * kLineBytes;
    for (int p = 0; p < kParts; ++p) {
      put(even.v[p], to + p * kRegBytes);
      put(odd.v[p], to + kLineBytes + p * kRegBytes);
    }
  }
}

/// Rows cut into tiles of one height. The last tile ends with the last row, and leaves out rows at
/// its beginning that the one before had.
struct RowTiles {
  explicit RowTiles(int num_rows)
      : rows(num_rows),
        count((num_rows + kTileRows - 1) / kTileRows),
        height((num_rows + count - 1) / count) {}
  [[nodiscard]] int first(int tile) const { return std::min(tile * height, rows - height); }
  [[nodiscard]] int skipped(int tile) const { return tile * height - first(tile); }
  int rows, count, height;
};

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

/// Blocks whose weights are wide at once: as many as let a group's digits, read for each two of
/// them, stay in L1 beside the weights and the outputs.
inline constexpr int kTileBlocks = 4;

/// A group of up to kTileBlocks blocks with all rows.
template <class Tiles, int kScales>
void add_group_tiles(TilePipeline<Tiles, kScales>& pipeline, const RowTiles& row_tiles,
                     const DigitRows& x, std::int64_t group, const WideBlocks& wide,
                     const float* scales, int num_blocks, float* acc) {
  const std::int64_t block_acc = std::int64_t{x.rows} * kBlockN;
  for (int t = 0; t < row_tiles.count; ++t) {
    const int first = row_tiles.first(t);
    const std::int64_t at = group * x.rows + first;
    TileDigits digits{.main = x.digits + at * kMainDigitBytes};
    TileSums sums{.groups = x.groups + at, .first = row_tiles.skipped(t), .rows = row_tiles.height};
    std::uint64_t low = 0;
    for (int row = sums.first; row < sums.rows; ++row) low |= sums.groups[row].low;
    if (low != 0) digits.low = x.low + at * kLowDigitBytes;
    for (int b = 0; b < num_blocks; b += 2) {
      const WideBlocks weights{wide.eight + b * kGroupWeights, wide.one + b * kGroupWeights};
      sums.acc = acc + b * block_acc + std::int64_t{first} * kBlockN;
      for (int part = 0; part < kScales; ++part) {
        sums.scales = scales + b * kBlockScales + part * kBlockN;
        if (b + 1 < num_blocks) {
          pipeline.template add<2>(weights, digits, part, sums);
        } else {
          pipeline.template add<1>(weights, digits, part, sums);
        }
      }
    }
  }
}

[[nodiscard]] inline bool any_low(const DigitRows& x, std::int64_t group) {
  std::uint64_t low = 0;
  for (int row = 0; row < x.rows; ++row) low |= x.groups[group * x.rows + row].low;
  return low != 0;
}

/// acc of the whole tile. prefetch(codes): asks for a block's 128 k at `codes`.
template <class Tiles, class Code, int kScales, class Prefetch>
void gemm_tile_tiles(const GemmTile& tile, const Prefetch& prefetch) {
  const PreparedMatrix& m = *tile.weights;
  const DigitRows& x = tile.x;
  const std::int64_t num_groups = m.k / kGroup;
  const std::int64_t block_acc = std::int64_t{x.rows} * kBlockN;
  std::fill_n(tile.acc, tile.num_blocks * block_acc, 0.0f);
  const RowTiles row_tiles(x.rows);
  TilePipeline<Tiles, kScales> pipeline(
      {.rows = row_tiles.height, .k = kScales == 1 ? kTileK : kGroup / kScales}, block_acc);
  alignas(64) std::int8_t eight[kTileBlocks * kGroupWeights], one[kTileBlocks * kGroupWeights];
  // Of two groups: the last unit of one is scaled after the scales of the next are there.
  alignas(64) float scales[2][kTileBlocks * kBlockScales];
  for (int b0 = 0; b0 < tile.num_blocks; b0 += kTileBlocks) {
    const int num_blocks = std::min(kTileBlocks, tile.num_blocks - b0);
    for (std::int64_t g = 0; g < num_groups; ++g) {
      float* const group_scales = scales[g % 2];
      const bool has_low = any_low(x, g);
      for (int b = 0; b < num_blocks; ++b) {
        const std::int64_t at = (tile.first_block + b0 + b) * num_groups + g;
        const std::uint8_t* const codes = m.codes + at * kGroupLines * kLineBytes;
        prefetch(codes + kGroupLines * kLineBytes);
        load_scales(m, at * kScales, kScales, group_scales + b * kBlockScales);
        widen_signed<Code, kMidShift>(codes, eight + b * kGroupWeights);
        if (has_low) widen_signed<Code, 0>(codes, one + b * kGroupWeights);
      }
      add_group_tiles<Tiles, kScales>(pipeline, row_tiles, x, g, {eight, one}, group_scales,
                                      num_blocks, tile.acc + b0 * block_acc);
    }
    pipeline.finish();
  }
}

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
