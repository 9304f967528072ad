// Four rows and four words of each at a time: 4 x 4 words are transposed in registers.
#include "backend/cpu/repack_kernel.h"

#include <cstring>

#include "backend/cpu/prepared_experts.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/repack_kernel.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace sluice::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_SCALAR

void transpose_words_impl(const std::byte* rows, std::int64_t row_bytes, std::int64_t num_words,
                          std::uint32_t flip, std::uint8_t* lines) {
  for (std::int64_t w = 0; w < num_words; ++w) {
    for (int lane = 0; lane < kBlockN; ++lane) {
      std::uint32_t word;
      std::memcpy(&word, rows + lane * row_bytes + w * 4, 4);
      word ^= flip;
      std::memcpy(lines + w * kLineBytes + lane * 4, &word, 4);
    }
  }
}

#else

using DU32 = hn::Full128<std::uint32_t>;
using DU8 = hn::Full128<std::uint8_t>;
using Words = hn::Vec<DU32>;

HWY_INLINE Words load_words(const std::byte* at, Words flip) {
  return hn::Xor(flip,
                 hn::BitCast(DU32(), hn::LoadU(DU8(), reinterpret_cast<const std::uint8_t*>(at))));
}

HWY_INLINE void store_words(Words words, std::uint8_t* at) {
  hn::StoreU(hn::BitCast(DU8(), words), DU8(), at);
}

void transpose_words_impl(const std::byte* rows, std::int64_t row_bytes, std::int64_t num_words,
                          std::uint32_t flip, std::uint8_t* lines) {
  const DU32 d;
  const Words sign = hn::Set(d, flip);
  for (std::int64_t w = 0; w < num_words; w += 4) {
    for (int lane = 0; lane < kBlockN; lane += 4) {
      const std::byte* from = rows + lane * row_bytes + w * 4;
      std::uint8_t* const to = lines + w * kLineBytes + lane * 4;
      const Words a = load_words(from, sign), b = load_words(from + row_bytes, sign);
      const Words c = load_words(from + 2 * row_bytes, sign);
      const Words e = load_words(from + 3 * row_bytes, sign);
      const Words ab_low = hn::InterleaveLower(d, a, b), ab_high = hn::InterleaveUpper(d, a, b);
      const Words ce_low = hn::InterleaveLower(d, c, e), ce_high = hn::InterleaveUpper(d, c, e);
      store_words(hn::ConcatLowerLower(d, ce_low, ab_low), to);
      store_words(hn::ConcatUpperUpper(d, ce_low, ab_low), to + kLineBytes);
      store_words(hn::ConcatLowerLower(d, ce_high, ab_high), to + 2 * kLineBytes);
      store_words(hn::ConcatUpperUpper(d, ce_high, ab_high), to + 3 * kLineBytes);
    }
  }
}

#endif

}  // namespace sluice::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::cpu {

HWY_EXPORT(transpose_words_impl);

void transpose_words(const std::byte* rows, std::int64_t row_bytes, std::int64_t num_words,
                     std::uint32_t flip, std::uint8_t* lines) {
  HWY_DYNAMIC_DISPATCH(transpose_words_impl)(rows, row_bytes, num_words, flip, lines);
}

}  // namespace sluice::cpu
#endif
