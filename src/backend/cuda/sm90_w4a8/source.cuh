// source.cuh - where repacking finds the codes and scales of a slab, for the kernels of
// both weight formats. One launch takes as many experts as have their matrices in the same strides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

inline constexpr int kBatchExperts = 32;  ///< Of one launch.

/// Sources of a launch's experts, as a kernel's parameter. Plain: [0]; gate_up: gate, up.
struct SourceBatch {
  struct Place {
    const std::byte* codes[2];
    const std::byte* scales[2];
  };
  MatrixSource strides[2];  ///< Those of all experts; its pointers are the first one's.
  Place places[kBatchExperts];
  bool is_gate_up;

  [[nodiscard]] __device__ MatrixSource of(int expert, int matrix) const {
    MatrixSource m = strides[matrix];
    m.codes = places[expert].codes[matrix];
    m.scales = places[expert].scales[matrix];
    return m;
  }
};

/// Matrix and row behind fragment row (16 warp + 8 half + c) of a slab of the batch's `expert`.
struct SourceRow {
  int expert;
  int matrix;
  int row;
};
inline __device__ SourceRow source_row(const SourceBatch& batch, int expert, int slab, int warp,
                                       int half, int c) {
  if (batch.is_gate_up) return {expert, half, slab * 32 + warp * 8 + c};
  return {expert, 0, slab * kSlabRows + warp * 16 + 2 * c + half};
}

/// A row's weights 16 i + 4 q + 0..3 of the K step as they are stored, i = 0..7, q = lane % 4.
template <bool kDense>
__device__ void load_pairs(const SourceBatch& batch, SourceRow from, int step, int q,
                           std::uint32_t (&pairs)[8]) {
  const MatrixSource m = batch.of(from.expert, from.matrix);
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

/// What one launch takes of args.experts.
struct BatchOfExperts {
  SourceBatch sources;
  int count;
  bool is_dense;  ///< Rows can be read 16 bytes at a time.
};
/// From `first` on: those with the strides of `first`, kBatchExperts at most.
inline BatchOfExperts next_batch(const Repack& args, std::size_t first) {
  const auto matrices = [&](std::size_t expert) {
    const ExpertSource& e = args.experts[expert];
    struct Pair {
      const MatrixSource& of_half_0;
      const MatrixSource& of_half_1;
    };
    return args.is_gate_up ? Pair{e.gate, e.up} : Pair{e.down, e.down};
  };
  const auto is_dense = [](const MatrixSource& m) {
    return m.word_bytes == 4 && m.row_bytes % 16 == 0 &&
           reinterpret_cast<std::uintptr_t>(m.codes) % 16 == 0;
  };
  const auto have_same_strides = [](const MatrixSource& a, const MatrixSource& b) {
    return a.row_bytes == b.row_bytes && a.word_bytes == b.word_bytes &&
           a.scale_row == b.scale_row && a.scale_block == b.scale_block &&
           a.scale_group == b.scale_group && a.groups_per_block == b.groups_per_block;
  };
  const auto [first_0, first_1] = matrices(first);
  BatchOfExperts batch{.sources = {.strides = {first_0, first_1}, .is_gate_up = args.is_gate_up},
                       .count = 0,
                       .is_dense = true};
  for (std::size_t e = first; e < args.experts.size() && batch.count < kBatchExperts; ++e) {
    const auto [m0, m1] = matrices(e);
    if (!have_same_strides(m0, first_0) || !have_same_strides(m1, first_1)) break;
    batch.is_dense = batch.is_dense && is_dense(m0) && is_dense(m1);
    batch.sources.places[batch.count++] = {{m0.codes, m1.codes}, {m0.scales, m1.scales}};
  }
  return batch;
}

}  // namespace sluice::cuda
