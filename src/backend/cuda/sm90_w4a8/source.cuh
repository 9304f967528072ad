// source.cuh - where repacking finds the codes of a slab: for kernels whose parameters
// have MatrixSource from[2] (plain: [0]; gate_up: gate, up) and is_gate_up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

/// Matrix and row behind fragment row (16 warp + 8 half + c) of a slab.
struct SourceRow {
  int matrix;
  int row;
};
template <class Params>
__device__ SourceRow source_row(const Params& p, int slab, int warp, int half, int c) {
  if (p.is_gate_up) return {half, slab * 32 + warp * 8 + c};
  return {0, slab * kSlabRows + warp * 16 + 2 * c + half};
}

/// A row's weights 16 i + 4 q + 0..3 of the K step as they are stored, i = 0..7, q = lane % 4.
template <bool kDense, class Params>
__device__ void load_pairs(const Params& p, SourceRow from, int step, int q,
                           std::uint32_t (&pairs)[8]) {
  const MatrixSource& m = p.from[from.matrix];
  const std::byte* const row = m.codes + from.row * m.row_bytes;
  if constexpr (!kDense) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int k = step * kStepK + 16 * i + 4 * q;
      pairs[i] = *reinterpret_cast<const std::uint16_t*>(row + k / 8 * m.word_bytes + k % 8 / 2);
    }
    return;
  }
  // Lane r of the four has the bytes of i = 2 r and 2 r + 1; word[q] is what lane q needs of them.
  const uint4 w = *reinterpret_cast<const uint4*>(row + step * (kStepK / 2) + 16 * q);
  std::uint32_t word[4] = {__byte_perm(w.x, w.z, 0x5410), __byte_perm(w.x, w.z, 0x7632),
                           __byte_perm(w.y, w.w, 0x5410), __byte_perm(w.y, w.w, 0x7632)};
  // A transposition of 4 x 4 words over 4 lanes: of 2 x 2 within both halves, then of the halves.
  const auto trade = [q](std::uint32_t& low, std::uint32_t& high, int bit) {
    const bool is_high = (q & bit) != 0;
    const std::uint32_t got = __shfl_xor_sync(0xffffffffu, is_high ? low : high, bit);
    (is_high ? low : high) = got;
  };
  trade(word[0], word[1], 1);
  trade(word[2], word[3], 1);
  trade(word[0], word[2], 2);
  trade(word[1], word[3], 2);
#pragma unroll
  for (int i = 0; i < 8; ++i) pairs[i] = word[i / 2] >> (i % 2 * 16) & 0xffff;
}

/// Whether rows can be read 16 bytes at a time.
inline bool is_dense(const Repack& args) {
  const auto is = [](const MatrixSource& m) {
    return m.word_bytes == 4 && m.row_bytes % 16 == 0 &&
           reinterpret_cast<std::uintptr_t>(m.codes) % 16 == 0;
  };
  return is(args.sources[0]) && (!args.is_gate_up || is(args.sources[1]));
}

}  // namespace sluice::cuda
