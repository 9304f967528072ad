// repack.cu - at load: int4 + scales in any strides -> packed stream
// (layout.cuh).
//
// Maths     none: a permutation, a change of sign code, and scales * 2^9 (exact; undoes the 2^-9
//           that a magnitude has as an e4m3 code).
// Operands  weight and scale as repack.h's MatrixSource; packed stream, 128 B aligned. Where rows
//           are dense and aligned, four lanes read 16 bytes of a row each and trade them (kDense).
//           Elsewhere a thread reads 4 weights at a time; what is left of a sector stays in L1.
// Tile      one block per slab of 64 rows and K step of 128; each thread writes its own 8 words.
// Warps     4, as the warpgroup that will read the slab.
// Shared    none.    Barriers  none.
// Needs     shapes checked on the host.
// Bound     bytes, each read once and written once: docs/performance-models.md.
#include <cuda_runtime.h>

#include <string>

#include "backend/cuda/check.h"
#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/sm90_w4a8/source.cuh"
#include "backend/cuda/w4a8.h"
#include "sluice/error.h"

namespace sluice::cuda {
namespace {

struct RepackParams {
  MatrixSource from[2];  // plain: [0]; gate_up: gate, up
  std::uint8_t* packed;
  RepackFindings* findings;
  int group;
  int scale_bytes;
  int expert;
  std::uint32_t flip;  // Of the codes, four in the low nibbles of a word: offset 8 is a sign bit.
  bool is_gate_up;
  bool ones_complement;
};

/// Four weights as a sign (bit 7) and magnitude (bits 2..0) per byte.
__device__ std::uint32_t to_signed(const RepackParams& p, std::uint32_t pairs, bool& has_minus8) {
  std::uint32_t q = (pairs | pairs << 8) & 0x00ff00ffu;
  q = ((q | q << 4) & 0x0f0f0f0fu) ^ p.flip;  // One weight per byte, two's complement.
  const std::uint32_t negative = q >> 3 & 0x01010101u;
  std::uint32_t magnitude = (q & 0x07070707u) ^ negative * 7;  // -1 - weight of the negative ones.
  if (!p.ones_complement) {
    magnitude += negative;  // 8 of -8: its magnitude has no place.
    has_minus8 |= (magnitude & 0x08080808u) != 0;
    magnitude &= 0x07070707u;
  }
  return magnitude | negative << 7;
}

__device__ void copy_scale(const RepackParams& p, SourceRow from, int k, std::uint8_t* dst) {
  const MatrixSource& m = p.from[from.matrix];
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
  const PackedMatrix matrix = !p.is_gate_up      ? PackedMatrix::kDown
                              : from.matrix == 0 ? PackedMatrix::kGate
                                                 : PackedMatrix::kUp;
  atomicMin(&p.findings->scale_fault, static_cast<unsigned long long>(scale_fault(
                                          p.expert, matrix, from.row, g, __float_as_uint(scale))));
}

template <bool kDense>
__global__ void __launch_bounds__(128) repack_kernel(const __grid_constant__ RepackParams p) {
  const int step = blockIdx.x, slab = blockIdx.y;
  const int num_steps = gridDim.x, num_slabs = gridDim.y;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int bytes = kSlabCodeBytes + kSlabRows * (kStepK / p.group) * p.scale_bytes;
  const int tile = slab / kSlabsPerTile;
  const int slabs_here = min(kSlabsPerTile, num_slabs - tile * kSlabsPerTile);
  std::uint8_t* out = p.packed + (static_cast<long long>(tile) * num_steps * kSlabsPerTile +
                                  step * slabs_here + slab % kSlabsPerTile) *
                                     bytes;
  const SourceRow lo = source_row(p, slab, warp, 0, lane / 4);
  const SourceRow hi = source_row(p, slab, warp, 1, lane / 4);
  bool has_minus8 = false;
  std::uint32_t words[8], set0[8], set1[8];
  load_pairs<kDense>(p, lo, step, lane % 4, set0);
  load_pairs<kDense>(p, hi, step, lane % 4, set1);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t second = to_signed(p, set1[i], has_minus8);
    // Undone by widen()'s rotate right.
    words[i] = to_signed(p, set0[i], has_minus8) | (second << 4 | second >> 28);
  }
  auto* const planes = reinterpret_cast<uint4*>(out);
  planes[thread] = make_uint4(words[0], words[1], words[2], words[3]);
  planes[128 + thread] = make_uint4(words[4], words[5], words[6], words[7]);
  if (has_minus8) p.findings->has_minus8 = 1;
  const int num_groups = kStepK / p.group;
  for (int i = thread; i < num_groups * kSlabRows; i += 128) {
    const int g = i / kSlabRows, pair = i % kSlabRows / 2, half = i % 2;
    const SourceRow from = source_row(p, slab, pair / 8, half, pair % 8);
    copy_scale(p, from, step * kStepK + g * p.group, out + kSlabCodeBytes + i * p.scale_bytes);
  }
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

}  // namespace

void launch_repack(const Repack& args, StreamHandle stream) {
  const WeightShape& s = args.shape;
  if (s.format == WeightFormat::kMxfp4) return launch_repack_mxfp4(args, stream);
  if (s.n <= 0 || s.n % 128 != 0 || s.k <= 0 || s.k % 128 != 0 ||
      (s.group != 128 && s.group != 32)) {
    throw Error(ErrorCode::kInvalidArgument, "repack: n " + std::to_string(s.n) + " and k " +
                                                 std::to_string(s.k) +
                                                 " must be positive multiples of 128, group " +
                                                 std::to_string(s.group) + " must be 128 or 32");
  }
  const RepackParams p{.from = {args.sources[0], args.sources[1]},
                       .packed = static_cast<std::uint8_t*>(args.packed),
                       .findings = args.findings,
                       .group = s.group,
                       .scale_bytes = scale_bytes(s.scale_type),
                       .expert = args.expert,
                       .flip = args.codes == CodeKind::kOffset ? 0x08080808u : 0u,
                       .is_gate_up = args.is_gate_up,
                       .ones_complement = args.code == WeightCode::kOnesComplement};
  const dim3 grid(s.k / kStepK, s.n / kSlabRows);
  const bool all_dense = is_dense(args);
  const auto kernel = all_dense ? repack_kernel<true> : repack_kernel<false>;
  kernel<<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(p);
  SLUICE_CUDA_CHECK(cudaGetLastError());
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
