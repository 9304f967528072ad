// Codes become digits in two steps: first how large they are together, which says how many low bits
// of a whole number have to be a digit of their own, then the digits. Where there are tiles, 32
// codes at a time in vectors of 512 bits; elsewhere, which is for tests, one after the other.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "backend/cpu/digits.h"
#include "sluice/quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/tile_digits.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

/// Sums of |q| over each 32 channels, rounded up.
struct Magnitudes {
  std::int32_t of_part[4]{};

  /// The smallest cut with which float32 holds all sums of 32 k with weights up to 12, and with
  /// weights up to 8 those of 128 k, if any has that.
  [[nodiscard]] int cut() const {
    std::int64_t most = 0;
    for (const std::int32_t part : of_part) most = std::max(most, std::int64_t{part} * 12);
    most = std::max(most, std::int64_t{all()} * 8);
    int cut = 0;
    while (cut < 3 && most > std::int64_t{1} << (24 + cut)) ++cut;
    return cut;
  }
  [[nodiscard]] std::int32_t all() const {
    return of_part[0] + of_part[1] + of_part[2] + of_part[3];
  }
};
/// Rounding to a multiple of 8 adds at most 4 to a value.
inline constexpr std::int32_t kRounding = 4;

inline std::int32_t magnitude_of(const Magnitudes& magnitudes, int cut) {
  return (magnitudes.all() + (1 << cut) - 1) >> cut;
}

#if HWY_TARGET == HWY_AVX3

/// Magnitudes of codes below this have an exponent below 4: these alone may have low digits.
inline constexpr int kNumSmall = 32;

/// Of the codes below kNumSmall: q itself, and both digits for one cut, as bf16.
struct SmallCodes {
  alignas(64) std::array<std::uint16_t, kNumSmall> q, main, low;
};
constexpr std::uint16_t bf16_of(int value) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(value)) >> 16);
}
constexpr SmallCodes small_codes(int cut) {
  SmallCodes out{};
  for (std::size_t code = 0; code < kNumSmall; ++code) {
    const int mantissa = static_cast<int>(code % 8), exponent = static_cast<int>(code / 8);
    const int q = exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);
    const int main = ((q + (1 << cut) / 2) >> cut) << cut;
    out.q[code] = static_cast<std::uint16_t>(q);
    out.main[code] = bf16_of(main), out.low[code] = bf16_of(q - main);
  }
  return out;
}
inline constexpr SmallCodes kSmallCodes[4] = {small_codes(0), small_codes(1), small_codes(2),
                                              small_codes(3)};

/// Bytes of each 8 k in the order of a line's steps.
alignas(32) inline constexpr std::uint8_t kStepOrder[32] = {
    0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15,
    0, 4, 2, 6, 1, 5, 3, 7, 8, 12, 10, 14, 9, 13, 11, 15};

/// 32 codes, a word each.
struct Words {
  __m512i magnitude, sign;  ///< The sign at its place in a bf16.
  __mmask32 is_small;
};
HWY_INLINE Words words_of(const std::uint8_t* codes) {
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kStepOrder));
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_shuffle_epi8(bytes, order));
  Words out;
  out.magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
  out.sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7f), words), 8);
  out.is_small = _mm512_cmplt_epu16_mask(out.magnitude, _mm512_set1_epi16(kNumSmall));
  return out;
}

/// |q| of two codes in each lane. Of those that are not small it is 8 times a word.
HWY_INLINE __m512i magnitudes_of(const Words& words) {
  const __m512i exponent = _mm512_srli_epi16(words.magnitude, 3);
  const __m512i mantissa = _mm512_or_si512(_mm512_and_si512(words.magnitude, _mm512_set1_epi16(7)),
                                           _mm512_set1_epi16(8));
  const __m512i large =
      _mm512_sllv_epi16(mantissa, _mm512_sub_epi16(exponent, _mm512_set1_epi16(4)));
  const __m512i value = _mm512_mask_permutexvar_epi16(large, words.is_small, words.magnitude,
                                                      _mm512_load_si512(kSmallCodes[0].q.data()));
  const __m512i unit =
      _mm512_mask_mov_epi16(_mm512_set1_epi16(8), words.is_small, _mm512_set1_epi16(1));
  return _mm512_madd_epi16(value, unit);
}

/// The sums of four vectors' lanes.
HWY_INLINE __m128i sums_of_lanes(const __m512i (&v)[4]) {
  const auto add_halves = [](__m512i a, __m512i b) HWY_ATTR {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i first = add_halves(v[0], v[1]), second = add_halves(v[2], v[3]);
  const __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

DigitGroup split_tiles_impl(const std::uint8_t* codes, float scale, std::uint8_t* main,
                            std::int64_t main_stride, std::uint8_t* low) {
  Words words[4];
  __m512i sums[4];
  __mmask32 nan = 0;
  for (int part = 0; part < 4; ++part) {
    words[part] = words_of(codes + part * 32);
    sums[part] = magnitudes_of(words[part]);
    nan |= _mm512_cmpeq_epi16_mask(words[part].magnitude, _mm512_set1_epi16(0x7f));
  }
  Magnitudes magnitudes;
  const __m128i rounding = _mm_set1_epi32(32 * kRounding);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(magnitudes.of_part),
                   _mm_add_epi32(sums_of_lanes(sums), rounding));
  const int cut = magnitudes.cut();
  const __m512i small_main = _mm512_load_si512(kSmallCodes[cut].main.data());
  const __m512i small_low = _mm512_load_si512(kSmallCodes[cut].low.data());
  DigitGroup out;
  out.magnitude = magnitude_of(magnitudes, cut);
  __m512i lows[4];
  for (int part = 0; part < 4; ++part) {
    const Words& w = words[part];
    // A value whose last bit counts 2^cut or more only needs another exponent to be q as a bf16.
    const __m512i large =
        _mm512_add_epi16(_mm512_slli_epi16(w.magnitude, 4), _mm512_set1_epi16((127 - 7 + 9) << 7));
    const __m512i digits =
        _mm512_mask_permutexvar_epi16(large, w.is_small, w.magnitude, small_main);
    _mm512_storeu_si512(main + part * main_stride, _mm512_or_si512(digits, w.sign));
    lows[part] = _mm512_maskz_permutexvar_epi16(w.is_small, w.magnitude, small_low);
    const __mmask16 steps = _mm512_test_epi32_mask(lows[part], lows[part]);
    out.low |= std::uint64_t{steps} << (16 * part);
  }
  if (out.low != 0) {
    for (int part = 0; part < 4; ++part) {
      _mm512_storeu_si512(low + part * 64, _mm512_xor_si512(lows[part], words[part].sign));
    }
  }
  out.scale = nan != 0 ? std::numeric_limits<float>::quiet_NaN() : scale * 0x1p-9f;
  return out;
}

#else

DigitGroup split_tiles_impl(const std::uint8_t* codes, float scale, std::uint8_t* main,
                            std::int64_t main_stride, std::uint8_t* low) {
  DigitGroup out;
  out.scale = scale * 0x1p-9f;
  std::int32_t q[kGroup];
  Magnitudes magnitudes;
  for (int k = 0; k < kGroup; ++k) {
    const bool is_nan = (codes[k] & 0x7f) == 0x7f;
    if (is_nan) out.scale = std::numeric_limits<float>::quiet_NaN();
    q[k] = is_nan ? 0 : static_cast<std::int32_t>(e4m3_to_float(codes[k]) * 512.0f);
    magnitudes.of_part[k / 32] += std::abs(q[k]) + kRounding;
  }
  const int cut = magnitudes.cut(), unit = 1 << cut;
  out.magnitude = magnitude_of(magnitudes, cut);
  for (int k = 0; k < kGroup; ++k) {
    const int size = std::abs(q[k]), rest = (size + unit / 2) / unit * unit;
    const int sign = q[k] < 0 ? -1 : 1, i = k % 8;
    const int at = k / 8 * 8 + i % 2 * 4 + i / 2 % 2 * 2 + i / 4;
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(sign * rest));
    const auto bf16 = static_cast<std::uint16_t>(bits >> 16);
    std::memcpy(main + at / 32 * main_stride + at % 32 * 2, &bf16, 2);
    const auto least = std::bit_cast<std::uint32_t>(static_cast<float>(sign * (size - rest)));
    const auto least_bf16 = static_cast<std::uint16_t>(least >> 16);
    std::memcpy(low + at * 2, &least_bf16, 2);
    out.low |= std::uint64_t{size != rest} << (at / 2);
  }
  return out;
}

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(split_tiles_impl);

DigitGroup split_digits_for_tiles(const std::uint8_t* codes, float scale, std::uint8_t* main,
                                  std::int64_t main_stride, std::uint8_t* low) {
  return HWY_DYNAMIC_DISPATCH(split_tiles_impl)(codes, scale, main, main_stride, low);
}

}  // namespace sluice::cpu
#endif
