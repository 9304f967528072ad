// gemm_bytes-inl.h - rows whose digits are bytes: a few with any instruction set, as many as there
// are with VNNI; included per target.
#if defined(SLUICE_GEMM_BYTES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_GEMM_BYTES_INL_H_
#undef SLUICE_GEMM_BYTES_INL_H_
#else
#define SLUICE_GEMM_BYTES_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/gemm_tile.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

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
  void load_half(int step, ByteRegs& half) const {
    for (int p = 0; p < kParts; ++p) {
      half.v[p] = hn::Load(kU8, bytes + step * kLineBytes + p * kRegBytes);
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

/// sum += low digits of one row, of the steps in `mask`: at most all of a group. A digit is at most
/// 4, so that an int16 holds a whole group's.
template <class Dot, class Lines>
HWY_NOINLINE void add_low_digits(const Lines& lines, std::uint64_t mask, const std::uint8_t* low,
                                 IntRegs& sum) {
  typename Dot::Acc acc;
  Dot::zero(acc);
  for (; mask != 0; mask &= mask - 1) {
    const int step = std::countr_zero(mask);
    ByteRegs half;
    lines.load_half(step, half);
    Dot::add(half, low + step * 4, acc);
  }
  Dot::template flush<0>(acc, sum);
}

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
      if (HWY_UNLIKELY(g.low != 0)) {
        add_low_digits<Dot>(lines, g.low, x.low + (at + t) * kLowDigitBytes, sum[t]);
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
      const std::uint64_t low = g.low & (std::uint64_t{0xff} << (part * 8));
      if (HWY_UNLIKELY(low != 0)) {
        add_low_digits<Dot>(lines, low, x.low + (at + t) * kLowDigitBytes, sum[t]);
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

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
