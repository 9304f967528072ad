// e4m3_parts-inl.h - 16 e4m3 codes as whole numbers, in vectors of 128 bits; for digits.cc and
// tile_digits.cc, once for each target.
//
// A code's value times 2^9 is a whole number of up to 18 bits: a mantissa times a power of two.
// Below 2^-3 it fits an int16; from there on its last three bits are zero, and it counts by 2^6.
#if defined(SLUICE_E4M3_PARTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_E4M3_PARTS_INL_H_
#undef SLUICE_E4M3_PARTS_INL_H_
#else
#define SLUICE_E4M3_PARTS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

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
inline constexpr int kFirstLarge = 4;  ///< Exponent from which on values count by 2^6.

/// Words 0 2 1 3 of each half.
alignas(16) inline constexpr std::uint8_t kPairs[16] = {0, 1, 4,  5,  2,  3,  6,  7,
                                                        8, 9, 12, 13, 10, 11, 14, 15};

/// Of 8 codes, every other one of 16.
struct Parts {
  VU16 magnitude;  ///< Of the code.
  VI16 value;      ///< By 2^9 or 2^6.
  VI16 sign;       ///< All bits.
};

/// Of 16 codes: those of k 0 2 4 .. and of k 1 3 5 ..
HWY_INLINE void parts_of(VU8 codes, Parts& even, Parts& odd) {
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
  const auto value = [&](VU16 m, VU16 power_low, VU16 power_high) HWY_ATTR {
    return hn::BitCast(kI16, hn::Mul(m, hn::Or(power_low, hn::ShiftLeft<8>(power_high))));
  };
  even = {evens(magnitude), value(evens(mantissa), evens(low), evens(high)),
          hn::ShiftRight<15>(hn::ShiftLeft<8>(signs))};
  odd = {odds(magnitude), value(odds(mantissa), odds(low), odds(high)), hn::ShiftRight<15>(signs)};
}

/// Which magnitudes have a smaller exponent.
HWY_INLINE hn::Mask<decltype(kI16)> is_below(VU16 magnitude, int exponent) {
  return hn::Lt(hn::BitCast(kI16, magnitude),
                hn::Set(kI16, static_cast<std::int16_t>(exponent * 8)));
}

/// int32 lanes: sums of two int16.
HWY_INLINE VI32 add_pairs(VI16 v) {
  const VI32 pairs = hn::BitCast(kI32, v);
  return hn::Add(hn::ShiftRight<16>(hn::ShiftLeft<16>(pairs)), hn::ShiftRight<16>(pairs));
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

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per target
