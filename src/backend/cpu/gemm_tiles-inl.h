// gemm_tiles-inl.h - many rows where the processor multiplies tiles (tile_unit.h); included per
// target.
//
//   A    [rows][64 k] int8           a digit of up to 16 rows, DigitLayout::kTiles
//   B    [16 steps][16 channels][4]  weights of 64 k, signed, made once per block and group
//   C    [rows][16 channels] int32   one for each digit and block, of one group
//
// A unit is 2 blocks x up to 16 rows x one scale group: 4 C, 2 A and 2 B are all registers there
// are. Sums of a unit go through memory to the vector registers, which scale and add them while the
// next unit's products are under way.
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

inline constexpr int kTileBytes = kTileK * kTileN;       ///< Of B.
inline constexpr int kGroupWeights = kGroup * kBlockN;   ///< Of one block: two B.
inline constexpr int kSumsOfTile = kTileRows * kBlockN;  ///< Of one C.

/// One block's 128 k as signed bytes. Half a line, 4 k of 16 channels, is a row of B.
template <class Code>
void widen_signed(const std::uint8_t* codes, std::int8_t* wide) {
  const VI8 offset = hn::Set(kI8, std::int8_t{Code::kOffset});
  for (int line = 0; line < kGroupLines; ++line) {
    ByteRegs even, odd;
    PackedLines<Code>{codes}.load(line, even, odd);
    std::int8_t* const to = wide + line * 2 * kLineBytes;
    for (int p = 0; p < kParts; ++p) {
      hn::Store(hn::Sub(hn::BitCast(kI8, even.v[p]), offset), kI8, to + p * kRegBytes);
      hn::Store(hn::Sub(hn::BitCast(kI8, odd.v[p]), offset), kI8, to + kLineBytes + p * kRegBytes);
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

/// What a unit's products leave in memory. `low` only if a row has one.
struct alignas(64) UnitSums {
  std::int32_t mid[2][kSumsOfTile], high[2][kSumsOfTile], low[2][kSumsOfTile];
};

/// Where a unit reads and what becomes of its sums.
struct TileWork {
  const std::int8_t* weights = nullptr;  ///< [blocks][kGroupWeights]
  const std::uint8_t* digits = nullptr;  ///< First row's of the group.
  const std::uint8_t* low = nullptr;     ///< Null: no row has a low digit.
  const DigitGroup* groups = nullptr;    ///< First row's.
  const float* scales = nullptr;         ///< First block's [16]; the second's kBlockScales later.
  float* acc = nullptr;                  ///< First row's of the first block.
  std::int64_t block_acc = 0;            ///< To the second block's.
  int part = 0;                          ///< Of the group's scales.
  int skipped = 0, rows = 0;             ///< Rows [skipped, rows) count.
};
inline constexpr int kBlockScales = 4 * kBlockN;

/// Products of kBlocks blocks and 1 / kScales of a group.
template <int kBlocks, int kScales, class Tiles>
HWY_INLINE void multiply_unit(Tiles& tiles, const TileWork& work, UnitSums& sums) {
  constexpr int kK = kScales == 1 ? kTileK : kGroup / kScales;
  constexpr int kSteps = kGroup / kScales / kK;
  const auto load_weights = [&](int step) HWY_ATTR {
    const std::int8_t* const at = work.weights + (work.part * kSteps + step) * kK * kBlockN;
    tiles.template load<6>(at, kLineBytes);
    if constexpr (kBlocks == 2) tiles.template load<7>(at + kGroupWeights, kLineBytes);
  };
  tiles.template zero<0>();
  tiles.template zero<1>();
  if constexpr (kBlocks == 2) tiles.template zero<2>(), tiles.template zero<3>();
  for (int step = 0; step < kSteps; ++step) {
    const int k = (work.part * kSteps + step) * kK;
    const std::uint8_t* const at = work.digits + k / kTileK * 2 * kTileK + k % kTileK;
    tiles.template load<4>(at, kMainDigitBytes);
    tiles.template load<5>(at + kTileK, kMainDigitBytes);
    load_weights(step);
    tiles.template dot<0, 4, 6>();
    tiles.template dot<1, 5, 6>();
    if constexpr (kBlocks == 2) tiles.template dot<2, 4, 7>(), tiles.template dot<3, 5, 7>();
  }
  tiles.template store<0>(sums.mid[0]);
  tiles.template store<1>(sums.high[0]);
  if constexpr (kBlocks == 2) {
    tiles.template store<2>(sums.mid[1]);
    tiles.template store<3>(sums.high[1]);
  }
  if (work.low == nullptr) return;
  tiles.template zero<0>();
  if constexpr (kBlocks == 2) tiles.template zero<2>();
  for (int step = 0; step < kSteps; ++step) {
    tiles.template load<4>(work.low + (work.part * kSteps + step) * kK, kLowDigitBytes);
    load_weights(step);
    tiles.template dot<0, 4, 6>();
    if constexpr (kBlocks == 2) tiles.template dot<2, 4, 7>();
  }
  tiles.template store<0>(sums.low[0]);
  if constexpr (kBlocks == 2) tiles.template store<2>(sums.low[1]);
}

/// acc += f32(sum) * (ws * as) of one unit.
template <int kBlocks>
HWY_INLINE void add_unit(const TileWork& work, const UnitSums& sums) {
  for (int b = 0; b < kBlocks; ++b) {
    const float* const scales = work.scales + b * kBlockScales + work.part * kBlockN;
    float* const acc = work.acc + b * work.block_acc;
    for (int row = work.skipped; row < work.rows; ++row) {
      const auto load = [&](const std::int32_t* from, int p) HWY_ATTR {
        return hn::Load(kI32, from + row * kBlockN + p * (kRegBytes / 4));
      };
      IntRegs sum;
      for (int p = 0; p < kParts; ++p) {
        const VI32 high = hn::ShiftLeft<kHighShift - kMidShift>(load(sums.high[b], p));
        sum.v[p] = hn::ShiftLeft<kMidShift>(hn::Add(load(sums.mid[b], p), high));
        if (work.low != nullptr) sum.v[p] = hn::Add(sum.v[p], load(sums.low[b], p));
      }
      scale_and_add(sum, 0, work.groups[row].scale, scales, acc + row * kBlockN);
    }
  }
}

/// Units in turn: products of one, then what is left to do for the one before.
template <class Tiles, int kScales>
class TilePipeline {
 public:
  explicit TilePipeline(const TileShape& shape) : tiles_(shape) {}

  template <int kBlocks>
  HWY_INLINE void add(const TileWork& work) {
    multiply_unit<kBlocks, kScales>(tiles_, work, sums_[next_ % 2]);
    finish();
    waiting_ = work;
    num_waiting_ = kBlocks;
    ++next_;
  }
  HWY_INLINE void finish() {
    const UnitSums& sums = sums_[(next_ + 1) % 2];
    if (num_waiting_ == 2) add_unit<2>(waiting_, sums);
    if (num_waiting_ == 1) add_unit<1>(waiting_, sums);
    num_waiting_ = 0;
  }

 private:
  UnitSums sums_[2];
  Tiles tiles_;
  TileWork waiting_;
  int next_ = 0, num_waiting_ = 0;
};

/// Blocks whose weights are wide at once: as many as let a group's digits, read for each two of
/// them, stay in L1 beside the weights and the outputs.
inline constexpr int kTileBlocks = 4;

/// A group of up to kTileBlocks blocks with all rows.
template <class Tiles, int kScales>
void add_group_tiles(TilePipeline<Tiles, kScales>& pipeline, const RowTiles& row_tiles,
                     const DigitRows& x, std::int64_t group, const std::int8_t* wide,
                     const float* scales, int num_blocks, float* acc) {
  const std::int64_t block_acc = std::int64_t{x.rows} * kBlockN;
  for (int t = 0; t < row_tiles.count; ++t) {
    const int first = row_tiles.first(t);
    const std::int64_t at = group * x.rows + first;
    TileWork work{.digits = x.digits + at * kMainDigitBytes,
                  .groups = x.groups + at,
                  .block_acc = block_acc,
                  .skipped = row_tiles.skipped(t),
                  .rows = row_tiles.height};
    std::uint64_t low = 0;
    for (int row = work.skipped; row < work.rows; ++row) low |= work.groups[row].low;
    if (low != 0) work.low = x.low + at * kLowDigitBytes;
    for (int b = 0; b < num_blocks; b += 2) {
      work.weights = wide + b * kGroupWeights;
      work.scales = scales + b * kBlockScales;
      work.acc = acc + b * block_acc + std::int64_t{first} * kBlockN;
      for (work.part = 0; work.part < kScales; ++work.part) {
        if (b + 1 < num_blocks) {
          pipeline.template add<2>(work);
        } else {
          pipeline.template add<1>(work);
        }
      }
    }
  }
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
      {.rows = row_tiles.height, .k = kScales == 1 ? kTileK : kGroup / kScales});
  alignas(64) std::int8_t wide[kTileBlocks * kGroupWeights];
  // Of two groups: the last unit of one is scaled after the scales of the next are there.
  alignas(64) float scales[2][kTileBlocks * kBlockScales];
  for (int b0 = 0; b0 < tile.num_blocks; b0 += kTileBlocks) {
    const int num_blocks = std::min(kTileBlocks, tile.num_blocks - b0);
    for (std::int64_t g = 0; g < num_groups; ++g) {
      float* const group_scales = scales[g % 2];
      for (int b = 0; b < num_blocks; ++b) {
        const std::int64_t at = (tile.first_block + b0 + b) * num_groups + g;
        const std::uint8_t* const codes = m.codes + at * kGroupLines * kLineBytes;
        prefetch(codes + kGroupLines * kLineBytes);
        load_scales(m, at * kScales, kScales, group_scales + b * kBlockScales);
        widen_signed<Code>(codes, wide + b * kGroupWeights);
      }
      add_group_tiles<Tiles, kScales>(pipeline, row_tiles, x, g, wide, group_scales, num_blocks,
                                      tile.acc + b0 * block_acc);
    }
    pipeline.finish();
  }
}

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
