// repack_mxfp4.cu - at load: e2m1 + e8m0 in any strides -> packed stream
// (layout.cuh).
//
// Two kernels. The first finds each row's base and whether the matrix is far, and leaves both in
// the words of the first step; the second repacks, and puts them into the words of all steps. A
// group of zeros may have any scale: it makes no matrix far, and is no row's base.
//
// Tile      scan: one block per 256 rows, a thread a row. Repack: as that of int4.
// Warps     8, 4.    Shared  none.    Barriers  the block's, once, in the scan.
// Needs     shapes checked on the host.
// Bound     bytes, each read once and written once; the scan reads scales, and codes where these
//           are far apart.
#include <cuda_runtime.h>

#include <bit>
#include <string>

#include "backend/cuda/check.h"
#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/sm90_w4a8/source.cuh"
#include "backend/cuda/w4a8.h"
#include "sluice/error.h"

namespace sluice::cuda {
namespace {

constexpr int kSlabBytes = slab_bytes(ScaleType::kE8M0, 32);
/// The code of kScaleLimit: it and those above are refused.
constexpr int kCodeLimit = std::bit_cast<std::uint32_t>(kScaleLimit) >> 23;

struct Mxfp4Params {
  SourceBatch sources;
  std::uint8_t* packed;      // Of the batch's first expert.
  std::size_t expert_bytes;  // Packed, of each.
  RepackFindings* findings;
  int expert;  // Number of the batch's first one.

  [[nodiscard]] __device__ std::uint8_t* packed_of(int e) const {
    return packed + e * expert_bytes;
  }
};

/// Scale codes of a row within one step.
struct RowScales {
  int code[4];
  std::uint32_t used = 15;  // Bit g: group g has a weight that is not 0.
};

/// The least and the largest of some codes; of none, `least` is the greater one.
struct Range {
  int least = 255, largest = -1;
  __device__ void add(const RowScales& scales) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if ((scales.used >> g & 1) == 0) continue;
      least = min(least, scales.code[g]);
      largest = max(largest, scales.code[g]);
    }
  }
};

__device__ RowScales load_scales(const Mxfp4Params& p, SourceRow from, int step) {
  const MatrixSource m = p.sources.of(from.expert, from.matrix);
  RowScales scales;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int g = 4 * step + i;
    const long long at = from.row * m.scale_row + g / m.groups_per_block * m.scale_block +
                         g % m.groups_per_block * m.scale_group;
    scales.code[i] = static_cast<int>(m.scales[at]);
  }
  return scales;
}

/// Which of the row's four groups have a weight that is not 0.
__device__ std::uint32_t used_groups(const Mxfp4Params& p, SourceRow from, int step) {
  const MatrixSource m = p.sources.of(from.expert, from.matrix);
  const std::byte* const row = m.codes + from.row * m.row_bytes;
  std::uint32_t used = 0;
  for (int i = 0; i < kStepK / 4; ++i) {  // four weights at a time
    const int k = step * kStepK + 4 * i;
    const std::uint32_t four =
        *reinterpret_cast<const std::uint16_t*>(row + k / 8 * m.word_bytes + k % 8 / 2);
    if ((four & 0x7777u) != 0) used |= 1u << i / 8;
  }
  return used;
}

/// Of a row: over all its scales, or, where these are too far apart, over those in use.
__device__ Range find_range(const Mxfp4Params& p, SourceRow from, int num_steps) {
  Range all, used;
  for (int step = 0; step < num_steps; ++step) all.add(load_scales(p, from, step));
  if (all.largest - all.least <= kMostApart) return all;
  for (int step = 0; step < num_steps; ++step) {
    RowScales scales = load_scales(p, from, step);
    scales.used = used_groups(p, from, step);
    used.add(scales);
  }
  return used;
}

/// The bits of a base's code in a row's word, and back.
__device__ std::uint32_t base_bits(int code) {
  const auto c = static_cast<std::uint32_t>(code);
  return (c & 3) << 5 | (c & 12) << 11 | (c & 48) << 17 | (c & 192) << 23;
}
__device__ int base_of(std::uint32_t word) {
  return static_cast<int>((word >> 5 & 3) | (word >> 11 & 12) | (word >> 17 & 48) |
                          (word >> 23 & 192));
}

__global__ void __launch_bounds__(kTileRows)
    scan_kernel(const __grid_constant__ Mxfp4Params p, int num_steps, int num_slabs) {
  const int tile = blockIdx.x, expert = blockIdx.y, thread = threadIdx.x;
  std::uint8_t* const packed = p.packed_of(expert);
  const int in_tile = thread / kSlabRows, slab = tile * kSlabsPerTile + in_tile;
  const int warp = thread % kSlabRows / 16, half = thread / 8 % 2, c = thread % 8;
  bool is_far = false;
  if (slab < num_slabs) {
    const SourceRow from = source_row(p.sources, expert, slab, warp, half, c);
    const Range range = find_range(p, from, num_steps);
    const int base = range.largest < 0 ? 127 : min(range.least, kLargestBase);
    is_far = range.largest - base > kMostApart;
    std::uint8_t* const words =
        packed + (static_cast<long long>(tile) * num_steps * kSlabsPerTile + in_tile) * kSlabBytes +
        kSlabCodeBytes;
    // Atomic: another block may be writing bit 31 of one of them.
    atomicOr(reinterpret_cast<std::uint32_t*>(words) + 2 * (8 * warp + c) + half, base_bits(base));
  }
  if (__syncthreads_or(is_far ? 1 : 0) == 0 || thread != 0) return;
  atomicOr(reinterpret_cast<std::uint32_t*>(packed + kFarWordAt), kFarMatrix);
  p.findings->has_far = 1;
}

__device__ void report(const Mxfp4Params& p, SourceRow from, int group, int code) {
  const PackedMatrix matrix = !p.sources.is_gate_up ? PackedMatrix::kDown
                              : from.matrix == 0    ? PackedMatrix::kGate
                                                    : PackedMatrix::kUp;
  const std::uint32_t bits = code == 255 ? 0x7fc00000u
                             : code == 0 ? 0x00400000u
                                         : static_cast<std::uint32_t>(code) << 23;
  atomicMin(&p.findings->scale_fault, static_cast<unsigned long long>(scale_fault(
                                          p.expert + from.expert, matrix, from.row, group, bits)));
}

/// A row's word of a near matrix.
__device__ std::uint32_t near_word(int base, const RowScales& scales) {
  std::uint32_t word = base_bits(base);
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int rise = scales.used >> g & 1 ? scales.code[g] - base : 0;
    word |= static_cast<std::uint32_t>(rise) << 8 * g;
  }
  return word;
}

/// A row's word of a far matrix.
__device__ std::uint32_t far_word(const Mxfp4Params& p, SourceRow from, int step,
                                  const RowScales& scales) {
  if (scales.used == 0) return kFarMatrix | 127u << 23;
  Range range;
  range.add(scales);
  const int largest = range.largest;
  int at = 0;
  while ((scales.used >> at & 1) == 0 || scales.code[at] != largest) ++at;
  std::uint32_t word =
      kFarMatrix | static_cast<std::uint32_t>(largest) << 23 | static_cast<std::uint32_t>(at) << 21;
  for (int g = 0; g < 4; ++g) {
    if (g == at) continue;
    const int below = scales.used >> g & 1 ? largest - scales.code[g] : 0;
    if (below > 127 && largest < kCodeLimit) report(p, from, 4 * step + g, scales.code[g]);
    word |= static_cast<std::uint32_t>(min(below, 127)) << 7 * (g < at ? g : g - 1);
  }
  return word;
}

/// Of four nibbles, the highest bits at bits 8 b + 3.
__device__ std::uint32_t signs_of(std::uint32_t four) {
  return (four & 0x8u) | (four & 0x80u) << 4 | (four & 0x800u) << 8 | (four & 0x8000u) << 12;
}

template <bool kDense>
__global__ void __launch_bounds__(128) repack_kernel(const __grid_constant__ Mxfp4Params p) {
  const int step = blockIdx.x, slab = blockIdx.y, expert = blockIdx.z;
  const int num_steps = gridDim.x, num_slabs = gridDim.y;
  std::uint8_t* const packed = p.packed_of(expert);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int tile = slab / kSlabsPerTile;
  const int slabs_here = min(kSlabsPerTile, num_slabs - tile * kSlabsPerTile);
  std::uint8_t* const out = packed + (static_cast<long long>(tile) * num_steps * kSlabsPerTile +
                                      step * slabs_here + slab % kSlabsPerTile) *
                                         kSlabBytes;
  // What the scan left is overwritten meanwhile, by words with the same far bit and, of near
  // matrices, the same base.
  const auto* const answer = reinterpret_cast<const volatile std::uint32_t*>(packed + kFarWordAt);
  const bool is_far = (*answer & kFarMatrix) != 0;
  const SourceRow lo = source_row(p.sources, expert, slab, warp, 0, lane / 4);
  const SourceRow hi = source_row(p.sources, expert, slab, warp, 1, lane / 4);
  std::uint32_t words[8], set0[8], set1[8];
  load_pairs<kDense>(p.sources, lo, step, lane % 4, set0);
  load_pairs<kDense>(p.sources, hi, step, lane % 4, set1);
  std::uint32_t used_lo = 0, used_hi = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t a = set0[i] & 0xffffu, b = set1[i] & 0xffffu;
    words[i] = (a & 0x7777u) | (b & 0x7777u) << 16 | signs_of(a) << 4 | signs_of(b);
    if ((a & 0x7777u) != 0) used_lo |= 1u << i / 2;
    if ((b & 0x7777u) != 0) used_hi |= 1u << i / 2;
  }
  auto* const planes = reinterpret_cast<uint4*>(out);
  planes[thread] = make_uint4(words[0], words[1], words[2], words[3]);
  planes[128 + thread] = make_uint4(words[4], words[5], words[6], words[7]);
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {  // The four lanes that share the rows.
    used_lo |= __shfl_xor_sync(0xffffffffu, used_lo, d);
    used_hi |= __shfl_xor_sync(0xffffffffu, used_hi, d);
  }
  // Of each four lanes the first has the words of the lower row, the second of the upper one.
  if (lane % 4 >= 2) return;
  const bool is_high = lane % 4 == 1;
  const SourceRow from = is_high ? hi : lo;
  RowScales scales = load_scales(p, from, step);
  scales.used = is_high ? used_hi : used_lo;
  for (int g = 0; g < 4; ++g) {
    if (scales.code[g] >= kCodeLimit) report(p, from, 4 * step + g, scales.code[g]);
  }
  const int place = 2 * (8 * warp + lane / 4) + lane % 4;
  const auto* const first_step = reinterpret_cast<const volatile std::uint32_t*>(
      packed +
      (static_cast<long long>(tile) * num_steps * kSlabsPerTile + slab % kSlabsPerTile) *
          kSlabBytes +
      kSlabCodeBytes);
  reinterpret_cast<std::uint32_t*>(out + kSlabCodeBytes)[place] =
      is_far ? far_word(p, from, step, scales) : near_word(base_of(first_step[place]), scales);
}

/// The words of the first step of all tiles begin as zeros; its codes come later anyway.
void clear_first_step(const Mxfp4Params& p, int num_experts, int num_steps, int num_slabs,
                      cudaStream_t stream) {
  constexpr std::size_t kStepBytes = std::size_t{kSlabsPerTile} * kSlabBytes;
  const std::size_t tile_bytes = static_cast<std::size_t>(num_steps) * kStepBytes;
  const auto whole_tiles = static_cast<std::size_t>(num_slabs / kSlabsPerTile);
  const auto rest = static_cast<std::size_t>(num_slabs % kSlabsPerTile);
  const auto clear = [&](std::uint8_t* first, std::size_t num_tiles) {
    SLUICE_CUDA_CHECK(cudaMemset2DAsync(first, tile_bytes, 0, kStepBytes, num_tiles, stream));
  };
  const auto count = static_cast<std::size_t>(num_experts);
  if (rest == 0) return clear(p.packed, whole_tiles * count);
  for (std::size_t e = 0; e < count; ++e) {
    std::uint8_t* const packed = p.packed + e * p.expert_bytes;
    if (whole_tiles > 0) clear(packed, whole_tiles);
    SLUICE_CUDA_CHECK(
        cudaMemsetAsync(packed + whole_tiles * tile_bytes, 0, rest * kSlabBytes, stream));
  }
}

}  // namespace

void launch_repack_mxfp4(const Repack& args, StreamHandle handle) {
  const WeightShape& s = args.shape;
  if (s.n <= 0 || s.n % 128 != 0 || s.k <= 0 || s.k % 128 != 0 || s.group != 32) {
    throw Error(ErrorCode::kInvalidArgument, "repack: n " + std::to_string(s.n) + " and k " +
                                                 std::to_string(s.k) +
                                                 " must be positive multiples of 128, group " +
                                                 std::to_string(s.group) + " must be 32");
  }
  const auto stream = static_cast<cudaStream_t>(handle);
  const int num_steps = s.k / kStepK, num_slabs = s.n / kSlabRows;
  const auto num_tiles = static_cast<unsigned>((s.n + kTileRows - 1) / kTileRows);
  const std::size_t expert_bytes = packed_expert_bytes(s);
  BatchOfExperts batch;
  for (std::size_t e = 0; e < args.experts.size(); e += static_cast<std::size_t>(batch.count)) {
    batch = next_batch(args, e);
    const Mxfp4Params p{.sources = batch.sources,
                        .packed = static_cast<std::uint8_t*>(args.packed) + e * expert_bytes,
                        .expert_bytes = expert_bytes,
                        .findings = args.findings,
                        .expert = args.expert + static_cast<int>(e)};
    const auto count = static_cast<unsigned>(batch.count);
    clear_first_step(p, batch.count, num_steps, num_slabs, stream);
    scan_kernel<<<dim3(num_tiles, count), kTileRows, 0, stream>>>(p, num_steps, num_slabs);
    SLUICE_CUDA_CHECK(cudaGetLastError());
    const auto kernel = batch.is_dense ? repack_kernel<true> : repack_kernel<false>;
    kernel<<<dim3(num_steps, num_slabs, count), 128, 0, stream>>>(p);
    SLUICE_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace sluice::cuda
