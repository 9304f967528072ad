// w4a8.h - host side of the kernels in sm90_w4a8/: sizes, repacking, grouped GEMM, expert stage.
//
//   canonical int4 + scales --repack--> packed stream (per expert)       once, at load
//
//   x e4m3 --[gate_up: GEMM, activation, quantize]--> h e4m3 --[down: GEMM]--> y bf16     per step
//                    launch_experts() is both boxes in one persistent kernel
//
// Plain C++: no CUDA header is needed to include this. Every launcher is asynchronous on the given
// stream, allocates nothing, waits for nothing on the host, and may be captured in a CUDA graph;
// row counts are read on the device when the kernel runs. Pointers are device memory unless said
// otherwise.
//
// Rows. RowRanges (rows.h) says which rows of x, h and y an expert owns: 1..512 experts, `count` is
// needed, max_rows < 2^31. Rows of x outside these ranges may be read (their values never matter);
// rows of h and y outside them are never written. Experts without rows cost nothing. Codes are 16 B
// aligned.
//
// Determinism. The bits of one output row depend on that row and its expert's weights alone: not on
// the other rows, the row counts, the layout, or the KernelConfig. All kernels add in the same
// order, which docs/design.md (Arithmetic) states: a fresh accumulator per weight group, then f32
// fma along K. With a static scale, or one per row, the sums are multiplied by it at the end;
// before that they must be finite in f32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/rows.h"
#include "backend/scale_fault.h"
#include "sluice/activation.h"
#include "sluice/repack.h"
#include "sluice/weight_format.h"

namespace sluice::cuda {

/// A cudaStream_t.
using StreamHandle = void*;

/// Type of the weight scales, in the checkpoint and inside the packed stream.
/// kE8M0 is that of mxfp4.
enum class ScaleType : std::uint8_t { kBf16, kF32, kE8M0 };

/// Requires: one of float32, bfloat16, float8_e8m0.
[[nodiscard]] ScaleType scale_type(DType dtype);

/// How weights are stored in the packed stream; decides the instructions needed per 8 weights.
enum class WeightCode : std::uint8_t {
  kOnesComplement,  ///< int4: 6 instructions, 7 in decode's 64 columns. Always valid.
  kSignMagnitude,   ///< int4: 3 instructions. Requires: no weight is -8 (RepackFindings).
  kE2M1,            ///< mxfp4: 10.3 instructions. Requires: no matrix is far (RepackFindings).
  kE2M1Far,         ///< The same, and perhaps far matrices: kernels of their own for both kinds.
};

/// One weight matrix shape, the same for every expert. n and k are multiples of 128.
struct WeightShape {
  int n = 0;        ///< Output channels (gate_up: 2 * intermediate).
  int k = 0;        ///< Input channels.
  int group = 128;  ///< Weights per scale along k: 128 or 32.
  ScaleType scale_type = ScaleType::kBf16;
  WeightFormat format = WeightFormat::kInt4;
};

/// Throws: kUnsupported for a format that the kernels do not widen.
void check_weight_format(WeightFormat format);

/// Bytes of one expert's packed stream; a multiple of 128. Experts follow each other without gaps.
[[nodiscard]] std::size_t packed_expert_bytes(const WeightShape& shape);

/// What repacking notes about its sources, in device memory. Begin with {}.
struct RepackFindings {
  unsigned long long scale_fault = kNoFault;  ///< The first bad scale: scale_fault().
  std::int32_t has_minus8 = 0;                ///< A weight is -8: kSignMagnitude cannot say so.
  std::int32_t has_far = 0;                   ///< A matrix of mxfp4 is far: kE2M1 lacks its loops.
};

/// Repacking of gate and up together, or of down (or any single GEMM), of several experts.
struct Repack {
  WeightShape shape;  ///< Of gate and up together: n = 2 * intermediate.
  WeightCode code = WeightCode::kOnesComplement;
  CodeKind codes = CodeKind::kTwosComplement;
  bool is_gate_up = false;
  std::span<const ExpertSource> experts;  ///< Of each, gate and up, or down, is read.
  void* packed = nullptr;                 ///< packed_expert_bytes(shape) each, 128 B aligned.
  int expert = 0;                         ///< Number of the first, for findings.
  RepackFindings* findings = nullptr;     ///< Not null.
};
/// No input may overlap the output of any. Scales of int4 are multiplied by 2^9 on the way (exact).
void launch_repack(const Repack& args, StreamHandle stream);
/// Of mxfp4, which launch_repack() calls.
void launch_repack_mxfp4(const Repack& args, StreamHandle stream);

/// The same where an expert's output may overwrite its own codes and those of experts before it,
/// and nothing else of the input.   Requires: fits_in_place(args.shape).
void launch_repack_in_place(const Repack& args, StreamHandle stream);
/// Whether the registers of the current device hold such a matrix's codes. Not of mxfp4.
[[nodiscard]] bool fits_in_place(const WeightShape& shape);

/// Turns the codes of packed experts from kSignMagnitude into kOnesComplement, where they lie. A -8
/// that was packed as kSignMagnitude is -0 there, which no other weight is, so none is lost.
void launch_recode(void* packed, const WeightShape& shape, int num_experts, StreamHandle stream);

/// Packed weights of all local experts of one matrix.
struct PackedWeights {
  const void* data = nullptr;  ///< num_experts * packed_expert_bytes(shape).
  WeightShape shape;
  WeightCode code = WeightCode::kOnesComplement;
};

/// Kernel size class.
enum class KernelConfig : std::uint8_t {
  kDecode,  ///< 4 math warpgroups, token tiles of 8, 16, 32, 64: one slab of weights each.
  /// 2 math warpgroups, token tiles up to 128: two slabs each, which overlap; in groups of 32 one
  /// slab each, twice.
  kPrefill,
  /// The same with token tiles up to 64 and two slabs each. Where x has one scale per row, a launch
  /// takes kPrefill's kernels.
  kPrefill64,
};

struct ConfigProblem {
  int num_experts = 0;
  int expected_m = 0;  ///< Expected rows per expert that has rows. A hint only; never below 1.
  int max_rows = 0;    ///< Most rows any expert can have (max_m), 0 = unknown.
  bool has_row_scales = false;  ///< x has one scale per row: two kernels in kPrefill.
};
struct ConfigDevice {
  int num_sms = 132;
};
struct ConfigChoice {
  KernelConfig config = KernelConfig::kDecode;
  int num_ctas = 0;         ///< Persistent grid: one CTA per SM.
  const char* reason = "";  ///< One sentence, static storage.
};
/// Pure; needs no GPU.
[[nodiscard]] ConfigChoice choose_config(const ConfigProblem& problem, const ConfigDevice& device);

/// Bytes of the synchronization words that every GEMM launch needs: zeroed once by the caller when
/// allocated, left zeroed by every completed launch. Launches that may overlap need one each.
[[nodiscard]] std::size_t sync_bytes(int num_experts);

/// y = GEMM of rows with plain-packed weights -> bf16.
struct GroupedGemm {
  PackedWeights weights;
  RowRanges rows;
  Fp8RowsView x;
  std::uint16_t* y = nullptr;  ///< [max_rows, weights.shape.n] bf16, 16 B aligned. Or:
  HomeRows home = {};          ///< Where each row goes instead, if it has an origin.
  void* sync = nullptr;        ///< sync_bytes(rows.num_experts)
  ConfigChoice config;
};
void launch_grouped_gemm(const GroupedGemm& args, StreamHandle stream);

/// Throws: kInvalidArgument as check_activation(); kUnsupported for a function that the kernels do
/// not compute: a beta or linear_beta outside 2^-126..2^126, whose inverse they multiply by.
void check_kernel_activation(const ActivationFn& fn);

/// h = quantize(activate(gate, up)), everything in f32 from the accumulators on.
struct GateUpGemm {
  PackedWeights weights;  ///< shape {2 * intermediate, hidden}
  RowRanges rows;
  Fp8RowsView x;
  Fp8Rows h;
  void* sync = nullptr;
  ConfigChoice config;
  ActivationFn activation = {};
};
void launch_gate_up(const GateUpGemm& args, StreamHandle stream);

/// The whole expert stage in one kernel: gate_up, activation, quantize, down.
struct ExpertGemms {
  PackedWeights gate_up;  ///< shape {2 * intermediate, hidden}
  PackedWeights down;     ///< shape {hidden, intermediate}; scale_type, group, code as gate_up.
  RowRanges rows;
  Fp8RowsView x;
  Fp8Rows h;                   ///< Scratch: also read back by the down GEMM.
  std::uint16_t* y = nullptr;  ///< [max_rows, hidden] bf16, 16 B aligned. Or:
  HomeRows home = {};          ///< Where each row goes instead, if it has an origin.
  void* sync = nullptr;
  ConfigChoice config;
  ActivationFn activation = {};
};
/// Two kernels where x and h have unlike scales, but for h with scales per 128 in kDecode. Four
/// with kE2M1Far.
void launch_experts(const ExpertGemms& args, StreamHandle stream);

}  // namespace sluice::cuda
