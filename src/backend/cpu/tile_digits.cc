// 16 codes at a time in vectors of 128 bits: first how large they are together, which says how many
// low bits of a whole number have to be a digit of their own, then the digits.
#include <algorithm>
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

#include "backend/cpu/e4m3_parts-inl.h"

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

inline std::uint64_t steps_with_low(const std::uint8_t* low) {
  std::uint64_t mask = 0;
  for (int step = 0; step < kGroup / 2; ++step) {
    std::uint16_t digits;
    std::memcpy(&digits, low + step * 2, 2);
    mask |= std::uint64_t{digits != 0} << step;
  }
  return mask;
}

inline std::int32_t magnitude_of(const Magnitudes& magnitudes, int cut) {
  return (magnitudes.all() + (1 << cut) - 1) >> cut;
}

#if HWY_TARGET == HWY_SCALAR

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
    low[at] = static_cast<std::uint8_t>(sign * (size - rest));
  }
  out.low = steps_with_low(low);
  return out;
}

#else

// bf16 of 8 * i, i in [0, 8]: first and second byte.
alignas(16) inline constexpr std::uint8_t kEightLow[16] = {0,    0,    0x80, 0xc0, 0,
                                                           0x20, 0x40, 0x60, 0x80};
alignas(16) inline constexpr std::uint8_t kEightHigh[16] = {0,    0x41, 0x41, 0x41, 0x42,
                                                            0x42, 0x42, 0x42, 0x42};

/// The first bytes of a line's words, even 4 and odd 4, from both halves in the order of kPairs.
alignas(16) inline constexpr std::uint8_t kFirstBytes[16] = {0, 2, 4, 6, 8, 10, 12, 14,
                                                             0, 2, 4, 6, 8, 10, 12, 14};

/// int32 lanes: of |q|.
HWY_INLINE VI32 magnitude_sums(const Parts& parts) {
  const auto is_small = is_below(parts.magnitude, kFirstLarge);
  const VI32 large = add_pairs(hn::IfThenZeroElse(is_small, parts.value));
  const VI32 small = add_pairs(hn::IfThenElseZero(is_small, parts.value));
  return hn::Add(hn::ShiftLeft<3>(large), small);
}

struct Digits {
  VI16 main, low;
};

/// A value whose last bit counts 2^cut or more only needs another exponent to be a bf16 of 2^9
/// times it. Others are rounded to 0 .. 8 units.
HWY_INLINE Digits digits_of(const Parts& parts, int cut) {
  const auto is_small = is_below(parts.magnitude, cut + 1);
  const VI16 half = hn::Set(kI16, static_cast<std::int16_t>((1 << cut) / 2));
  const VI16 units = hn::ShiftRightSame(hn::Add(parts.value, half), cut);
  const VI16 low =
      hn::IfThenElseZero(is_small, hn::Sub(parts.value, hn::ShiftLeftSame(units, cut)));
  const VU8 index = hn::BitCast(kU8, hn::IfThenElseZero(is_small, units));
  const auto first = hn::BitCast(kI16, hn::TableLookupBytes(hn::Load(kU8, kEightLow), index));
  const auto second = hn::BitCast(kI16, hn::TableLookupBytes(hn::Load(kU8, kEightHigh), index));
  const VI16 eights = hn::Or(first, hn::ShiftLeft<8>(second));
  const VI16 fewer = hn::Set(kI16, static_cast<std::int16_t>((3 - cut) << 7));
  const VI16 small = hn::IfThenElseZero(hn::Gt(eights, hn::Zero(kI16)), hn::Sub(eights, fewer));
  const VI16 large = hn::BitCast(
      kI16, hn::Add(hn::ShiftLeft<4>(parts.magnitude), hn::Set(kU16, (127 - 7 + 9) << 7)));
  return {hn::Or(hn::IfThenElse(is_small, small, large), hn::ShiftLeft<15>(parts.sign)),
          hn::Sub(hn::Xor(low, parts.sign), parts.sign)};
}

HWY_INLINE VU8 first_bytes(const Lines& lines) {
  const VU8 order = hn::Load(kU8, kFirstBytes);
  const auto a = hn::BitCast(kU64, hn::TableLookupBytes(lines.first, order));
  const auto b = hn::BitCast(kU64, hn::TableLookupBytes(lines.second, order));
  return hn::BitCast(kU8, hn::InterleaveLower(kU64, a, b));
}

DigitGroup split_tiles_impl(const std::uint8_t* codes, float scale, std::uint8_t* main,
                            std::int64_t main_stride, std::uint8_t* low) {
  Parts even[8], odd[8];
  VU8 nan = hn::Zero(kU8);
  Magnitudes magnitudes;
  for (int part = 0; part < 4; ++part) {
    VI32 sums = hn::Zero(kI32);
    for (int c = 2 * part; c < 2 * part + 2; ++c) {
      const VU8 v = hn::LoadU(kU8, codes + c * 16);
      // Of a magnitude, only 0x7f and 1 more is 0x80.
      nan = hn::Or(nan, hn::Add(hn::And(v, hn::Set(kU8, 0x7f)), hn::Set(kU8, 1)));
      parts_of(v, even[c], odd[c]);
      sums = hn::Add(sums, hn::Add(magnitude_sums(even[c]), magnitude_sums(odd[c])));
    }
    magnitudes.of_part[part] = hn::GetLane(hn::SumOfLanes(kI32, sums)) + 32 * kRounding;
  }
  DigitGroup out;
  const int cut = magnitudes.cut();
  out.magnitude = magnitude_of(magnitudes, cut);
  VI16 any_low = hn::Zero(kI16);
  Lines lows[8];
  for (int c = 0; c < 8; ++c) {
    const Digits e = digits_of(even[c], cut), o = digits_of(odd[c], cut);
    const Lines lines = lines_of(e.main, o.main, hn::Load(kU8, kPairs));
    std::uint8_t* const to = main + c / 2 * main_stride + c % 2 * 32;
    hn::StoreU(lines.first, kU8, to);
    hn::StoreU(lines.second, kU8, to + 16);
    any_low = hn::Or(any_low, hn::Or(e.low, o.low));
    lows[c] = lines_of(e.low, o.low, hn::Load(kU8, kPairs));
  }
  if (!hn::AllTrue(kI16, hn::Eq(any_low, hn::Zero(kI16)))) {
    for (int c = 0; c < 8; ++c) hn::StoreU(first_bytes(lows[c]), kU8, low + c * 16);
    out.low = steps_with_low(low);
  }
  const bool has_nan = !hn::AllTrue(kU8, hn::Lt(nan, hn::Set(kU8, 0x80)));
  out.scale = has_nan ? std::numeric_limits<float>::quiet_NaN() : scale * 0x1p-9f;
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
