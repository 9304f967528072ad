// random_mxfp4.cuh - codes and scales of mxfp4 from a seed, near and far ones.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/w4a8.h"
#include "bench/kernels/device_memory.cuh"

namespace sluice::cuda::bench {

/// How far apart the scales of mxfp4 are within a row.
enum class Spread {
  kFew,      ///< Up to 2^3, as quantizers make them.
  kMost,     ///< Up to 2^26: the most that is near.
  kOneFar,   ///< As kFew, but for one row of every other expert's matrices: 2^27.
  kFar,      ///< Up to 2^40.
  kZeros,    ///< As kFew; in one group of five all weights are zero and the scale is any other.
  kAllBytes  ///< Row n from 2^(n % 218 - 127) on, up to 2^26 above; of down alone.
};

/// [n rows of all experts, groups] e8m0 codes of matrices of `rows` rows.
__global__ void random_e8m0(std::uint8_t* out, std::size_t size, int groups, int rows,
                            std::uint64_t seed, Spread spread) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < size;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const std::uint32_t r = hash(seed * 0x400000001ull + i);
    const int row = static_cast<int>(i / groups % rows), group = static_cast<int>(i % groups);
    int code = 122 - static_cast<int>(r % 4);
    if (spread == Spread::kMost) code = 122 - static_cast<int>(r % 27);
    if (spread == Spread::kFar) code = 122 - static_cast<int>(r % 41);
    const bool has_far = spread == Spread::kOneFar && i / groups / rows % 2 == 1;
    if (has_far && row == rows - 3 && group < 2) code = group == 0 ? 122 : 95;
    if (spread == Spread::kZeros && r % 5 == 0) code = r % 2 == 0 ? 0 : 200;
    if (spread == Spread::kAllBytes) code = row % 218 + static_cast<int>(r % 27);
    out[i] = static_cast<std::uint8_t>(code);
  }
}

/// Zeros, of either sign, where random_e8m0() left scales far away.
__global__ void zero_far_groups(const std::uint8_t* scales, std::uint8_t* codes, std::size_t size) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < size;
       i += std::size_t{gridDim.x} * blockDim.x) {
    if (scales[i] != 0 && scales[i] != 200) continue;
    for (int j = 0; j < 16; ++j) codes[16 * i + j] = i % 3 == 0 ? 0x88 : 0;
  }
}

/// Random e2m1 pairs: of normal values whose groups reach 6 (kNormal), or all codes.
__global__ void random_e2m1(std::uint8_t* out, std::size_t n, std::uint64_t seed, Data data) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint32_t v = hash(seed * 0x100000001ull + i) & 0xff;
    if (data == Data::kNormal) {
      v = 0;
      for (int j = 0; j < 2; ++j) {
        const float x = 2.2f * normal(hash(seed * 0x100000001ull + 2 * i + j));
        const float size = fabsf(x);
        const int code = size < 0.25f  ? 0
                         : size < 0.75 ? 1
                         : size < 1.25 ? 2
                         : size < 1.75 ? 3
                         : size < 2.5  ? 4
                         : size < 3.5  ? 5
                         : size < 5    ? 6
                                       : 7;
        v |= (code | (x < 0 ? 8 : 0)) << 4 * j;
      }
    }
    out[i] = static_cast<std::uint8_t>(v);
  }
}

/// How many experts' matrices are packed as far ones.
inline int count_far(const Buffer<std::uint8_t>& packed, const WeightShape& shape,
                     int num_experts) {
  const std::vector<std::uint8_t> bytes = packed.download();
  int found = 0;
  for (int e = 0; e < num_experts; ++e) {
    found += bytes[e * packed_expert_bytes(shape) + kFarWordAt + 3] >> 7;
  }
  return found;
}

}  // namespace sluice::cuda::bench
