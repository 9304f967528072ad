// sm90_w4a8_layout.cuh - order of bytes in the packed weight stream (docs: formats, packed stream).
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
  return type == ScaleType::kBf16 ? 2 : 4;
}

constexpr int slab_bytes(ScaleType type, int group) {
  return kSlabCodeBytes + kSlabRows * (kStepK / group) * scale_bytes(type);
}

static_assert(slab_bytes(ScaleType::kBf16, 128) == 4224);
static_assert(slab_bytes(ScaleType::kF32, 32) % 128 == 0);

}  // namespace sluice::cuda
