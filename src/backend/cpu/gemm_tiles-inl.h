// gemm_tiles-inl.h - many rows where the processor multiplies tiles (tile_unit.h); included per
// target.
//
// Weights of 128 k become bf16 once for each block, in the order of the tiles' rows. Rows are cut
// into tiles. tile_pipeline-inl.h multiplies them, and scales and adds the sums.
#if defined(SLUICE_GEMM_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_GEMM_TILES_INL_H_
#undef SLUICE_GEMM_TILES_INL_H_
#else
#define SLUICE_GEMM_TILES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/gemm_tile.h"
#include "backend/cpu/tile_pipeline-inl.h"
#include "backend/cpu/tile_rows.h"
#include "backend/cpu/tile_unit.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

/// bf16 of a weight, by the lowest 4 bits of an index of 5.
template <class Code>
struct Bf16Table {
  static constexpr std::array<std::uint16_t, 32> make() {
    std::array<std::uint16_t, 32> values{};
    for (int i = 0; i < 32; ++i) {
      values[static_cast<std::size_t>(i)] = bf16_of_small(Code::byte_of(i % 16) - Code::kOffset);
    }
    return values;
  }
  alignas(64) static constexpr std::array<std::uint16_t, 32> kValues = make();
};

/// One block's 128 k. A line, 8 k of 16 channels, is four rows of B: k 0 and 4, 2 and 6, 1 and 5,
/// 3 and 7, which are the nibbles at one place of the 16-bit words of a line.
template <class Code>
HWY_INLINE void widen_to_bf16(const std::uint8_t* codes, std::uint16_t* wide) {
  constexpr int kShifts[] = {0, 8, 4, 12};
#if HWY_TARGET == HWY_AVX3
  const __m512i table = _mm512_load_si512(Bf16Table<Code>::kValues.data());
  for (int line = 0; line < kGroupLines; ++line) {
    const __m512i words = _mm512_loadu_si512(codes + line * kLineBytes);
    std::uint16_t* const to = wide + line * 4 * 2 * kBlockN;
    _mm512_store_si512(to, _mm512_permutexvar_epi16(words, table));
    for (int i = 1; i < 4; ++i) {
      const auto shift = static_cast<unsigned>(kShifts[i]);
      _mm512_store_si512(to + i * 2 * kBlockN,
                         _mm512_permutexvar_epi16(_mm512_srli_epi16(words, shift), table));
    }
  }
#else
  for (int line = 0; line < kGroupLines; ++line) {
    for (int i = 0; i < 4; ++i) {
      for (int word = 0; word < 2 * kBlockN; ++word) {
        std::uint16_t codes_of_word = 0;
        std::memcpy(&codes_of_word, codes + line * kLineBytes + word * 2, 2);
        const auto code = static_cast<std::size_t>((codes_of_word >> kShifts[i]) & 15);
        wide[(line * 4 + i) * 2 * kBlockN + word] = Bf16Table<Code>::kValues[code];
      }
    }
  }
#endif
}

/// Blocks that take turns with each group's digits: as many as let these, which come from L2 for
/// the first two of them, stay in L1 beside the weights and the outputs.
inline constexpr int kTileBlocks = 4;

template <int kRowTiles>
UnitRows<kRowTiles> unit_rows(const DigitRows& x, const RowTiles& cut, std::int64_t group,
                              int first_tile) {
  UnitRows<kRowTiles> rows;
  rows.lows = x.lows + group * cut.count + first_tile;
  for (int t = 0; t < kRowTiles; ++t) {
    const int tile = first_tile + t;
    rows.first[t] = std::int64_t{tile} * kTileRows;
    rows.count[t] = cut.rows_of(tile);
    const std::int64_t at = group * x.rows + rows.first[t];
    rows.groups[t] = x.groups + at;
    rows.digits[t] = x.digits + (group * cut.count + tile) * kTileDigitBytes;
    rows.low[t] = x.low + at * kLowDigitBytes;
  }
  return rows;
}

/// acc of the whole tile.
template <class Tiles, class Code, int kScales, int kRowTiles>
void multiply_row_tiles(const GemmTile& tile, const RowTiles& cut) {
  const PreparedMatrix& m = *tile.weights;
  const DigitRows& x = tile.x;
  const std::int64_t num_groups = m.k / kGroup;
  const std::int64_t block_acc = std::int64_t{cut.padded()} * kBlockN;
  std::fill_n(tile.acc, tile.num_blocks * block_acc, 0.0f);
  TilePipeline<Tiles, kScales, kRowTiles> pipeline(
      block_acc, std::max(Code::kOffset, Code::kLargest - Code::kOffset));
  alignas(64) std::uint16_t wide[2 * kGroupWeights];
  // Of two units: the last one's sums are scaled after the scales of the next are there.
  alignas(64) float scales[2][2 * kBlockScales];
  int turn = 0;
  for (int b0 = 0; b0 < tile.num_blocks; b0 += kTileBlocks) {
    const int last_block = std::min(b0 + kTileBlocks, tile.num_blocks);
    for (std::int64_t g = 0; g < num_groups; ++g) {
      for (int b = b0; b < last_block; b += 2, turn ^= 1) {
        const int count = std::min(2, last_block - b);
        Ahead<kRowTiles> ahead;
        for (int i = 0; i < count; ++i) {
          const std::int64_t at = (tile.first_block + b + i) * num_groups + g;
          const auto later = [&](int groups) HWY_ATTR {
            return group_ahead(at, g, num_groups, kTileBlocks, groups);
          };
          ahead.codes[i] = codes_of(m, later(1));
          prefetch_scales(m, later(kScaleGroupsAhead) * kScales);
          load_scales(m, at * kScales, kScales, scales[turn] + i * kBlockScales);
          widen_to_bf16<Code>(codes_of(m, at), wide + i * kGroupWeights);
        }
        float* const acc = tile.acc + b * block_acc;
        for (int t = 0; t < cut.count; t += kRowTiles) {
          const UnitRows<kRowTiles> rows = unit_rows<kRowTiles>(x, cut, g, t);
          const bool is_first = t == 0, is_last = t + kRowTiles >= cut.count;
          Ahead<kRowTiles> of_unit = ahead;
          if (!is_last) of_unit.codes[1] = nullptr;  // Two units: each asks for one block's codes.
          if (!is_first) of_unit.codes[0] = nullptr;
          // The next unit's digits are in L1 if the last two blocks met them.
          if (is_last ? b + 2 >= last_block : b == b0) {
            of_unit.digits = rows.digits[0] + kRowTiles * kTileDigitBytes;
          }
          for (int part = 0; part < kScales; ++part) {
            const float* const part_scales = scales[turn] + part * kBlockN;
            if (count == 2) {
              pipeline.template add<2>(wide, rows, part, part_scales, acc, of_unit);
            } else {
              pipeline.template add<1>(wide, rows, part, part_scales, acc, of_unit);
            }
            of_unit = {};
          }
        }
      }
    }
  }
  pipeline.finish();
}

template <class Tiles, class Code, int kScales>
void gemm_tile_tiles(const GemmTile& tile) {
  const RowTiles cut(tile.x.rows);
  if (cut.count == 1) return multiply_row_tiles<Tiles, Code, kScales, 1>(tile, cut);
  multiply_row_tiles<Tiles, Code, kScales, 2>(tile, cut);
}

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
