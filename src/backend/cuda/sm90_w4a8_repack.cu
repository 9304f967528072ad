// sm90_w4a8_repack.cu - at load: canonical int4 + scales -> packed stream (sm90_w4a8_layout.cuh).
//
// Maths     none: a permutation, a change of sign code, and scales * 2^9 (exact; undoes the 2^-9
//           that a magnitude has as an e4m3 code).
// Operands  weight [n, k/2] u8, k fastest; scale [n, k/group]; packed stream, 128 B aligned.
// Tile      one block per slab of 64 rows and K step of 128; each thread writes its own 8 words.
// Warps     4, as the warpgroup that will read the slab.
// Shared    none.    Barriers  none.
// Needs     shapes checked on the host.
// Bound     bytes; once per load, not tuned.
#include <cuda_runtime.h>

#include <string>

#include "backend/cuda/check.h"
#include "backend/cuda/sm90_w4a8_layout.cuh"
#include "backend/cuda/w4a8.h"
#include "sluice/error.h"

namespace sluice::cuda {
namespace {

struct RepackParams {
  const std::uint8_t* weight[2];  // plain: [0]; gate_up: gate, up
  const void* scale[2];
  std::uint8_t* packed;
  int k;
  int group;
  int scale_bytes;
  bool is_gate_up;
  bool ones_complement;
};

/// Matrix and row behind fragment row (16 warp + 8 half + c) of a slab.
struct SourceRow {
  int matrix;
  int row;
};
__device__ SourceRow source_row(const RepackParams& p, int slab, int warp, int half, int c) {
  if (p.is_gate_up) return {half, slab * 32 + warp * 8 + c};
  return {0, slab * kSlabRows + warp * 16 + 2 * c + half};
}

/// Four weights k..k+3 as a sign (bit 7) and magnitude (bits 2..0) per byte.
__device__ std::uint32_t load_signed(const RepackParams& p, SourceRow from, int k) {
  const std::uint8_t* src =
      p.weight[from.matrix] + static_cast<long long>(from.row) * (p.k / 2) + k / 2;
  std::uint32_t word = 0;
  for (int b = 0; b < 4; ++b) {
    const std::uint32_t nibble = (src[b / 2] >> (b % 2 * 4)) & 0xf;
    const bool negative = nibble >= 8;
    std::uint32_t magnitude = nibble & 7;
    if (negative) magnitude = p.ones_complement ? ~nibble & 7 : (16 - nibble) & 7;
    word |= (magnitude | (negative ? 0x80u : 0u)) << (8 * b);
  }
  return word;
}

__device__ void copy_scale(const RepackParams& p, SourceRow from, int k, std::uint8_t* dst) {
  const long long at = static_cast<long long>(from.row) * (p.k / p.group) + k / p.group;
  if (p.scale_bytes == 2) {
    const std::uint32_t bits = static_cast<const std::uint16_t*>(p.scale[from.matrix])[at];
    const float scaled = __uint_as_float(bits << 16) * 512.0f;
    *reinterpret_cast<std::uint16_t*>(dst) =
        static_cast<std::uint16_t>(__float_as_uint(scaled) >> 16);
  } else {
    *reinterpret_cast<float*>(dst) = static_cast<const float*>(p.scale[from.matrix])[at] * 512.0f;
  }
}

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
  for (int i = 0; i < 8; ++i) {
    const int k = step * kStepK + i / 2 * 32 + i % 2 * 16 + lane % 4 * 4;
    const std::uint32_t set0 = load_signed(p, lo, k);
    const std::uint32_t set1 = load_signed(p, hi, k);
    const std::uint32_t turned = set1 << 4 | set1 >> 28;  // undone by widen()'s rotate right
    reinterpret_cast<std::uint32_t*>(out + i / 4 * 2048 + thread * 16)[i % 4] = set0 | turned;
  }
  const int num_groups = kStepK / p.group;
  for (int i = thread; i < num_groups * kSlabRows; i += 128) {
    const int g = i / kSlabRows, pair = i % kSlabRows / 2, half = i % 2;
    const SourceRow from = source_row(p, slab, pair / 8, half, pair % 8);
    copy_scale(p, from, step * kStepK + g * p.group, out + kSlabCodeBytes + i * p.scale_bytes);
  }
}

__global__ void find_minus8_kernel(const std::uint8_t* codes, std::size_t num_bytes,
                                   std::int32_t* found) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  bool any = false;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < num_bytes; i += stride) {
    any |= (codes[i] & 0xf) == 8 || codes[i] >> 4 == 8;
  }
  if (any) *found = 1;
}

void launch_repack(const RepackParams& p, int n, StreamHandle stream) {
  if (n <= 0 || n % 128 != 0 || p.k <= 0 || p.k % 128 != 0 || (p.group != 128 && p.group != 32)) {
    throw Error(ErrorCode::kInvalidArgument, "repack: n " + std::to_string(n) + " and k " +
                                                 std::to_string(p.k) +
                                                 " must be positive multiples of 128, group " +
                                                 std::to_string(p.group) + " must be 128 or 32");
  }
  const dim3 grid(p.k / kStepK, n / kSlabRows);
  repack_kernel<<<grid, 128, 0, static_cast<cudaStream_t>(stream)>>>(p);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_repack_gate_up(const RepackGateUp& args, StreamHandle stream) {
  launch_repack({.weight = {args.gate, args.up},
                 .scale = {args.gate_scale, args.up_scale},
                 .packed = static_cast<std::uint8_t*>(args.packed),
                 .k = args.hidden,
                 .group = args.group,
                 .scale_bytes = scale_bytes(args.scale_type),
                 .is_gate_up = true,
                 .ones_complement = args.code == WeightCode::kOnesComplement},
                2 * args.intermediate, stream);
}

void launch_repack_plain(const RepackPlain& args, StreamHandle stream) {
  launch_repack({.weight = {args.weight, nullptr},
                 .scale = {args.scale, nullptr},
                 .packed = static_cast<std::uint8_t*>(args.packed),
                 .k = args.shape.k,
                 .group = args.shape.group,
                 .scale_bytes = scale_bytes(args.shape.scale_type),
                 .is_gate_up = false,
                 .ones_complement = args.code == WeightCode::kOnesComplement},
                args.shape.n, stream);
}

void launch_find_minus8(const std::uint8_t* codes, std::size_t num_bytes, std::int32_t* found,
                        StreamHandle stream) {
  if (num_bytes == 0) return;
  find_minus8_kernel<<<1024, 256, 0, static_cast<cudaStream_t>(stream)>>>(codes, num_bytes, found);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
