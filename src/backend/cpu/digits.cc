// 16 codes at a time in vectors of 128 bits, which every instruction set has: a mantissa times a
// power of two, then the bytes of that where the layout wants them.
#include "backend/cpu/digits.h"

#include <cstring>
#include <limits>

#include "core/fail.h"
#include "sluice/quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/digits.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

/// Writes of the low digits of a group are 4 bytes for each step.
template <int kSteps>
std::uint64_t steps_with_low(const std::uint8_t* low) {
  std::uint64_t mask = 0;
  for (int step = 0; step < kSteps; ++step) {
    std::uint32_t digits;
    std::memcpy(&digits, low + step * 4, 4);
    mask |= std::uint64_t{digits != 0} << step;
  }
  return mask;
}

#if HWY_TARGET == HWY_SCALAR

DigitGroup split_impl(DigitLayout layout, const std::uint8_t* codes, float scale,
                      std::uint8_t* main, std::uint8_t* low) {
  DigitGroup out;
  out.scale = scale * 0x1p-9f;
  for (int k = 0; k < kGroup; ++k) {
    const int line = k / 8, i = k % 8, half = i % 2 * 4 + i / 2;
    const bool is_nan = (codes[k] & 0x7f) == 0x7f;
    if (is_nan) out.scale = std::numeric_limits<float>::quiet_NaN();
    const auto q = is_nan ? 0 : static_cast<std::int32_t>(e4m3_to_float(codes[k]) * 512.0f);
    const int least = ((q + 4) & 7) - 4, rest = (q - least) / 8;
    const int mid = ((rest + 128) & 255) - 128, high = (rest - mid) / 256;
    out.sum[k / 32] += q;
    if (layout == DigitLayout::kWords) {
      const int at = line * 16 + i % 2 * 8 + i / 2 % 2 * 4 + i / 4 * 2;
      const auto word = static_cast<std::int16_t>(rest),
                 low_word = static_cast<std::int16_t>(least);
      std::memcpy(main + at, &word, 2);
      std::memcpy(low + at, &low_word, 2);
      continue;
    }
    std::uint8_t* const at = main + line * 16 + i % 2 * 8 + i / 2;
    at[0] = static_cast<std::uint8_t>(mid);
    at[4] = static_cast<std::uint8_t>(high);
    low[line * 8 + half] = static_cast<std::uint8_t>(least);
  }
  out.low = layout == DigitLayout::kWords ? steps_with_low<64>(low) : steps_with_low<32>(low);
  return out;
}

#else

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr hn::FixedTag<std::uint8_t, 16> kU8{};
inline constexpr hn::FixedTag<std::uint16_t, 8> kU16{};
inline constexpr hn::FixedTag<std::int16_t, 8> kI16{};
inline constexpr hn::FixedTag<std::int32_t, 4> kI32{};
inline constexpr hn::FixedTag<std::uint64_t, 2> kU64{};
using VU8 = hn::Vec<hn::FixedTag<std::uint8_t, 16> >;
using VU16 = hn::Vec<hn::FixedTag<std::uint16_t, 8> >;
using VI16 = hn::Vec<hn::FixedTag<std::int16_t, 8> >;
using VI32 = hn::Vec<hn::FixedTag<std::int32_t, 4> >;

// By exponent: the leading bit of a mantissa; the power of two that makes 2^9 times the value
// below 2^-3, and 2^6 times the value from there on.
alignas(16) inline constexpr std::uint8_t kLeading[16] = {0, 8, 8, 8, 8, 8, 8, 8,
                                                          8, 8, 8, 8, 8, 8, 8, 8};
alignas(16) inline constexpr std::uint8_t kPowerLow[16] = {1,  1,  2,  4,   1, 2, 4, 8,
                                                           16, 32, 64, 128, 0, 0, 0, 0};
alignas(16) inline constexpr std::uint8_t kPowerHigh[16] = {0, 0, 0, 0, 0, 0, 0, 0,
                                                            0, 0, 0, 0, 1, 2, 4, 8};
inline constexpr int kFirstLarge = 4;  ///< Exponent from which on no low digit is needed.

/// q = low + 8 * rest of 8 codes, every other one of 16.
struct Rests {
  VI16 rest, low;
};

HWY_INLINE Rests rests_of(VU16 mantissa, VU16 power, VU16 exponent, VI16 sign) {
  const VI16 value = hn::BitCast(kI16, hn::Mul(mantissa, power));
  const auto is_small = hn::Lt(hn::BitCast(kI16, exponent), hn::Set(kI16, kFirstLarge));
  const VI16 eighth = hn::ShiftRight<3>(hn::Add(value, hn::Set(kI16, 4)));
  const VI16 rest = hn::IfThenElse(is_small, eighth, value);
  const VI16 low = hn::IfThenElseZero(is_small, hn::Sub(value, hn::ShiftLeft<3>(eighth)));
  return {hn::Sub(hn::Xor(rest, sign), sign), hn::Sub(hn::Xor(low, sign), sign)};
}

/// 16 codes: those of k 0 2 4 .. and of k 1 3 5 ..
HWY_INLINE void rests_of_codes(VU8 codes, Rests& even, Rests& odd) {
  const VU8 magnitude = hn::And(codes, hn::Set(kU8, 0x7f));
  const VU8 exponent = hn::And(hn::BitCast(kU8, hn::ShiftRight<3>(hn::BitCast(kU16, magnitude))),
                               hn::Set(kU8, 0x0f));
  const VU8 leading = hn::TableLookupBytes(hn::Load(kU8, kLeading), exponent);
  const VU8 mantissa = hn::Or(hn::And(magnitude, hn::Set(kU8, 0x07)), leading);
  const VU8 low = hn::TableLookupBytes(hn::Load(kU8, kPowerLow), exponent);
  const VU8 high = hn::TableLookupBytes(hn::Load(kU8, kPowerHigh), exponent);
  const VU16 byte = hn::Set(kU16, 0xff);
  const auto evens = [&](VU8 v) HWY_ATTR { return hn::And(hn::BitCast(kU16, v), byte); };
  const auto odds = [&](VU8 v) HWY_ATTR { return hn::ShiftRight<8>(hn::BitCast(kU16, v)); };
  const VI16 signs = hn::BitCast(kI16, codes);
  even = rests_of(evens(mantissa), hn::Or(evens(low), hn::ShiftLeft<8>(evens(high))),
                  evens(exponent), hn::ShiftRight<15>(hn::ShiftLeft<8>(signs)));
  odd = rests_of(odds(mantissa), hn::Or(odds(low), hn::ShiftLeft<8>(odds(high))), odds(exponent),
                 hn::ShiftRight<15>(signs));
}

/// Bytes of each half, 4 words of one line, by `order`; of two vectors, the halves in turn.
struct Lines {
  VU8 first, second;
};
HWY_INLINE Lines lines_of(VI16 even, VI16 odd, VU8 order) {
  const auto e = hn::BitCast(kU64, hn::TableLookupBytes(hn::BitCast(kU8, even), order));
  const auto o = hn::BitCast(kU64, hn::TableLookupBytes(hn::BitCast(kU8, odd), order));
  return {hn::BitCast(kU8, hn::InterleaveLower(kU64, e, o)),
          hn::BitCast(kU8, hn::InterleaveUpper(kU64, e, o))};
}
/// The low bytes of a line's words, even 4 and odd 4, or the high bytes, from lines_of(kLowFirst).
alignas(16) inline constexpr std::uint8_t kLowFirst[16] = {0, 2,  4,  6,  1, 3,  5,  7,
                                                           8, 10, 12, 14, 9, 11, 13, 15};
/// Words 0 2 1 3 of each line.
alignas(16) inline constexpr std::uint8_t kPairs[16] = {0, 1, 4,  5,  2,  3,  6,  7,
                                                        8, 9, 12, 13, 10, 11, 14, 15};

/// [line][even 4, odd 4] from [line][low even 4, high even 4, low odd 4, high odd 4].
HWY_INLINE VU8 even_quads(const Lines& l) {
  const hn::FixedTag<std::uint32_t, 4> u32;
  return hn::BitCast(kU8,
                     hn::ConcatEven(u32, hn::BitCast(u32, l.second), hn::BitCast(u32, l.first)));
}
/// Digits of 16 codes, the `chunk`th of a group.
template <DigitLayout kLayout>
HWY_INLINE void store_main(const Rests& even, const Rests& odd, int chunk, std::uint8_t* main) {
  if constexpr (kLayout == DigitLayout::kWords) {
    const Lines lines = lines_of(even.rest, odd.rest, hn::Load(kU8, kPairs));
    hn::StoreU(lines.first, kU8, main + chunk * 32);
    hn::StoreU(lines.second, kU8, main + chunk * 32 + 16);
    return;
  }
  const auto bytes = [&](VI16 rest) HWY_ATTR {  // mid and high
    return hn::Or(hn::And(rest, hn::Set(kI16, 0xff)),
                  hn::AndNot(hn::Set(kI16, 0xff), hn::Add(rest, hn::Set(kI16, 128))));
  };
  const Lines lines = lines_of(bytes(even.rest), bytes(odd.rest), hn::Load(kU8, kLowFirst));
  hn::StoreU(lines.first, kU8, main + chunk * 32);
  hn::StoreU(lines.second, kU8, main + chunk * 32 + 16);
}

template <DigitLayout kLayout>
HWY_INLINE void store_low(const Rests& even, const Rests& odd, int chunk, std::uint8_t* low) {
  if constexpr (kLayout == DigitLayout::kWords) {
    const Lines lines = lines_of(even.low, odd.low, hn::Load(kU8, kPairs));
    hn::StoreU(lines.first, kU8, low + chunk * 32);
    hn::StoreU(lines.second, kU8, low + chunk * 32 + 16);
  } else {
    const Lines lines = lines_of(even.low, odd.low, hn::Load(kU8, kLowFirst));
    hn::StoreU(even_quads(lines), kU8, low + chunk * 16);
  }
}

/// int32 lanes: sums of two int16.
HWY_INLINE VI32 add_pairs(VI16 v) {
  const VI32 pairs = hn::BitCast(kI32, v);
  return hn::Add(hn::ShiftRight<16>(hn::ShiftLeft<16>(pairs)), hn::ShiftRight<16>(pairs));
}

template <DigitLayout kLayout>
DigitGroup split(const std::uint8_t* codes, float scale, std::uint8_t* main, std::uint8_t* low) {
  constexpr int kSteps = kLayout == DigitLayout::kWords ? 64 : 32;
  DigitGroup out;
  Rests even[8], odd[8];
  VU8 nan = hn::Zero(kU8);
  VI16 any_low = hn::Zero(kI16);
  for (int c = 0; c < 8; ++c) {
    const VU8 v = hn::LoadU(kU8, codes + c * 16);
    // Of a magnitude, only 0x7f and 1 more is 0x80.
    nan = hn::Or(nan, hn::Add(hn::And(v, hn::Set(kU8, 0x7f)), hn::Set(kU8, 1)));
    rests_of_codes(v, even[c], odd[c]);
    store_main<kLayout>(even[c], odd[c], c, main);
    any_low = hn::Or(any_low, hn::Or(even[c].low, odd[c].low));
  }
  const bool has_low = !hn::AllTrue(kI16, hn::Eq(any_low, hn::Zero(kI16)));
  for (int part = 0; part < 4; ++part) {
    const int c = 2 * part;
    const VI32 rests = hn::Add(hn::Add(add_pairs(even[c].rest), add_pairs(odd[c].rest)),
                               hn::Add(add_pairs(even[c + 1].rest), add_pairs(odd[c + 1].rest)));
    const VI16 lows =
        hn::Add(hn::Add(even[c].low, odd[c].low), hn::Add(even[c + 1].low, odd[c + 1].low));
    const VI32 sums = hn::Add(hn::ShiftLeft<kMidShift>(rests), add_pairs(lows));
    out.sum[part] = hn::GetLane(hn::SumOfLanes(kI32, sums));
  }
  if (has_low) {
    for (int c = 0; c < 8; ++c) store_low<kLayout>(even[c], odd[c], c, low);
    out.low = steps_with_low<kSteps>(low);
  }
  const bool has_nan = !hn::AllTrue(kU8, hn::Lt(nan, hn::Set(kU8, 0x80)));
  out.scale = has_nan ? std::numeric_limits<float>::quiet_NaN() : scale * 0x1p-9f;
  return out;
}

DigitGroup split_impl(DigitLayout layout, const std::uint8_t* codes, float scale,
                      std::uint8_t* main, std::uint8_t* low) {
  if (layout == DigitLayout::kBytes) return split<DigitLayout::kBytes>(codes, scale, main, low);
  return split<DigitLayout::kWords>(codes, scale, main, low);
}

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(split_impl);

DigitGroup split_digits(DigitLayout layout, const std::uint8_t* codes, float scale,
                        std::uint8_t* main, std::uint8_t* low) {
  SLUICE_ASSERT(layout != DigitLayout::kTiles);
  return HWY_DYNAMIC_DISPATCH(split_impl)(layout, codes, scale, main, low);
}

}  // namespace sluice::cpu
#endif
