// config.cuh - what the W4A8 expert kernel is made of: sizes, parameters, shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "backend/cuda/activation.cuh"
#include "backend/cuda/sm90_w4a8/layout.cuh"
#include "backend/cuda/w4a8.h"

namespace sluice::cuda {

inline constexpr int kMaxExperts = 512;
inline constexpr int kMappedTiles = 512;     ///< Token tiles whose expert a table has.
inline constexpr int kNumTokenBoxes = 5;     ///< Tensor maps for boxes of 8 << i tokens.
inline constexpr int kSharedLimit = 232448;  ///< Dynamic shared memory of one CTA on sm_90.
/// Arrivals of a warp where one lane speaks for it after __syncwarp(): of the scale warp when a
/// stage is full, of a math warp when it is empty, of whoever has read a tile slot. racecheck does
/// not follow that, so checked builds let every lane arrive. They may spill: prefill's math warps
/// have no register for it.
#ifdef SLUICE_DEVICE_CHECK
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif

/// The class whose kernels a launch takes where kPrefill64 has none.
template <KernelConfig Size>
inline constexpr KernelConfig kUsual =
    Size == KernelConfig::kPrefill64 ? KernelConfig::kPrefill : Size;

/// Where the scales of x and h meet the sums.
enum class XScale : int {
  kPerGroup,      ///< One per row and 128 of K: a factor of every unit.
  kPerRow,        ///< One for all rows: multiplies the finished sums.
  kRowThenGroup,  ///< x: one of each row, which multiplies the finished sums. h: as kPerGroup.
};

/// One instantiation of the kernel.
template <KernelConfig Size, WeightCode Code, ScaleType Scale, int Group, XScale X,
          Activations Functions = Activations::kSwiglu, WeightFormat Format = WeightFormat::kInt4,
          bool ShortK = false>
struct Config {
  /// The kernel of experts whose down has a short K, as tensor parallelism cuts them:
  /// choose_kernel.cuh.
  static constexpr bool kShortK = ShortK;
  /// The kernel of far matrices, and no others. It is for correctness: one size does.
  static constexpr bool kIsFar = Code == WeightCode::kE2M1Far;
  static_assert((Format == WeightFormat::kMxfp4) == (Code == WeightCode::kE2M1 || kIsFar));
  static_assert(!kIsFar || Size == KernelConfig::kDecode);
  static constexpr bool kIsDecode = Size == KernelConfig::kDecode;
  static constexpr WeightFormat kFormat = Format;
  static constexpr WeightCode kCode = Code;
  static constexpr ScaleType kScale = Scale;
  static constexpr XScale kXScale = X;
  /// NOTE: both kinds of loops in prefill spill, so there the second phase is a kernel of its own.
  static constexpr bool kComputesBothPhases = X != XScale::kRowThenGroup || kIsDecode;
  /// Whether a tile of `phase` ends with a stage that holds the scales of its rows, nothing else.
  __host__ __device__ static constexpr bool has_row_stage(int phase) {
    return X == XScale::kRowThenGroup && (!kComputesBothPhases || phase == 0);
  }
  static constexpr int kGroup = Group;
  /// Of K that one accumulator sums: the four scales of mxfp4 within 128 are in its codes.
  static constexpr int kUnit = Format == WeightFormat::kMxfp4 ? kStepK : Group;
  static constexpr Activations kActivations = Functions;
  static constexpr int kMathWarpgroups = kIsDecode ? 4 : 2;
  static constexpr int kMaxTokens = Size == KernelConfig::kPrefill ? 128 : 64;
  // A tile is computed in passes along K. NOTE: groups of 32 keep joined sums beside the sums, and
  // for 128 columns of two slabs there are no registers: two passes of one slab each.
  static constexpr int kPasses = kUnit == 32 && kMaxTokens == 128 ? 2 : 1;
  static constexpr int kSlabsPerPass = kSlabsPerTile / kPasses;
  static constexpr int kSlabsPerWarpgroup = kSlabsPerPass / kMathWarpgroups;
  static constexpr int kMathWarps = 4 * kMathWarpgroups;
  static constexpr int kMathThreads = 32 * kMathWarps;
  static constexpr int kThreads = kMathThreads + 128;
  // NOTE: setmaxnreg only moves registers within what the CTA got at launch: the largest multiple
  // of 8 per thread that fits. Asking for more blocks forever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kIsDecode ? 64 : 40;
  static constexpr int kMathRegisters = kIsDecode ? 104 : 232;
  static constexpr int kSlabBytes = slab_bytes(Scale, Group);
  static constexpr int kWeightBytes = kSlabsPerPass * kSlabBytes;  // per stage
  static constexpr int kTokenBytes = kMaxTokens * kStepK;          // per stage
  // Scales of a stage's tokens as the math role reads them: a thread's columns 8 j + 2 c + i, c its
  // column pair, lie side by side; the pairs' parts start in different banks.
  static constexpr int kScalePitch = kMaxTokens / 4 + 4;
  static constexpr int kScaleFloats = 4 * kScalePitch;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes + 4 * kScaleFloats;
  // Codes of one finished tile, padded so that the four tokens of a store hit different banks.
  static constexpr int kHiddenPitch = 128 + 16;
  // Whether finished tiles of y too leave through shared memory. NOTE: mxfp4's decode takes 1 %
  // longer with the stage less that is left then.
  static constexpr bool kStagesRows = !kIsDecode || Format == WeightFormat::kInt4;
  static constexpr int kRowPitch = 2 * kTileRows / kPasses + 16;  // padded for the same reason
  // What is activated of a tile of h before its last pass: f32, after the codes.
  static constexpr int kParkedAt = kMaxTokens * kHiddenPitch;
  static constexpr int kParkedBytes =
      (kPasses - 1) * kMaxTokens * (kSlabsPerPass * kSlabRows / 2) * 4;
  // NOTE: tiles of fewer steps are over before the one before has left (256 experts of 256, 64
  // rows: 318 us, and 308 by stores of the math warps).
  static constexpr int kFewestSteps = 8;
  static constexpr int kMapped = kShortK ? kMappedTiles : 0;  // see expert_of
  static constexpr int kRowBytes =
      std::max(kMaxTokens * (kStagesRows ? kRowPitch : kHiddenPitch), kParkedAt + kParkedBytes);
  static constexpr int kFixedBytes =
      kRowBytes + kMaxTokens * (4 * kMathWarps + 4) + 8 * kMaxExperts + 2 * kMapped + 1024;
  static constexpr int kStagesThatFit = (kSharedLimit - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kStagesThatFit < 9 ? kStagesThatFit : 9;
  static_assert(128 * kProducerRegisters + kMathThreads * kMathRegisters <=
                kThreads * kLaunchRegisters);
  static_assert(kStages >= 4);
};

/// A unit of work: 256 weight rows of one expert against up to kMaxTokens of its rows.
struct TileInfo {
  int phase;  ///< Index into Params::phase, or -1: no more work.
  int expert;
  int row_tile;     ///< Weight rows [256 row_tile, ...).
  int row0;         ///< First activation row.
  int num_tokens;   ///< Valid rows, 1..kMaxTokens.
  int num_slabs;    ///< 4, or 2 in the last tile of an odd n; of several row tiles, the last's.
  int ready_count;  ///< Finished tiles of the phase before that this expert needs.
  int row_tiles;    ///< Of its ticket; published: that follow without a stop, this one included.
};
static_assert(sizeof(TileInfo) == 32);

/// How the tiles of a phase make tickets.
struct TicketShape {
  int row_tiles;    ///< Of one ticket; the last of an expert may have fewer.
  int row_tickets;  ///< Tickets for all rows of the weights and one token tile.
};

enum class Epilogue : int { kBf16, kHidden };

/// One grouped GEMM.
struct Phase {
  const std::uint8_t* weights;  // [expert] packed stream
  long long expert_bytes;
  int num_steps;      // K / 128
  int num_row_tiles;  // ceil(n / 256)
  int tail_slabs;     // slabs of the last row tile
  int n;
  const float* x_scale;  // [rows, K/128], with XScale::kRowThenGroup [rows], or nullptr
  float x_static;
  Epilogue epilogue;
  ActivationParams activation;  //                           kHidden
  float h_inv_static;           // 1 / s2                    kHidden
  std::uint8_t* h;              // [rows, n/2] e4m3          kHidden
  float* h_scale;               // [rows, n/256] or nullptr  kHidden
  std::uint16_t* y;             // [rows, n] bf16            kBf16
  HomeRows home;                // or where each row goes    kBf16
};

struct Params {
  CUtensorMap x_map[2][kNumTokenBoxes];  // per phase: boxes of (128 k, 8 << i rows), 128 B swizzle
  Phase phase[2];
  int num_phases;
  int num_experts;
  const std::int32_t* num_rows;    // [num_experts]
  const std::int64_t* row_offset;  // [num_experts] or nullptr
  int max_m;
  bool chooses;  // mxfp4: only experts whose matrix in phase 0 is near, or far, as the kernel is
  int* sync;     // [0] next ticket, [1] CTAs that have left, [2 + e] finished tiles of phase 0
};

/// How far a math warp is: here, not in registers, which are for sums.
struct Progress {
  std::uint32_t tiles;        ///< That it has finished.
  std::uint32_t rows_parity;  ///< Of Shared::rows_empty, before it may write there again.
};

template <class C>
struct Shared {
  static constexpr int kTileSlots = 4;
  alignas(1024) std::uint8_t x[C::kStages][C::kTokenBytes];  // (token, k) swizzled
  alignas(128) std::uint8_t w[C::kStages][C::kWeightBytes];  // packed stream, one step
  alignas(16) float x_scale[C::kStages][C::kScaleFloats];    // see kScalePitch
  alignas(16) std::uint8_t rows[C::kRowBytes];               // (token, channel) of h or y
  float amax[C::kMathWarps][C::kMaxTokens];
  float h_inv[C::kMaxTokens];
  int tile_prefix[kMaxExperts + 1];  // token tiles of the experts before e
  int num_rows[kMaxExperts];
  TicketShape tickets[2];  // by phase
  alignas(16) TileInfo tile[kTileSlots];
  alignas(8) std::uint64_t full[C::kStages];
  std::uint64_t empty[C::kStages];
  std::uint64_t tile_full[kTileSlots];
  std::uint64_t tile_empty[kTileSlots];
  std::uint64_t rows_full;   // `rows` has a finished tile
  std::uint64_t rows_empty;  // it has left
  Progress progress[C::kMathWarps];
  // With kShortK, at the end so that all else lies where it lies in the other kernels:
  int lead;  // token tiles by which phase 0 is ahead of phase 1: tickets.cuh
  std::uint16_t expert_of[C::kMapped + 1];  // of the first token tiles
};

/// Position in a ring of stages: index and the parity its barriers are waited on.
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  template <int Stages>
  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// Launches one instantiation: one of those that CMakeLists.txt of this folder lists.
template <class C>
void launch_kernel(const Params& params, int num_ctas, cudaStream_t stream);

}  // namespace sluice::cuda
