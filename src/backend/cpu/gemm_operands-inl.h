// gemm_operands-inl.h - how the GEMMs read weights and scales, and add a group's sums to the
// outputs; included per target.
#if defined(SLUICE_GEMM_OPERANDS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SLUICE_GEMM_OPERANDS_INL_H_
#undef SLUICE_GEMM_OPERANDS_INL_H_
#else
#define SLUICE_GEMM_OPERANDS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "backend/cpu/byte_dot-inl.h"
#include "backend/cpu/prepared_experts.h"

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

HWY_INLINE void load_scales(const PreparedMatrix& m, std::int64_t first, int count, float* out) {
  namespace hn = hwy::HWY_NAMESPACE;
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
    const hn::CappedTag<std::uint32_t, kBlockN> wide;
    const hn::Rebind<std::uint16_t, decltype(wide)> narrow;
    const hn::RebindToFloat<decltype(wide)> floats;
    const int lanes = static_cast<int>(hn::Lanes(wide));
    for (int i = 0; i < count * kBlockN; i += lanes) {
      const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(wide, hn::LoadU(narrow, in + i)));
      hn::StoreU(hn::BitCast(floats, bits), floats, out + i);
    }
  } else {
    std::memcpy(out, static_cast<const float*>(m.scales) + first * kBlockN,
                static_cast<std::size_t>(count) * kBlockN * 4);
  }
}

#if HWY_TARGET != HWY_SCALAR

/// Groups of 128 k of one block, while `blocks` blocks take turns: `ahead` after the one at index
/// `at`, group `group` of its block. Behind a block's last group comes the block that follows in
/// its place. Past the last block that is memory which is asked for and never read.
HWY_INLINE std::int64_t group_ahead(std::int64_t at, std::int64_t group, std::int64_t num_groups,
                                    int blocks, int ahead) {
  return at + ahead + (group + ahead < num_groups ? 0 : (blocks - 1) * num_groups);
}

HWY_INLINE const std::uint8_t* codes_of(const PreparedMatrix& m, std::int64_t block_group) {
  return m.codes + block_group * kGroupLines * kLineBytes;
}

/// A block's scales are a few bytes for each of its kilobytes of codes: too slow a stream for a
/// processor to see. Asked for so many groups ahead.
inline constexpr int kScaleGroupsAhead = 8;
HWY_INLINE void prefetch_scales(const PreparedMatrix& m, std::int64_t first) {
  __builtin_prefetch(static_cast<const std::byte*>(m.scales) +
                     first * kBlockN * static_cast<std::int64_t>(size_bytes(m.scale_dtype)));
}

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
  /// The even k of line step / 2, or the odd ones.
  void load_half(int step, ByteRegs& half) const {
    ByteRegs even, odd;
    load(step / 2, even, odd);
    half = step % 2 == 0 ? even : odd;
  }
};

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

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per target
