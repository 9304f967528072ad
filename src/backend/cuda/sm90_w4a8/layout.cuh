// layout.cuh - order of bytes in the packed weight stream (docs: formats, packed stream).
//
//   expert -> tile of 256 rows -> K step of 128 -> slab of 64 rows -> codes, then scales
//
// The last tile of an expert has 2 slabs if n is an odd multiple of 128. A K step of a tile is
// contiguous (4 slabs: 16.9 KB with bf16 scales), so one bulk copy feeds one pipeline stage.
//
// Slab codes: 4096 bytes = 2 planes of 128 threads x 16 bytes. Thread t (w = t / 32, l = t % 32)
// finds word i (0..7) in plane i / 4. Word i holds, for rows r = 16w + l/4 (set 0) and r + 8 (set
// 1), the weights k = 32 (i/2) + 16 (i%2) + 4 (l%4) + b in byte b: the A fragment of wgmma m64k32.
//   set 0: sign in bit 7, magnitude in bits 2..0 of byte b
//   set 1: magnitude in bits 6..4 of byte b, sign in bit 3 of byte (b + 1) % 4
// One rotate right by 4 turns set 1 into set 0; a mask of 0x87 per byte leaves an e4m3 number that
// is the integer times 2^-9. One's complement stores ~q & 7 for negative q and adds the sign bit
// back.
//
// Slab scales: for each 32-or-128 group g of the step, 32 pairs (row r, row r + 8), pair 8w + l/4.
//
// MXFP4 (mxfp4.cuh): the same words in the same places, of e2m1 codes.
//   set 0: magnitude in bits 2..0 of nibble b, sign in bit 8 b + 7
//   set 1: magnitude in bits 2..0 of nibble 4 + b, sign in bit 8 b + 3
// Its scales are 32 pairs of words (row r, row r + 8) for the step. Bit 31 of the second says for
// the whole matrix of an expert whether it is far: scales of some row differ by more than 2^26. A
// scale whose 32 weights are all zero does not count.
//   near   bits 8 g + 4..8 g: how many powers of two scale g is above the row's base; bits 8 g + 6,
//          8 g + 5: bits 2 g + 1, 2 g of the base's code. No scale of the row is below its base
//   far    bit 31 is set in both; bits 30..23: code of the largest of the four scales; bits 22, 21:
//          its group; bits 20..0: by how many powers of two the other groups', in order, are below
//          it, 7 bits each
//
// Rows of a slab, in fragment order (r = 16w + 8h + c, h = 0 or 1, c = 0..7):
//   plain     output channel 64 slab + 16w + 2c + h: a thread owns two neighbouring channels
//   gate_up   h = 0 gate, h = 1 up, of intermediate channel 32 slab + 8w + c
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

inline constexpr int kStepK = kActivationGroup;  ///< K per pipeline stage.
inline constexpr int kTileRows = 256;            ///< Weight rows per tile.
inline constexpr int kSlabRows = 64;             ///< Rows of one wgmma.
inline constexpr int kSlabsPerTile = kTileRows / kSlabRows;
inline constexpr int kSlabCodeBytes = kSlabRows * kStepK / 2;

inline constexpr int kSyncHeader = 2;  ///< Words of sync_bytes() before the experts' counters.

constexpr int scale_bytes(ScaleType type) {
  return type == ScaleType::kE8M0 ? 1 : type == ScaleType::kBf16 ? 2 : 4;
}

constexpr int slab_bytes(ScaleType type, int group) {
  return kSlabCodeBytes + kSlabRows * (kStepK / group) * scale_bytes(type);
}

static_assert(slab_bytes(ScaleType::kBf16, 128) == 4224);
static_assert(slab_bytes(ScaleType::kF32, 32) % 128 == 0);
static_assert(slab_bytes(ScaleType::kE8M0, 32) == 17 * 256);

inline constexpr std::uint32_t kFarMatrix = 0x80000000u;
/// Where an expert's matrix has one of the words with that bit: in the first pair of all.
inline constexpr int kFarWordAt = kSlabCodeBytes + 4;
/// Powers of two between the scales of a row that e5m2 has room for beside e2m1.
inline constexpr int kMostApart = 26;
/// The largest base: 2^13 times it, the scale of sums, is a float32.
inline constexpr int kLargestBase = 218;

}  // namespace sluice::cuda
