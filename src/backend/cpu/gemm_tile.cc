// See gemm_tile.h for maths, operands and tile.
#include "backend/cpu/gemm_tile.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/gemm_tile.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "backend/cpu/byte_dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

/// How a weight is stored: a nibble, and the byte 0 .. kLargest that products see, which is
/// kOffset more than the weight that is meant.
struct Int4Code {
  static constexpr int kOffset = 8, kLargest = 15;
  static constexpr std::uint8_t byte_of(int nibble) { return static_cast<std::uint8_t>(nibble); }
};
/// Twice the value of an e2m1 number.
struct E2M1Code {
  static constexpr int kOffset = 12, kLargest = 24;
  static constexpr std::uint8_t kBytes[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                              12, 11, 10, 9,  8,  6,  4,  0};
  static constexpr std::uint8_t byte_of(int nibble) { return kBytes[nibble]; }
};

void load_scales(const PreparedMatrix& m, std::int64_t first, int count, float* out) {
  if (m.scale_dtype == DType::kFloat8E8M0) {
    const auto* in = static_cast<const std::uint8_t*>(m.scales) + first * kBlockN;
    for (int i = 0; i < count * kBlockN; ++i) {
      // Half of 2^(code - 127), for weights that count twice; below 2^-126 a subnormal number.
      const std::uint32_t code = in[i];
      const std::uint32_t bits = code >= 2 ? (code - 1) << 23 : 0x00200000u << code;
      std::memcpy(out + i, &bits, 4);
    }
  } else if (m.scale_dtype == DType::kBFloat16) {
    const auto* in = static_cast<const std::uint16_t*>(m.scales) + first * kBlockN;
    for (int i = 0; i < count * kBlockN; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(in[i]) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  } else {
    std::memcpy(out, static_cast<const float*>(m.scales) + first * kBlockN,
                static_cast<std::size_t>(count) * kBlockN * 4);
  }
}

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
      const auto least = static_cast<std::int8_t>(low[line * 8 + odd * 4 + at]);
      sum += w * (least + (mid << kMidShift) + (high << kHighShift));
    }
  }
  return sum;
}

template <class Code>
void gemm_tile_of(const GemmTile& tile) {
  const PreparedMatrix& m = *tile.weights;
  const DigitRows& x = tile.x;
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
        std::int32_t sum =
            dot_lines<Code>(codes, lane, x.digits + from * kMainDigitBytes,
                            x.low + from * kLowDigitBytes, part * part_lines, part_lines);
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

const char* instruction_set_impl() {
  return "no vectors";
}

#else

HWY_INLINE VU8 bytes_of(Int4Code, VU8 nibbles) {
  return nibbles;
}
HWY_INLINE VU8 bytes_of(E2M1Code, VU8 nibbles) {
  return hn::TableLookupBytes(hn::LoadDup128(kU8, E2M1Code::kBytes), nibbles);
}

/// A line of 8 k x 16 channels as it lies in memory, widened as it is used.
template <class C>
struct PackedLines {
  using Code = C;
  const std::uint8_t* codes;  // [line][64]
  void load(int line, ByteRegs& even, ByteRegs& odd) const {
    for (int p = 0; p < kParts; ++p) {
      const VU8 v = hn::LoadU(kU8, codes + line * kLineBytes + p * kRegBytes);
      even.v[p] = bytes_of(Code{}, hn::And(v, hn::Set(kU8, 0x0f)));
      odd.v[p] = bytes_of(Code{}, high_nibbles(v));
    }
  }
};

/// The same after widen_group(): one byte per weight.
template <class C>
struct WideLines {
  using Code = C;
  const std::uint8_t* bytes;  // [line][even 64, odd 64]
  void load(int line, ByteRegs& even, ByteRegs& odd) const {
    for (int p = 0; p < kParts; ++p) {
      even.v[p] = hn::Load(kU8, bytes + line * 2 * kLineBytes + p * kRegBytes);
      odd.v[p] = hn::Load(kU8, bytes + line * 2 * kLineBytes + kLineBytes + p * kRegBytes);
    }
  }
};

template <class Code>
void widen_group(const std::uint8_t* codes, std::uint8_t* wide) {
  for (int line = 0; line < kGroupLines; ++line) {
    ByteRegs even, odd;
    PackedLines<Code>{codes}.load(line, even, odd);
    for (int p = 0; p < kParts; ++p) {
      hn::Store(even.v[p], kU8, wide + line * 2 * kLineBytes + p * kRegBytes);
      hn::Store(odd.v[p], kU8, wide + line * 2 * kLineBytes + kLineBytes + p * kRegBytes);
    }
  }
}

/// sum[t] += mid and high digits of `kLines` lines of T rows. digits[t]: line `first_line`.
template <class Dot, int T, int kLines, class Lines>
HWY_INLINE void add_main_digits(const Lines& lines, int first_line,
                                const std::uint8_t* const* digits, IntRegs* sum) {
  typename Dot::Acc mid[T], high[T];
  for (int t = 0; t < T; ++t) Dot::zero(mid[t]), Dot::zero(high[t]);
  for (int line = 0; line < kLines; ++line) {
    ByteRegs even, odd;
    lines.load(first_line + line, even, odd);
    for (int t = 0; t < T; ++t) {
      const std::uint8_t* d = digits[t] + (first_line + line) * 16;
      Dot::add(even, d, mid[t]);
      Dot::add(even, d + 4, high[t]);
      Dot::add(odd, d + 8, mid[t]);
      Dot::add(odd, d + 12, high[t]);
    }
  }
  for (int t = 0; t < T; ++t) {
    Dot::template flush<kMidShift>(mid[t], sum[t]);
    Dot::template flush<kHighShift>(high[t], sum[t]);
  }
}

/// sum += low digits of one row. At most 24 * 4 * 2 per pair: a whole group fits an int16.
template <class Dot, class Lines>
HWY_NOINLINE void add_low_digits(const Lines& lines, int first_line, int num_lines,
                                 const std::uint8_t* low, IntRegs& sum) {
  typename Dot::Acc acc;
  Dot::zero(acc);
  for (int line = first_line; line < first_line + num_lines; ++line) {
    ByteRegs even, odd;
    lines.load(line, even, odd);
    Dot::add(even, low + line * 8, acc);
    Dot::add(odd, low + line * 8 + 4, acc);
  }
  Dot::template flush<0>(acc, sum);
}

/// acc += f32(sum - correction) * (ws * as), lane by lane.
HWY_INLINE void scale_and_add(const IntRegs& sum, std::int32_t correction, float scale,
                              const float* weight_scales, float* acc) {
  for (int p = 0; p < kParts; ++p) {
    const std::size_t at = static_cast<std::size_t>(p) * kRegBytes / 4;
    const VF32 dot = hn::ConvertTo(kF32, hn::Sub(sum.v[p], hn::Set(kI32, correction)));
    const VF32 factor = hn::Mul(hn::LoadU(kF32, weight_scales + at), hn::Set(kF32, scale));
    hn::StoreU(hn::Add(hn::LoadU(kF32, acc + at), hn::Mul(dot, factor)), kF32, acc + at);
  }
}

/// One block of 16 channels x 128 k, ready to meet rows.
struct BlockGroup {
  std::int64_t group = 0;                // Of 128 k.
  const float* weight_scales = nullptr;  // [1 or 4][16]
  bool four_scales = false;              // group_size 32.
};

/// acc[row .. row + T) of one block += one group.
template <class Dot, int T, class Lines>
HWY_INLINE void add_group(const Lines& lines, const BlockGroup& bg, const DigitRows& x, int row,
                          float* acc) {
  const std::int64_t at = bg.group * x.rows + row;
  const std::uint8_t* digits[T];
  for (int t = 0; t < T; ++t) digits[t] = x.digits + (at + t) * kMainDigitBytes;
  using Code = typename Lines::Code;
  constexpr int kMaxLines = Dot::max_lines(Code::kLargest);  // Before an accumulator may overflow.
  if (!bg.four_scales) {
    IntRegs sum[T];
    for (int t = 0; t < T; ++t) sum[t].zero();
    for (int line = 0; line < kGroupLines; line += kMaxLines) {
      add_main_digits<Dot, T, kMaxLines>(lines, line, digits, sum);
    }
    for (int t = 0; t < T; ++t) {
      const DigitGroup& g = x.groups[at + t];
      if (HWY_UNLIKELY(g.has_low != 0)) {
        add_low_digits<Dot>(lines, 0, kGroupLines, x.low + (at + t) * kLowDigitBytes, sum[t]);
      }
      const std::int32_t correction = Code::kOffset * (g.sum[0] + g.sum[1] + g.sum[2] + g.sum[3]);
      scale_and_add(sum[t], correction, g.scale, bg.weight_scales, acc + (row + t) * kBlockN);
    }
    return;
  }
  constexpr int kPartLines = std::min(4, kMaxLines);
  for (int part = 0; part < 4; ++part) {
    IntRegs sum[T];
    for (int t = 0; t < T; ++t) sum[t].zero();
    for (int line = part * 4; line < part * 4 + 4; line += kPartLines) {
      add_main_digits<Dot, T, kPartLines>(lines, line, digits, sum);
    }
    for (int t = 0; t < T; ++t) {
      const DigitGroup& g = x.groups[at + t];
      if (HWY_UNLIKELY(g.has_low != 0)) {
        add_low_digits<Dot>(lines, part * 4, 4, x.low + (at + t) * kLowDigitBytes, sum[t]);
      }
      scale_and_add(sum[t], Code::kOffset * g.sum[part], g.scale, bg.weight_scales + part * kBlockN,
                    acc + (row + t) * kBlockN);
    }
  }
}

/// All rows of one block and group.
template <class Dot, class Lines>
void add_group_all_rows(const Lines& lines, const BlockGroup& bg, const DigitRows& x, float* acc) {
  int row = 0;
  if constexpr (Dot::kRows >= 8) {
    for (; row + 8 <= x.rows; row += 8) add_group<Dot, 8>(lines, bg, x, row, acc);
    if (row + 4 <= x.rows) add_group<Dot, 4>(lines, bg, x, row, acc), row += 4;
  }
  for (; row + 2 <= x.rows; row += 2) add_group<Dot, 2>(lines, bg, x, row, acc);
  if (row < x.rows) add_group<Dot, 1>(lines, bg, x, row, acc);
}

template <class Dot, class Code>
void gemm_tile_of(const GemmTile& tile) {
  const PreparedMatrix& m = *tile.weights;
  const DigitRows& x = tile.x;
  const std::int64_t num_groups = m.k / kGroup;
  const int scales_per_group = kGroup / m.group_size;
  alignas(64) std::uint8_t wide[2 * kLineBytes * kGroupLines];
  alignas(64) float scales[4 * kBlockN];
  std::memset(tile.acc, 0,
              sizeof(float) * kBlockN * static_cast<std::size_t>(x.rows) *
                  static_cast<std::size_t>(tile.num_blocks));
  constexpr int kBlocksAtOnce = 2;  // Reuses a group's digits while they are in L1.
  for (int b0 = 0; b0 < tile.num_blocks; b0 += kBlocksAtOnce) {
    for (std::int64_t g = 0; g < num_groups; ++g) {
      for (int b = b0; b < std::min(b0 + kBlocksAtOnce, tile.num_blocks); ++b) {
        const std::int64_t block = tile.first_block + b;
        const std::uint8_t* codes = m.codes + (block * num_groups + g) * kGroupLines * kLineBytes;
        load_scales(m, (block * num_groups + g) * scales_per_group, scales_per_group, scales);
        const BlockGroup bg{
            .group = g, .weight_scales = scales, .four_scales = scales_per_group == 4};
        float* acc = tile.acc + static_cast<std::int64_t>(b) * x.rows * kBlockN;
        if (x.rows <= Dot::kRows) {
          add_group_all_rows<Dot>(PackedLines<Code>{codes}, bg, x, acc);
        } else {
          widen_group<Code>(codes, wide);
          add_group_all_rows<Dot>(WideLines<Code>{wide}, bg, x, acc);
        }
      }
    }
  }
}

template <class Dot>
void gemm_tile_with(const GemmTile& tile) {
  if (tile.weights->format == WeightFormat::kMxfp4) return gemm_tile_of<Dot, E2M1Code>(tile);
  gemm_tile_of<Dot, Int4Code>(tile);
}

void gemm_tile_impl(const GemmTile& tile) {
#if SLUICE_BYTE_DOT_HAS_VNNI
  if (__builtin_cpu_supports("avx512vnni")) return gemm_tile_with<VnniDot>(tile);
#endif
  gemm_tile_with<PairDot>(tile);
}

const char* instruction_set_impl() {
#if SLUICE_BYTE_DOT_HAS_VNNI
  if (__builtin_cpu_supports("avx512vnni")) return "AVX-512 VNNI";
#endif
  return kInstructionSet;
}

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(gemm_tile_impl);
HWY_EXPORT(instruction_set_impl);

void gemm_tile(const GemmTile& tile) {
  HWY_DYNAMIC_DISPATCH(gemm_tile_impl)(tile);
}
const char* instruction_set() {
  return HWY_DYNAMIC_DISPATCH(instruction_set_impl)();
}

}  // namespace sluice::cpu
#endif
