// repack.cu - at load: int4 + scales in any strides -> packed stream
// (layout.cuh).
//
// Maths     none: a permutation, a change of sign code, and scales * 2^9 (exact; undoes the 2^-9
//           that a magnitude has as an e4m3 code).
// Operands  weight and scale as repack.h's MatrixSource; packed stream, 128 B aligned. Where rows
//           are dense and aligned, four lanes read 16 bytes of a row each and trade them (kDense).
//           Elsewhere a thread reads 4 weights at a time; what is left of a sector stays in L1.
// Tile      one block per expert, slab of 64 rows and K step of 128; each thread writes its own 8
//           words. Up to 32 experts a launch: one of R1's experts is too little for a GPU.
// Warps     4, as the warpgroup that will read the slab.
// Shared    none.    Barriers  none; in place, the grid's, once for each expert.
// Needs     shapes checked on the host.
// Bound     bytes, each read once and written once: docs/performance-models.md.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "backend/cuda/check.h"
#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/sm90_w4a8/source.cuh"
#include "backend/cuda/w4a8.h"
#include "sluice/error.h"

namespace sluice::cuda {
namespace {

struct RepackParams {
  SourceBatch sources;
  std::uint8_t* packed;      // Of the batch's first expert.
  std::size_t expert_bytes;  // Packed, of each.
  RepackFindings* findings;
  int group;
  int scale_bytes;
  int expert;                    // Number of the batch's first one.
  std::uint32_t flip;            // Of four codes: offset 8 is a sign bit.
  std::uint32_t of_negative[2];  // Magnitudes of -8, -7 .. -1, a byte each.
};

/// Byte i is that of the eight in `low` and `high` which bits 2..0 of nibble i of `at` number;
/// where bit 3 is set, its bit 7, eight times.
__device__ std::uint32_t look_up(std::uint32_t low, std::uint32_t high, std::uint32_t at) {
  std::uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(at));
  return bytes;
}

/// Four weights as a sign (bit 7) and magnitude (bits 2..0) per byte. Where kSignMagnitude is
/// wanted and a weight is -8, whose magnitude has no place, a bit 3 of `seen` is set.
__device__ std::uint32_t to_signed(const RepackParams& p, std::uint32_t pairs,
                                   std::uint32_t& seen) {
  const std::uint32_t nibbles = pairs ^ p.flip;  // Two's complement.
  const std::uint32_t at = nibbles & 0x7777u;
  const std::uint32_t negative = look_up(0x80808080u, 0x80808080u, nibbles);  // 0xff, others: 0x80.
  const std::uint32_t magnitude = (look_up(p.of_negative[0], p.of_negative[1], at) & negative) |
                                  (look_up(0x03020100u, 0x07060504u, at) & ~negative);
  seen |= magnitude;
  return (magnitude & 0x07070707u) | (negative & 0x40404040u) << 1;
}

__device__ void copy_scale(const RepackParams& p, SourceRow from, int k, std::uint8_t* dst) {
  const MatrixSource m = p.sources.of(from.expert, from.matrix);
  const int g = k / p.group;
  const long long at = from.row * m.scale_row + g / m.groups_per_block * m.scale_block +
                       g % m.groups_per_block * m.scale_group;
  float scale;
  if (p.scale_bytes == 2) {
    const std::uint32_t bits = reinterpret_cast<const std::uint16_t*>(m.scales)[at];
    scale = __uint_as_float(bits << 16);
    *reinterpret_cast<std::uint16_t*>(dst) =
        static_cast<std::uint16_t>(__float_as_uint(scale * 512.0f) >> 16);
  } else {
    scale = reinterpret_cast<const float*>(m.scales)[at];
    *reinterpret_cast<float*>(dst) = scale * 512.0f;
  }
  if (fabsf(scale) < kScaleLimit) return;  // Not so for NaN.
  const PackedMatrix matrix = !p.sources.is_gate_up ? PackedMatrix::kDown
                              : from.matrix == 0    ? PackedMatrix::kGate
                                                    : PackedMatrix::kUp;
  atomicMin(&p.findings->scale_fault,
            static_cast<unsigned long long>(
                scale_fault(p.expert + from.expert, matrix, from.row, g, __float_as_uint(scale))));
}

/// A K step of a slab of one of the batch's experts: what four warps pack.
struct Unit {
  int expert, slab, step;
};

/// Its codes, of which each thread has 8 words.
template <bool kDense>
__device__ void pack_codes(const RepackParams& p, Unit unit, std::uint32_t& seen,
                           std::uint32_t (&words)[8]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SourceRow lo = source_row(p.sources, unit.expert, unit.slab, warp, 0, lane / 4);
  const SourceRow hi = source_row(p.sources, unit.expert, unit.slab, warp, 1, lane / 4);
  std::uint32_t set0[8], set1[8];
  load_pairs<kDense>(p.sources, lo, unit.step, lane % 4, set0);
  load_pairs<kDense>(p.sources, hi, unit.step, lane % 4, set1);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t second = to_signed(p, set1[i], seen);
    // Undone by widen()'s rotate right.
    words[i] = to_signed(p, set0[i], seen) | (second << 4 | second >> 28);
  }
}

/// Codes, and scales from where they lie, to the packed memory.
__device__ void store_unit(const RepackParams& p, Unit unit, int num_steps, int num_slabs,
                           const std::uint32_t (&words)[8]) {
  const int thread = threadIdx.x, tile = unit.slab / kSlabsPerTile;
  const int slabs_here = min(kSlabsPerTile, num_slabs - tile * kSlabsPerTile);
  const int bytes = kSlabCodeBytes + kSlabRows * (kStepK / p.group) * p.scale_bytes;
  std::uint8_t* const out = p.packed + unit.expert * p.expert_bytes +
                            (static_cast<long long>(tile) * num_steps * kSlabsPerTile +
                             unit.step * slabs_here + unit.slab % kSlabsPerTile) *
                                bytes;
  auto* const planes = reinterpret_cast<uint4*>(out);
  planes[thread] = make_uint4(words[0], words[1], words[2], words[3]);
  planes[128 + thread] = make_uint4(words[4], words[5], words[6], words[7]);
  const int num_groups = kStepK / p.group;
  for (int i = thread; i < num_groups * kSlabRows; i += 128) {
    const int g = i / kSlabRows, pair = i % kSlabRows / 2, half = i % 2;
    const SourceRow from = source_row(p.sources, unit.expert, unit.slab, pair / 8, half, pair % 8);
    copy_scale(p, from, unit.step * kStepK + g * p.group, out + kSlabCodeBytes + i * p.scale_bytes);
  }
}

template <bool kDense>
__global__ void __launch_bounds__(128) repack_kernel(const __grid_constant__ RepackParams p) {
  const Unit unit{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y),
                  static_cast<int>(blockIdx.x)};
  std::uint32_t seen = 0, words[8];
  pack_codes<kDense>(p, unit, seen, words);
  store_unit(p, unit, gridDim.x, gridDim.y, words);
  if ((seen & 0x08080808u) != 0) p.findings->has_minus8 = 1;
}

constexpr int kUnitsInPlace = 4;   ///< Of a block, held in its registers.
constexpr int kBlocksInPlace = 8;  ///< Of an SM.

/// Where the output of an expert lies over its own codes: all of them are in registers before
/// anything is written. All blocks are there at once.
template <bool kDense>
__global__ void __launch_bounds__(128, kBlocksInPlace)
    repack_in_place_kernel(const __grid_constant__ RepackParams p, int num_experts, int num_steps,
                           int num_slabs) {
  const auto grid = cooperative_groups::this_grid();
  const int first = blockIdx.x, stride = gridDim.x, num_units = num_steps * num_slabs;
  const auto unit_of = [&](int expert, int index) {
    return Unit{expert, index / num_steps, index % num_steps};
  };
  std::uint32_t seen = 0;
  for (int e = 0; e < num_experts; ++e) {
    std::uint32_t words[kUnitsInPlace][8];
#pragma unroll
    for (int i = 0; i < kUnitsInPlace; ++i) {
      const int index = first + i * stride;
      if (index < num_units) pack_codes<kDense>(p, unit_of(e, index), seen, words[i]);
    }
    grid.sync();
#pragma unroll
    for (int i = 0; i < kUnitsInPlace; ++i) {
      const int index = first + i * stride;
      if (index < num_units) store_unit(p, unit_of(e, index), num_steps, num_slabs, words[i]);
    }
  }
  if ((seen & 0x08080808u) != 0) p.findings->has_minus8 = 1;
}

/// Signs and magnitudes as to_signed() gives them: one less of every negative magnitude.
__device__ std::uint32_t recode(std::uint32_t signed_bytes) {
  const std::uint32_t negative = signed_bytes >> 7 & 0x01010101u;
  const std::uint32_t less = (signed_bytes & 0x07070707u | 0x08080808u) - negative;
  return less & 0x07070707u | negative << 7;
}

/// One block per slab, 16 bytes of codes a thread and plane.
__global__ void __launch_bounds__(256) recode_kernel(std::uint8_t* packed, int bytes_of_slab) {
  auto* const at =
      reinterpret_cast<uint4*>(packed + static_cast<long long>(blockIdx.x) * bytes_of_slab) +
      threadIdx.x;
  const auto turn = [](std::uint32_t word) {
    const std::uint32_t set0 = word & 0x87878787u;
    const std::uint32_t set1 = (word >> 4 | word << 28) & 0x87878787u;
    const std::uint32_t turned = recode(set1);
    return recode(set0) | turned << 4 | turned >> 28;
  };
  const uint4 w = *at;
  *at = make_uint4(turn(w.x), turn(w.y), turn(w.z), turn(w.w));
}

/// Throws: kInvalidArgument.
void check_shape(const WeightShape& s) {
  if (s.n > 0 && s.n % 128 == 0 && s.k > 0 && s.k % 128 == 0 && (s.group == 128 || s.group == 32)) {
    return;
  }
  throw Error(ErrorCode::kInvalidArgument, "repack: n " + std::to_string(s.n) + " and k " +
                                               std::to_string(s.k) +
                                               " must be positive multiples of 128, group " +
                                               std::to_string(s.group) + " must be 128 or 32");
}

/// All that the current device can have at once.
int num_blocks_in_place() {
  int device = 0, num_sms = 0;
  SLUICE_CUDA_CHECK(cudaGetDevice(&device));
  SLUICE_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  return kBlocksInPlace * num_sms;
}

/// Of a batch that begins with args.experts[first].
RepackParams params_of(const Repack& args, std::size_t first, const BatchOfExperts& batch) {
  const std::size_t expert_bytes = packed_expert_bytes(args.shape);
  const bool is_ones = args.code == WeightCode::kOnesComplement;  // -1 - weight.
  return {
      .sources = batch.sources,
      .packed = static_cast<std::uint8_t*>(args.packed) + first * expert_bytes,
      .expert_bytes = expert_bytes,
      .findings = args.findings,
      .group = args.shape.group,
      .scale_bytes = scale_bytes(args.shape.scale_type),
      .expert = args.expert + static_cast<int>(first),
      .flip = args.codes == CodeKind::kOffset ? 0x8888u : 0u,
      .of_negative = {is_ones ? 0x04050607u : 0x05060708u, is_ones ? 0x00010203u : 0x01020304u}};
}

}  // namespace

void launch_repack(const Repack& args, StreamHandle stream) {
  if (args.shape.format == WeightFormat::kMxfp4) return launch_repack_mxfp4(args, stream);
  check_shape(args.shape);
  const WeightShape& s = args.shape;
  BatchOfExperts batch;
  for (std::size_t e = 0; e < args.experts.size(); e += static_cast<std::size_t>(batch.count)) {
    batch = next_batch(args, e);
    const RepackParams p = params_of(args, e, batch);
    const auto kernel = batch.is_dense ? repack_kernel<true> : repack_kernel<false>;
    kernel<<<dim3(s.k / kStepK, s.n / kSlabRows, batch.count), 128, 0,
             static_cast<cudaStream_t>(stream)>>>(p);
    SLUICE_CUDA_CHECK(cudaGetLastError());
  }
}

void launch_repack_in_place(const Repack& args, StreamHandle stream) {
  check_shape(args.shape);
  int num_steps = args.shape.k / kStepK, num_slabs = args.shape.n / kSlabRows;
  const int num_blocks = std::min(num_blocks_in_place(), num_steps * num_slabs);
  BatchOfExperts batch;
  for (std::size_t e = 0; e < args.experts.size(); e += static_cast<std::size_t>(batch.count)) {
    batch = next_batch(args, e);
    RepackParams p = params_of(args, e, batch);
    void* arguments[] = {&p, &batch.count, &num_steps, &num_slabs};
    const auto kernel =
        batch.is_dense ? repack_in_place_kernel<true> : repack_in_place_kernel<false>;
    SLUICE_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), num_blocks,
                                                  128, arguments, 0,
                                                  static_cast<cudaStream_t>(stream)));
  }
}

bool fits_in_place(const WeightShape& shape) {
  return shape.format == WeightFormat::kInt4 &&
         shape.k / kStepK * (shape.n / kSlabRows) <= num_blocks_in_place() * kUnitsInPlace;
}

void launch_recode(void* packed, const WeightShape& shape, int num_experts, StreamHandle stream) {
  const int bytes = slab_bytes(shape.scale_type, shape.group);
  const auto num_slabs =
      static_cast<unsigned>(packed_expert_bytes(shape) / static_cast<std::size_t>(bytes)) *
      static_cast<unsigned>(num_experts);
  recode_kernel<<<num_slabs, kSlabCodeBytes / sizeof(uint4), 0,
                  static_cast<cudaStream_t>(stream)>>>(static_cast<std::uint8_t*>(packed), bytes);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
