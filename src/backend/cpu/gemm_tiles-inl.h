// gemm_tiles-inl.h - many rows where the processor multiplies tiles (tile_unit.h); included per
// target.
//
// Weights of 128 k become signed bytes once for each block, w and 8 * w, in the order of the tiles'
// rows. Rows are cut into tiles. tile_pipeline-inl.h multiplies them, and scales and adds the sums.
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
#include "backend/cpu/tile_pipeline-inl.h"
#include "backend/cpu/tile_unit.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

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
