// byte_dot-inl.h - registers and dot products of one instruction set; included per target.
//
// PairDot  u8 x s8 pairs into int16 (vpmaddubsw), added in int16, widened to int32 at a flush.
//          A pair of products is at most w * 128 * 2, w the largest weight as stored: of int4 (15)
//          8 of them fit an int16, of e2m1 (24) 4 do, an even number of each line's two.
// VnniDot  u8 x s8 quads straight into int32 (vpdpbusd).
// WordDot  s16 x s16 pairs into int32 (vpmaddwd), added there.
//
// Highway 1.0.3 has none of these for every target, hence the intrinsics. Elsewhere all but VnniDot
// are plain Highway.
#if defined(SLUICE_BYTE_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_BYTE_DOT_INL_H_
#undef SLUICE_BYTE_DOT_INL_H_
#else
#define SLUICE_BYTE_DOT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>

#include "backend/cpu/prepared_experts.h"

#undef SLUICE_BYTE_DOT_HAS_VNNI
#if HWY_TARGET == HWY_AVX3
#define SLUICE_BYTE_DOT_HAS_VNNI 1
#else
#define SLUICE_BYTE_DOT_HAS_VNNI 0
#endif

#if HWY_TARGET != HWY_SCALAR
HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Registers of at most 64 bytes whose size is known here; scalable vectors are capped.
#if HWY_TARGET == HWY_AVX3
inline constexpr int kRegBytes = 64;
#elif HWY_TARGET == HWY_AVX2
inline constexpr int kRegBytes = 32;
#else
inline constexpr int kRegBytes = 16;
#endif
inline constexpr int kParts = kLineBytes / kRegBytes;  ///< Registers of 16 channels x 4 bytes.

using TagU8 = hn::FixedTag<std::uint8_t, kRegBytes>;
using TagI8 = hn::FixedTag<std::int8_t, kRegBytes>;
using TagI16 = hn::FixedTag<std::int16_t, kRegBytes / 2>;
using TagI32 = hn::FixedTag<std::int32_t, kRegBytes / 4>;
using TagF32 = hn::FixedTag<float, kRegBytes / 4>;
inline constexpr TagU8 kU8{};
inline constexpr TagI8 kI8{};
inline constexpr TagI16 kI16{};
inline constexpr TagI32 kI32{};
inline constexpr TagF32 kF32{};
using VU8 = hn::Vec<TagU8>;
using VI8 = hn::Vec<TagI8>;
using VI16 = hn::Vec<TagI16>;
using VI32 = hn::Vec<TagI32>;
using VF32 = hn::Vec<TagF32>;

struct ByteRegs {
  VU8 v[kParts];
};
struct IntRegs {
  VI32 v[kParts];
  HWY_INLINE void zero() {
    for (VI32& x : v) x = hn::Zero(kI32);
  }
};

HWY_INLINE VU8 high_nibbles(VU8 v) {
  const hn::Repartition<std::uint16_t, TagU8> u16;
  const auto shifted = hn::ShiftRight<4>(hn::BitCast(u16, v));
  return hn::And(hn::BitCast(kU8, shifted), hn::Set(kU8, 0x0f));
}

/// Four bytes in every 32-bit lane.
HWY_INLINE VI8 repeat_quad(const std::uint8_t* p) {
  std::int32_t quad;
  std::memcpy(&quad, p, 4);
  return hn::BitCast(kI8, hn::Set(kI32, quad));
}

/// int16 lane i = w[2i] * a[2i] + w[2i+1] * a[2i+1]; no saturation for our ranges.
HWY_INLINE VI16 dot_pairs(VU8 w, VI8 a) {
#if HWY_TARGET == HWY_AVX3
  return VI16{_mm512_maddubs_epi16(w.raw, a.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI16{_mm256_maddubs_epi16(w.raw, a.raw)};
#elif HWY_TARGET == HWY_SSE4
  return VI16{_mm_maddubs_epi16(w.raw, a.raw)};
#else
  // Even and odd bytes as int16 lanes (little endian), by shifts.
  const VI16 w16 = hn::BitCast(kI16, w), a16 = hn::BitCast(kI16, a);
  const VI16 w_even = hn::And(w16, hn::Set(kI16, 0xff));
  const VI16 a_even = hn::ShiftRight<8>(hn::ShiftLeft<8>(a16));
  return hn::Add(hn::Mul(w_even, a_even), hn::Mul(hn::ShiftRight<8>(w16), hn::ShiftRight<8>(a16)));
#endif
}

/// int32 lane i = (x[2i] + x[2i+1]) * factor.
HWY_INLINE VI32 add_pairs_times(VI16 x, std::int16_t factor) {
#if HWY_TARGET == HWY_AVX3
  return VI32{_mm512_madd_epi16(x.raw, _mm512_set1_epi16(factor))};
#elif HWY_TARGET == HWY_AVX2
  return VI32{_mm256_madd_epi16(x.raw, _mm256_set1_epi16(factor))};
#elif HWY_TARGET == HWY_SSE4
  return VI32{_mm_madd_epi16(x.raw, _mm_set1_epi16(factor))};
#else
  const VI32 x32 = hn::BitCast(kI32, x);
  const VI32 even = hn::ShiftRight<16>(hn::ShiftLeft<16>(x32));
  return hn::Mul(hn::Add(even, hn::ShiftRight<16>(x32)), hn::Set(kI32, factor));
#endif
}

struct PairDot {
  /// Lines before an int16 lane may overflow, of weights up to `largest`. A line adds two pairs.
  static constexpr int max_lines(int largest) { return 32767 / (largest * 128 * 2) / 2; }
  static constexpr int kRows = HWY_TARGET == HWY_AVX3 ? 8 : 2;  ///< That fit the registers.
  static constexpr int kFewSums =
      0;  ///< Rows whose sums would wait for themselves: vpaddw is fast.
  struct Acc {
    VI16 v[kParts];
  };
  static HWY_INLINE void zero(Acc& acc) {
    for (VI16& x : acc.v) x = hn::Zero(kI16);
  }
  static HWY_INLINE void add(const ByteRegs& w, const std::uint8_t* quad, Acc& acc) {
    const VI8 a = repeat_quad(quad);
    for (int p = 0; p < kParts; ++p) acc.v[p] = hn::Add(acc.v[p], dot_pairs(w.v[p], a));
  }
  /// sum += acc * 2^kShift
  template <int kShift>
  static HWY_INLINE void flush(const Acc& acc, IntRegs& sum) {
    for (int p = 0; p < kParts; ++p) {
      sum.v[p] = hn::Add(sum.v[p], add_pairs_times(acc.v[p], std::int16_t{1 << kShift}));
    }
  }
};

#if SLUICE_BYTE_DOT_HAS_VNNI
struct VnniDot {
  static constexpr int max_lines(int) { return kGroupLines; }  ///< All of a group.
  static constexpr int kRows = 8;
  static constexpr int kFewSums = 2;  ///< 2 rows are 4 sums. A product takes 4 or 5 cycles.
  using Acc = IntRegs;
  static HWY_INLINE void zero(Acc& acc) { acc.zero(); }
  static HWY_INLINE void add(const ByteRegs& w, const std::uint8_t* quad, Acc& acc) {
    // Written out: the target of Highway 1.0.3 that has this intrinsic also claims AVX-VNNI, which
    // not every CPU with AVX-512 VNNI has. Run only after asking the CPU.
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(acc.v[0].raw)
        : "v"(w.v[0].raw), "m"(*reinterpret_cast<const std::int32_t(*)>(quad)));
  }
  template <int kShift>
  static HWY_INLINE void flush(const Acc& acc, IntRegs& sum) {
    sum.v[0] = hn::Add(sum.v[0], hn::ShiftLeft<kShift>(acc.v[0]));
  }
};
#endif

/// Up to as many rows meet byte dot products where others would meet WordDot.
inline constexpr int kFewRows = 2;

/// int32 lane i = w[2i] * a[2i] + w[2i+1] * a[2i+1]
HWY_INLINE VI32 dot_words(VI16 w, VI16 a) {
#if HWY_TARGET == HWY_AVX3
  return VI32{_mm512_madd_epi16(w.raw, a.raw)};
#elif HWY_TARGET == HWY_AVX2
  return VI32{_mm256_madd_epi16(w.raw, a.raw)};
#elif HWY_TARGET == HWY_SSE4
  return VI32{_mm_madd_epi16(w.raw, a.raw)};
#else
  const VI32 w32 = hn::BitCast(kI32, w), a32 = hn::BitCast(kI32, a);
  const VI32 w_even = hn::ShiftRight<16>(hn::ShiftLeft<16>(w32));
  const VI32 a_even = hn::ShiftRight<16>(hn::ShiftLeft<16>(a32));
  return hn::Add(hn::Mul(w_even, a_even),
                 hn::Mul(hn::ShiftRight<16>(w32), hn::ShiftRight<16>(a32)));
#endif
}

struct WordDot {
  /// Rows whose sums, with the weights of a step, a digit and a product, fit the registers.
  static constexpr int kRows = HWY_TARGET == HWY_AVX3 ? 8 : HWY_TARGET == HWY_AVX2 ? 6 : 2;
  static HWY_INLINE void add(VI16 w, VI16 a, VI32& sum) {
    const VI32 product = dot_words(w, a);
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
    // Written out: g++ 12 gives each sum of a loop two registers otherwise, copies one to the other
    // and, short of registers then, loads the weights again for each row.
    asm("vpaddd %1, %0, %0" : "+v"(sum.raw) : "v"(product.raw));
#else
    sum = hn::Add(sum, product);
#endif
  }
};

inline constexpr const char* kInstructionSet = HWY_TARGET == HWY_AVX3   ? "AVX-512"
                                               : HWY_TARGET == HWY_AVX2 ? "AVX2"
                                               : HWY_TARGET == HWY_SSE4 ? "SSE4"
                                                                        : "128-bit vectors";

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif

#endif  // per target
