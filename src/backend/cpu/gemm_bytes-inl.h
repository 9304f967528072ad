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

/// The sums of T rows whose digits are kMainDigitBytes apart. Nested and not an array: g++ 12 keeps
/// an array of so many registers in memory.
template <class Dot, int T>
struct ByteSums {
  typename Dot::Acc mid, high;
  ByteSums<Dot, T - 1> rest;

  HWY_INLINE void zero() {
    Dot::zero(mid), Dot::zero(high);
    rest.zero();
  }
  HWY_INLINE void add(const ByteRegs& even, const ByteRegs& odd, const std::uint8_t* digits) {
    Dot::add(even, digits, mid);
    Dot::add(even, digits + 4, high);
    Dot::add(odd, digits + 8, mid);
    Dot::add(odd, digits + 12, high);
    rest.add(even, odd, digits + kMainDigitBytes);
  }
  /// to [T][16] = what both digits make, or more by that.
  template <bool kAdd>
  HWY_INLINE void store(std::int32_t* to) const {
    IntRegs sum;
    for (int p = 0; p < kParts; ++p) {
      sum.v[p] = kAdd ? hn::Load(kI32, to + p * (kRegBytes / 4)) : hn::Zero(kI32);
    }
    Dot::template flush<kMidShift>(mid, sum);
    Dot::template flush<kHighShift>(high, sum);
    for (int p = 0; p < kParts; ++p) hn::Store(sum.v[p], kI32, to + p * (kRegBytes / 4));
    rest.template store<kAdd>(to + kBlockN);
  }
};
template <class Dot>
struct ByteSums<Dot, 0> {
  HWY_INLINE void zero() {}
  HWY_INLINE void add(const ByteRegs&, const ByteRegs&, const std::uint8_t*) {}
  template <bool kAdd>
  HWY_INLINE void store(std::int32_t*) const {}
};

/// sums [T][16] = mid and high digits of `kLines` lines of T rows. A function of its own, as
/// sum_words() is.
template <class Dot, int T, int kLines, class Lines>
HWY_NOINLINE void sum_bytes(const Lines& lines_in, int first_line, const std::uint8_t* digits,
                            std::int32_t* sums) {
  // Before an accumulator may overflow.
  constexpr int kTurn = std::min(kLines, Dot::max_lines(Lines::Code::kLargest));
  const Lines lines = lines_in;
  for (int turn = 0; turn < kLines; turn += kTurn) {
    // Few sums would wait for themselves: then a line's and the next one's are apart.
    constexpr int kApart = T <= Dot::kFewSums && kTurn % 2 == 0 ? 2 : 1;
    ByteSums<Dot, T> sum, next_sum;
    sum.zero(), next_sum.zero();
    for (int line = first_line + turn; line < first_line + turn + kTurn; line += kApart) {
      ByteRegs even, odd;
      lines.load(line, even, odd);
      sum.add(even, odd, digits + line * 16);
      if constexpr (kApart == 2) {
        lines.load(line + 1, even, odd);
        next_sum.add(even, odd, digits + line * 16 + 16);
      }
    }
    if (turn == 0) {
      sum.template store<false>(sums);
    } else {
      sum.template store<true>(sums);
    }
    if constexpr (kApart == 2) next_sum.template store<true>(sums);
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

/// acc[row .. row + T) of one block += 1 / kScales of a group, part `part`.
template <class Dot, int T, int kScales, class Lines>
HWY_INLINE void add_part(const Lines& lines, int part, const BlockGroup& bg, const DigitRows& x,
                         int row, float* acc) {
  using Code = typename Lines::Code;
  constexpr int kLines = kGroupLines / kScales, kSums = 4 / kScales;
  const std::int64_t at = bg.group * x.rows + row;
  alignas(64) std::int32_t sums[T * kBlockN];
  sum_bytes<Dot, T, kLines>(lines, part * kLines, x.digits + at * kMainDigitBytes, sums);
  for (int t = 0; t < T; ++t) {
    const DigitGroup& g = x.groups[at + t];
    IntRegs sum;
    for (int p = 0; p < kParts; ++p) {
      sum.v[p] = hn::Load(kI32, sums + t * kBlockN + p * (kRegBytes / 4));
    }
    const std::uint64_t low =
        g.low & ((~std::uint64_t{0} >> (64 - 2 * kLines)) << (part * 2 * kLines));
    if (HWY_UNLIKELY(low != 0)) {
      add_low_digits<Dot>(lines, low, x.low + (at + t) * kLowDigitBytes, sum);
    }
    std::int32_t correction = 0;
    for (int i = 0; i < kSums; ++i) correction += Code::kOffset * g.sum[part * kSums + i];
    scale_and_add(sum, correction, g.scale, bg.weight_scales + part * kBlockN,
                  acc + (row + t) * kBlockN);
  }
}

template <class Dot, int T, class Lines>
HWY_INLINE void add_group(const Lines& lines, const BlockGroup& bg, const DigitRows& x, int row,
                          float* acc) {
  if (!bg.four_scales) return add_part<Dot, T, 1>(lines, 0, bg, x, row, acc);
  for (int part = 0; part < 4; ++part) add_part<Dot, T, 4>(lines, part, bg, x, row, acc);
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
