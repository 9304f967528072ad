// gemm_words-inl.h - many rows: weights of 128 k, widened once to int16, meet T rows at a time from
// L1; included per target.
//
//   wide   [64 steps][16 channels][2] int16    4 KB, made once per block and 128 k
//   words  [rows][64 steps][2] int16           DigitLayout::kWords
//   sums   [T][16 channels] int32              in registers: T rows share a step's load of weights
//
// Bound     a product and an addition for each 16 channels x 2 k and row, whatever T is. Without T
//           the weights would be loaded for each row, 4 KB of them for 256 bytes of digits.
#if defined(SLUICE_GEMM_WORDS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_GEMM_WORDS_INL_H_
#undef SLUICE_GEMM_WORDS_INL_H_
#else
#define SLUICE_GEMM_WORDS_INL_H_
#endif

#include <hwy/highway.h>

#include <bit>
#include <cstdint>

#include "backend/cpu/gemm_operands-inl.h"
#include "backend/cpu/gemm_tile.h"

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

inline constexpr int kWordSteps = kGroup / 2;   ///< Of 2 k.
inline constexpr int kStepWords = kBlockN * 2;  ///< Weights of a step.
inline constexpr int kWideWords = kWordSteps * kStepWords;

/// One block's 128 k in the order of DigitLayout::kWords.
template <class Code>
void widen_words(const std::uint8_t* codes, std::int16_t* wide) {
  const hn::Repartition<std::uint16_t, TagU8> u16;
  const auto put = [&](VU8 bytes, std::int16_t* to) HWY_ATTR {
    const auto pairs = hn::BitCast(u16, bytes);
    hn::Store(hn::BitCast(kI16, hn::And(pairs, hn::Set(u16, 0xff))), kI16, to);
    hn::Store(hn::BitCast(kI16, hn::ShiftRight<8>(pairs)), kI16, to + kStepWords);
  };
  for (int line = 0; line < kGroupLines; ++line) {
    ByteRegs even, odd;
    PackedLines<Code>{codes}.load(line, even, odd);
    for (int p = 0; p < kParts; ++p) {
      std::int16_t* const to = wide + line * 4 * kStepWords + p * (kRegBytes / 2);
      put(even.v[p], to);
      put(odd.v[p], to + 2 * kStepWords);
    }
  }
}

/// A pair of int16 in every 32-bit lane.
HWY_INLINE VI16 repeat_pair(const std::uint8_t* p) {
  return hn::BitCast(kI16, repeat_quad(p));
}

/// The sums of T rows whose digits are kMainDigitBytes apart. Nested and not an array: g++ 12 keeps
/// an array of so many registers in memory.
template <int T>
struct WordSums {
  IntRegs first;
  WordSums<T - 1> rest;

  HWY_INLINE void zero() {
    first.zero();
    rest.zero();
  }
  HWY_INLINE void add(const VI16* w, const std::uint8_t* words) {
    const VI16 a = repeat_pair(words);
    for (int p = 0; p < kParts; ++p) WordDot::add(w[p], a, first.v[p]);
    rest.add(w, words + kMainDigitBytes);
  }
  HWY_INLINE void store(std::int32_t* to) const {
    for (int p = 0; p < kParts; ++p) hn::Store(first.v[p], kI32, to + p * (kRegBytes / 4));
    rest.store(to + kBlockN);
  }
};
template <>
struct WordSums<0> {
  HWY_INLINE void zero() {}
  HWY_INLINE void add(const VI16*, const std::uint8_t*) {}
  HWY_INLINE void store(std::int32_t*) const {}
};

/// sums [T][16] = words of `steps` steps of T rows. A function of its own: inlined, g++ 12 leaves
/// sums in memory that fit the registers.
template <int T>
HWY_NOINLINE void sum_words(const std::int16_t* wide, const std::uint8_t* words, int steps,
                            std::int32_t* sums) {
  WordSums<T> sum;
  sum.zero();
  for (int step = 0; step < steps; ++step) {
    VI16 w[kParts];
    for (int p = 0; p < kParts; ++p) {
      w[p] = hn::Load(kI16, wide + step * kStepWords + p * (kRegBytes / 2));
    }
    sum.add(w, words + step * 4);
  }
  sum.store(sums);
}

/// sum += low digits of one row, of the steps in `mask`.
HWY_NOINLINE inline void add_low_words(const std::int16_t* wide, std::uint64_t mask,
                                       const std::uint8_t* low, IntRegs& sum) {
  for (; mask != 0; mask &= mask - 1) {
    const int step = std::countr_zero(mask);
    const VI16 a = repeat_pair(low + step * 4);
    for (int p = 0; p < kParts; ++p) {
      const std::int16_t* const w = wide + step * kStepWords + p * (kRegBytes / 2);
      WordDot::add(hn::Load(kI16, w), a, sum.v[p]);
    }
  }
}

/// acc[row .. row + T) of one block += 1 / kScales of a group, part `part`.
template <class Code, int T, int kScales>
HWY_INLINE void add_part_words(const std::int16_t* wide, int part, const BlockGroup& bg,
                               const DigitRows& x, int row, float* acc) {
  constexpr int kSteps = kWordSteps / kScales, kSums = 4 / kScales;
  const std::int64_t at = bg.group * x.rows + row;
  alignas(64) std::int32_t sums[T * kBlockN];
  sum_words<T>(wide + part * kSteps * kStepWords,
               x.digits + at * kMainDigitBytes + part * kSteps * 4, kSteps, sums);
  for (int t = 0; t < T; ++t) {
    const DigitGroup& g = x.groups[at + t];
    IntRegs sum;
    for (int p = 0; p < kParts; ++p) {
      const VI32 words = hn::Load(kI32, sums + t * kBlockN + p * (kRegBytes / 4));
      sum.v[p] = hn::ShiftLeft<kMidShift>(words);
    }
    const std::uint64_t low = g.low & ((~std::uint64_t{0} >> (64 - kSteps)) << (part * kSteps));
    if (HWY_UNLIKELY(low != 0)) {
      add_low_words(wide, low, x.low + (at + t) * kLowDigitBytes, sum);
    }
    std::int32_t correction = 0;
    for (int i = 0; i < kSums; ++i) correction += Code::kOffset * g.sum[part * kSums + i];
    scale_and_add(sum, correction, g.scale, bg.weight_scales + part * kBlockN,
                  acc + (row + t) * kBlockN);
  }
}

template <class Code, int T>
HWY_INLINE void add_group_words(const std::int16_t* wide, const BlockGroup& bg, const DigitRows& x,
                                int row, float* acc) {
  if (!bg.four_scales) return add_part_words<Code, T, 1>(wide, 0, bg, x, row, acc);
  for (int part = 0; part < 4; ++part) {
    add_part_words<Code, T, 4>(wide, part, bg, x, row, acc);
  }
}

/// The next `rows` rows, at most T.
template <class Code, int T>
HWY_INLINE void add_rows_words(int rows, const std::int16_t* wide, const BlockGroup& bg,
                               const DigitRows& x, int row, float* acc) {
  if (rows == T) return add_group_words<Code, T>(wide, bg, x, row, acc);
  if constexpr (T > 1) add_rows_words<Code, T - 1>(rows, wide, bg, x, row, acc);
}

/// All rows of one block and group, in as few turns as there can be, of nearly as many rows each.
template <class Code>
void add_group_all_rows_words(const std::int16_t* wide, const BlockGroup& bg, const DigitRows& x,
                              float* acc) {
  int turns = (x.rows + WordDot::kRows - 1) / WordDot::kRows;
  for (int row = 0; row < x.rows; --turns) {
    const int rows = (x.rows - row + turns - 1) / turns;
    add_rows_words<Code, WordDot::kRows>(rows, wide, bg, x, row, acc);
    row += rows;
  }
}

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
