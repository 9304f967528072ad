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

#include "backend/cpu/e4m3_parts-inl.h"

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

/// q = low + 8 * rest of 8 codes, every other one of 16.
struct Rests {
  VI16 rest, low;
};

HWY_INLINE Rests rests_of(const Parts& parts) {
  const auto is_small = is_below(parts.magnitude, kFirstLarge);
  const VI16 eighth = hn::ShiftRight<3>(hn::Add(parts.value, hn::Set(kI16, 4)));
  const VI16 rest = hn::IfThenElse(is_small, eighth, parts.value);
  const VI16 low = hn::IfThenElseZero(is_small, hn::Sub(parts.value, hn::ShiftLeft<3>(eighth)));
  return {hn::Sub(hn::Xor(rest, parts.sign), parts.sign),
          hn::Sub(hn::Xor(low, parts.sign), parts.sign)};
}

/// The low bytes of a line's words, even 4 and odd 4, or the high bytes, from lines_of(kLowFirst).
alignas(16) inline constexpr std::uint8_t kLowFirst[16] = {0, 2,  4,  6,  1, 3,  5,  7,
                                                           8, 10, 12, 14, 9, 11, 13, 15};
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
    Parts even_parts, odd_parts;
    parts_of(v, even_parts, odd_parts);
    even[c] = rests_of(even_parts);
    odd[c] = rests_of(odd_parts);
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
