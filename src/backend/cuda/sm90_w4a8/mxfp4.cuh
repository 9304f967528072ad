// mxfp4.cuh - e2m1 codes and their scales' exponents -> e5m2 fragments.
//
// e5m2 holds every e2m1 value times 2^-13 .. 2^13 as a normal number. So where the scales of a row
// are at most 2^26 apart, what scale g is above the row's base ("rise", 0 .. 26) goes into the
// codes, and nothing rounds: products of a whole row share one scale, which meets the finished sum.
//
//   e2m1         0     0.5   1     1.5   2     3     4     6
//   e5m2 * 2^-13 0x00  0x04  0x08  0x0a  0x0c  0x0e  0x10  0x12     + 4 for each power of two above
//
// These eight bytes are two registers, and a byte permutation looks up four of them by the low
// three bits of four nibbles. Instructions for a word, which has eight weights of two rows:
//
//   integer pipe    a mask, two look-ups, two signs                                         5
//                   rises: for eight words one mask for each row                            0.3
//   multiply pipe   the second row's signs shifted left                                     1
//                   tables: two multiply-adds for each row and two words                    2
//                   rises: for two words one extraction for each row                        1
//                   the second row's look-up: the upper half, as a product by 1 of fp16     1
//
// The integer pipe takes an instruction of a warp in two cycles, and these loops would wait for it.
//
// int4 takes 6 or 7 (one's complement) or 3 (sign and magnitude) in all, but its scales meet every
// unit of 128: two instructions for each accumulator there, one here.
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/math.cuh"
#include "backend/cuda/ptx/wgmma.cuh"
#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// e5m2 codes of 0, 0.5, 1, 1.5 (bytes of `low`) and 2, 3, 4, 6 (of `high`).
struct E2M1Table {
  std::uint32_t low, high;
};
/// Each times 2^(rise - 13).
__device__ __forceinline__ E2M1Table e2m1_table(std::uint32_t rise) {
  return {rise * 0x04040400u + 0x0a080400u, rise * 0x04040404u + 0x12100e0cu};
}

/// Bytes of table entries by the low three bits of nibbles 0..3 of `nibbles`, whose highest bits
/// are 0: otherwise a byte becomes copies of an entry's sign.
__device__ __forceinline__ std::uint32_t look_up(const E2M1Table& t, std::uint32_t nibbles) {
  std::uint32_t bytes;  // __byte_perm() would mask the nibbles.
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(t.low), "r"(t.high), "r"(nibbles));
  return bytes;
}

/// The words of rows r and r + 8 that have their scales within 128 of K (layout.cuh).
struct ScaleWords {
  std::uint32_t lo, hi;
};
/// `scales` is this thread's first pair.
__device__ __forceinline__ ScaleWords load_scale_words(const std::uint8_t* scales) {
  const uint2 words = *reinterpret_cast<const uint2*>(scales);
  return {words.x, words.y};
}
__device__ __forceinline__ ScaleWords rises_of(const ScaleWords& near) {
  return {near.lo & 0x1f1f1f1fu, near.hi & 0x1f1f1f1fu};
}

/// Two words of the stream, k step `i` (a constant) -> the magnitudes of the step's A fragments:
/// rows r (a[0], a[2]) and r + 8 (a[1], a[3]).
__device__ __forceinline__ void look_up_step(const int i, std::uint32_t first, std::uint32_t second,
                                             const ScaleWords& rises, std::uint32_t (&a)[4]) {
  const E2M1Table lo = e2m1_table(ptx::byte_of(rises.lo, i));
  const E2M1Table hi = e2m1_table(ptx::byte_of(rises.hi, i));
  const std::uint32_t magnitudes[2] = {first & 0x77777777u, second & 0x77777777u};
  a[0] = look_up(lo, magnitudes[0]);
  a[1] = look_up(hi, ptx::upper_half(magnitudes[0]));
  a[2] = look_up(lo, magnitudes[1]);
  a[3] = look_up(hi, ptx::upper_half(magnitudes[1]));
}
/// Signs for such magnitudes.
__device__ __forceinline__ void add_signs_step(std::uint32_t first, std::uint32_t second,
                                               std::uint32_t (&a)[4]) {
  a[0] |= first & 0x80808080u;
  a[1] |= first << 4 & 0x80808080u;
  a[2] |= second & 0x80808080u;
  a[3] |= second << 4 & 0x80808080u;
}

/// A thread's 64 weights of a slab and step and the words of its two rows -> the A fragments. One k
/// step after the other: beside the sums are no registers for all tables.
__device__ __forceinline__ void widen_e2m1(const Codes& codes, const ScaleWords& near,
                                           Fragments& f) {
  const std::uint32_t words[8] = {codes.lo.x, codes.lo.y, codes.lo.z, codes.lo.w,
                                  codes.hi.x, codes.hi.y, codes.hi.z, codes.hi.w};
  const ScaleWords rises = rises_of(near);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint32_t(&a)[4] = f.a[i];
    look_up_step(i, words[2 * i], words[2 * i + 1], rises, a);
    add_signs_step(words[2 * i], words[2 * i + 1], a);
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
  }
}

/// The same in two parts and without an order: magnitudes, then the signs that belong to them.
__device__ __forceinline__ void look_up(const Codes& codes, const ScaleWords& near, Fragments& f) {
  const ScaleWords rises = rises_of(near);
  look_up_step(0, codes.lo.x, codes.lo.y, rises, f.a[0]);
  look_up_step(1, codes.lo.z, codes.lo.w, rises, f.a[1]);
  look_up_step(2, codes.hi.x, codes.hi.y, rises, f.a[2]);
  look_up_step(3, codes.hi.z, codes.hi.w, rises, f.a[3]);
}
__device__ __forceinline__ void add_signs(const Codes& codes, Fragments& f) {
  add_signs_step(codes.lo.x, codes.lo.y, f.a[0]);
  add_signs_step(codes.lo.z, codes.lo.w, f.a[1]);
  add_signs_step(codes.hi.x, codes.hi.y, f.a[2]);
  add_signs_step(codes.hi.z, codes.hi.w, f.a[3]);
}

/// The scale of a row of a near matrix, by any of its words: 2^13 times its base.
__device__ __forceinline__ float near_scale(std::uint32_t word) {
  const std::uint32_t code =
      (word >> 5 & 3) | (word >> 11 & 12) | (word >> 17 & 48) | (word >> 23 & 192);
  return __uint_as_float((code + 13) << 23);
}

/// As multiply(), of such fragments.
template <int R>
__device__ __forceinline__ void multiply_e5m2(float (&acc)[R], const Fragments& f,
                                              std::uint32_t x) {
  constexpr std::uint32_t kStep32 = 32 >> 4;  // descriptor units are 16 B
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32_e5m2(acc, f.a[i], x + i * kStep32, i > 0);
  ptx::wgmma_commit();
}
}  // namespace sluice::cuda
