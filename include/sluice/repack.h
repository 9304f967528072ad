// repack.h - weights that lie in a device's memory, in an order of somebody else's, and how they
// get into the backend's own.
//
//   a framework's tensors, or buffers of a loader          memory of packed_bytes()
//       expert 0   expert 1   expert 2 ..   --repack, expert by expert-->   expert 0 | expert 1 ..
//
// Nothing crosses to the host. An engine that replaces its weights by the repacked ones can let
// them lie in the very memory that they are repacked into: Experts::repack() says when.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/matrix_source.h"
#include "sluice/tensor.h"

namespace sluice {

struct ExpertSource {
  MatrixSource gate;  ///< [intermediate, hidden]
  MatrixSource up;    ///< [intermediate, hidden]
  MatrixSource down;  ///< [hidden, intermediate]
};

/// The source of a matrix in host memory, or of a copy of it: dense rows.
[[nodiscard]] MatrixSource dense_source(const std::byte* codes, const std::byte* scales,
                                        std::int64_t k, int group_size);

/// What all experts of a layer have in common.
struct RepackFormat {
  ModelGeometry geometry;  ///< Of it: hidden, intermediate, group_size, format and activation.
  int num_experts = 0;     ///< Experts here, 1 .. 512.
  DType scale_dtype = DType::kBFloat16;  ///< Or kFloat32; kFloat8E8M0 of MXFP4.
  CodeKind codes = CodeKind::kTwosComplement;
  int first_expert = 0;  ///< Number of the first one, for messages.
};

/// Where packed weights lie: gate and up of every expert, then down of every expert. Each expert
/// has an equal share of either part.
struct PackedSizes {
  std::size_t gate_up_bytes = 0;  ///< Of one expert.
  std::size_t down_bytes = 0;     ///< Of one expert.
  std::size_t alignment = 0;      ///< Of the memory.
};
/// On a device of any kind; a device is not needed.   Throws: kInvalidArgument naming the field.
[[nodiscard]] PackedSizes packed_sizes(const RepackFormat& format, Device::Kind kind);
/// num_experts times both parts.
[[nodiscard]] std::size_t packed_bytes(const RepackFormat& format, Device::Kind kind);

/// A tensor of a framework: any strides, in elements.
struct StridedView {
  TensorView tensor;  ///< Where and of what shape; not dense, whatever its type promises.
  std::array<std::int64_t, Shape::kMaxRank> strides{};
};

/// Orders of the codes in the tensors of a layer's experts, [E, ..] for matrices [N, K].
enum class WeightLayout : std::uint8_t {
  kInt4,               ///< int8 [E, N, K / 2], two's complement, even k in the low nibble.
  kUint4b8,            ///< int32 [E, N, K / 8], weight + 8, k rising from the lowest nibble.
  kUint4b8Transposed,  ///< int32 [E, K / 8, N] of the same words.
  kMxfp4,  ///< uint8 [E, N, K / 2] of e2m1, even k low; scales uint8 [E, N, K / 32] of e8m0.
};
/// Orders of the scales.
enum class ScaleLayout : std::uint8_t {
  kByShape,      ///< Which of the two below the shape has; plain if it has both.
  kPlain,        ///< [E, N, K / G]
  kInterleaved,  ///< [E, K / G / a, N * a]: a groups of a row side by side. SGLang has a = 4, or 1.
};

/// Experts of a layer as engines stack them: w13 has the rows of gate, then those of up.
struct StackedWeights {
  StridedView w13, w13_scale;  ///< N = 2 * intermediate, K = hidden
  StridedView w2, w2_scale;    ///< N = hidden, K = intermediate
  WeightLayout weight_layout = WeightLayout::kInt4;
  ScaleLayout scale_layout = ScaleLayout::kByShape;
  ActivationFn activation = {};
};
struct StackedSources {
  RepackFormat format;
  std::vector<ExpertSource> experts;
};
/// Sizes, group size (128 or 32), weight format and every expert's place. Looks at no weight.
/// Throws: kInvalidArgument naming the tensor, what it is and what was expected.
[[nodiscard]] StackedSources stacked_sources(const StackedWeights& weights);

}  // namespace sluice
