// See gemm_tile.h for maths, operands and tile.
#include "backend/cpu/gemm_tile.h"

#include <algorithm>
#include <cstring>

#include "backend/cpu/cpu_features.h"
#include "core/fail.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemm_tile.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "backend/cpu/gemm_bytes-inl.h"
#include "backend/cpu/gemm_tiles-inl.h"
#include "backend/cpu/gemm_words-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR  // No vectors at all: the same sums, one product at a time.

/// sum_k (w + kOffset) * q over `num_lines` lines of one row and channel.
template <class Code>
std::int32_t dot_lines(const std::uint8_t* codes, int lane, const std::uint8_t* digits,
                       const std::uint8_t* low, int first_line, int num_lines) {
  std::int32_t sum = 0;
  for (int line = first_line; line < first_line + num_lines; ++line) {
    for (int i = 0; i < kLineK; ++i) {
      const int odd = i % 2, at = i / 2;
      const int w = Code::byte_of((codes[line * kLineBytes + lane * 4 + at] >> (4 * odd)) & 0xf);
      const auto mid = static_cast<std::int8_t>(digits[line * 16 + odd * 8 + at]);
      const auto high = static_cast<std::int8_t>(digits[line * 16 + odd * 8 + 4 + at]);
      const int least = low == nullptr ? 0 : static_cast<std::int8_t>(low[line * 8 + odd * 4 + at]);
      sum += w * (least + mid * (1 << kMidShift) + high * (1 << kHighShift));
    }
  }
  return sum;
}

template <class Code>
void gemm_tile_of(const GemmTile& tile) {
  const PreparedMatrix& m = *tile.weights;
  const DigitRows& x = tile.x;
  SLUICE_ASSERT(x.layout == DigitLayout::kBytes);
  const std::int64_t num_groups = m.k / kGroup;
  const int parts = kGroup / m.group_size, part_lines = kGroupLines / parts;
  float scales[4 * kBlockN];
  for (int b = 0; b < tile.num_blocks; ++b) {
    float* acc = tile.acc + static_cast<std::int64_t>(b) * x.rows * kBlockN;
    std::fill_n(acc, x.rows * kBlockN, 0.0f);
    for (std::int64_t g = 0; g < num_groups; ++g) {
      const std::int64_t at = (tile.first_block + b) * num_groups + g;
      const std::uint8_t* codes = m.codes + at * kGroupLines * kLineBytes;
      load_scales(m, at * parts, parts, scales);
      for (std::int64_t i = 0; i < std::int64_t{x.rows} * kBlockN * parts; ++i) {
        const auto part = static_cast<int>(i % parts), lane = static_cast<int>(i / parts % kBlockN);
        const std::int64_t row = i / parts / kBlockN, from = g * x.rows + row;
        const DigitGroup& dg = x.groups[from];
        std::int32_t sum = dot_lines<Code>(codes, lane, x.digits + from * kMainDigitBytes,
                                           dg.low == 0 ? nullptr : x.low + from * kLowDigitBytes,
                                           part * part_lines, part_lines);
        for (int c = 0; c < 4 / parts; ++c) sum -= Code::kOffset * dg.sum[part * (4 / parts) + c];
        acc[row * kBlockN + lane] +=
            static_cast<float>(sum) * (scales[part * kBlockN + lane] * dg.scale);
      }
    }
  }
}

void gemm_tile_impl(const GemmTile& tile) {
  if (tile.weights->format == WeightFormat::kMxfp4) return gemm_tile_of<E2M1Code>(tile);
  gemm_tile_of<Int4Code>(tile);
}

DigitLayout digit_layout_impl(int) {
  return DigitLayout::kBytes;
}

const char* instruction_set_impl() {
  return "no vectors";
}

#else

/// How codes are read.
struct Reading {
  int blocks;        ///< That take turns with each group's digits, while these are in L1.
  int groups_ahead;  ///< A block's codes are asked for so long before they are read.
  bool is_near;      ///< Asked into L1, which waits for few lines at a time; otherwise into L2.
};
/// Few rows wait for memory. A processor's own prefetching begins anew with every page, which is
/// four groups of a block. Many rows take longer than it looks ahead.
constexpr Reading kReadingOfFew{.blocks = 4, .groups_ahead = 4, .is_near = false};
constexpr Reading kReadingOfMany{.blocks = 2, .groups_ahead = 1, .is_near = true};
constexpr int kMostWaitingRows = 8;

template <bool kNear>
HWY_INLINE void prefetch_group(const std::uint8_t* codes) {
  constexpr int kLocality = kNear ? 3 : 2;
  for (int line = 0; line < kGroupLines; ++line) {
    __builtin_prefetch(codes + line * kLineBytes, 0, kLocality);
  }
}

/// acc of the whole tile: add(codes, block_group, acc of the block) for each block and group.
template <class Add>
HWY_INLINE void add_groups(const GemmTile& tile, const Add& add) {
  const PreparedMatrix& m = *tile.weights;
  const auto rows = static_cast<std::size_t>(tile.x.rows);
  const std::int64_t num_groups = m.k / kGroup;
  const int scales_per_group = kGroup / m.group_size;
  alignas(64) float scales[4 * kBlockN];
  std::fill_n(tile.acc, static_cast<std::size_t>(tile.num_blocks) * rows * kBlockN, 0.0f);
  const Reading reading = tile.x.rows <= kMostWaitingRows ? kReadingOfFew : kReadingOfMany;
  for (int b0 = 0; b0 < tile.num_blocks; b0 += reading.blocks) {
    for (std::int64_t g = 0; g < num_groups; ++g) {
      for (int b = b0; b < std::min(b0 + reading.blocks, tile.num_blocks); ++b) {
        const std::int64_t at = (tile.first_block + b) * num_groups + g;
        load_scales(m, at * scales_per_group, scales_per_group, scales);
        const BlockGroup bg{
            .group = g, .weight_scales = scales, .four_scales = scales_per_group == 4};
        const auto ahead = [&](int groups) HWY_ATTR {
          return group_ahead(at, g, num_groups, reading.blocks, groups);
        };
        prefetch_scales(m, ahead(kScaleGroupsAhead) * scales_per_group);
        const std::uint8_t* const next = codes_of(m, ahead(reading.groups_ahead));
        reading.is_near ? prefetch_group<true>(next) : prefetch_group<false>(next);
        const std::uint8_t* const codes = codes_of(m, at);
        add(codes, bg, tile.acc + static_cast<std::size_t>(b) * rows * kBlockN);
      }
    }
  }
}

template <class Dot, class Code>
void gemm_tile_bytes(const GemmTile& tile) {
  alignas(64) std::uint8_t wide[2 * kLineBytes * kGroupLines];
  add_groups(tile, [&](const std::uint8_t* codes, const BlockGroup& bg, float* acc) HWY_ATTR {
    if (tile.x.rows <= Dot::kRows) {
      return add_group_all_rows<Dot>(PackedLines<Code>{codes}, bg, tile.x, acc);
    }
    widen_group<Code>(codes, wide);
    add_group_all_rows<Dot>(WideLines<Code>{wide}, bg, tile.x, acc);
  });
}

template <class Code>
void gemm_tile_words(const GemmTile& tile) {
  alignas(64) std::int16_t wide[kWideWords];
  add_groups(tile, [&](const std::uint8_t* codes, const BlockGroup& bg, float* acc) HWY_ATTR {
    widen_words<Code>(codes, wide);
    add_group_all_rows_words<Code>(wide, bg, tile.x, acc);
  });
}

template <class Tiles, class Code>
void gemm_tile_tiles_of(const GemmTile& tile) {
  if (tile.weights->group_size == kGroup) {
    return gemm_tile_tiles<Tiles, Code, 1>(tile);
  }
  gemm_tile_tiles<Tiles, Code, 4>(tile);
}

bool has_vnni() {
  return SLUICE_BYTE_DOT_HAS_VNNI && cpu_features().vnni;
}

/// Where tiles are as fast as bytes. Below, reading the weights is what takes the time.
constexpr int kLeastTileRows = 5;

/// Processors with tiles have AVX-512. One that hides it has other limits than ours.
bool has_tiles() {
  return HWY_TARGET == HWY_AVX3 && cpu_features().tiles != TileUnit::kNone;
}

DigitLayout digit_layout_impl(int rows) {
  if (has_tiles() && rows >= kLeastTileRows) return DigitLayout::kTiles;
  return has_vnni() || rows <= kFewRows ? DigitLayout::kBytes : DigitLayout::kWords;
}

template <class Code>
void gemm_tile_of(const GemmTile& tile) {
  if (tile.x.layout == DigitLayout::kTiles) {
#if HWY_TARGET == HWY_AVX3
    if (cpu_features().tiles == TileUnit::kAmx) return gemm_tile_tiles_of<AmxTiles, Code>(tile);
    if (cpu_features().bf16) return gemm_tile_tiles_of<ScalarTilesAndDots, Code>(tile);
#endif
    return gemm_tile_tiles_of<ScalarTiles, Code>(tile);
  }
  if (tile.x.layout == DigitLayout::kWords) return gemm_tile_words<Code>(tile);
#if SLUICE_BYTE_DOT_HAS_VNNI
  if (has_vnni()) return gemm_tile_bytes<VnniDot, Code>(tile);
#endif
  gemm_tile_bytes<PairDot, Code>(tile);
}

void gemm_tile_impl(const GemmTile& tile) {
  if (tile.weights->format == WeightFormat::kMxfp4) return gemm_tile_of<E2M1Code>(tile);
  gemm_tile_of<Int4Code>(tile);
}

const char* instruction_set_impl() {
  if (has_tiles() && cpu_features().tiles == TileUnit::kScalar) return "scalar tiles";
  if (has_tiles()) return has_vnni() ? "AVX-512 VNNI, AMX" : "AVX-512, AMX";
  return has_vnni() ? "AVX-512 VNNI" : kInstructionSet;
}

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(gemm_tile_impl);
HWY_EXPORT(digit_layout_impl);
HWY_EXPORT(instruction_set_impl);

DigitLayout digit_layout(int rows) {
  return HWY_DYNAMIC_DISPATCH(digit_layout_impl)(rows);
}
void gemm_tile(const GemmTile& tile) {
  HWY_DYNAMIC_DISPATCH(gemm_tile_impl)(tile);
}
const char* instruction_set() {
  return HWY_DYNAMIC_DISPATCH(instruction_set_impl)();
}

}  // namespace sluice::cpu
#endif
