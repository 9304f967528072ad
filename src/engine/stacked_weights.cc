// Finds every expert's matrices in the stacked tensors of an engine.
#include <fmt/core.h>

#include <string>
#include <string_view>

#include "core/fail.h"
#include "sluice/quant.h"
#include "sluice/repack.h"

namespace sluice {
namespace {

/// A stack of matrices [n, k]: where the words of expert 0 begin, and how far the others are.
struct CodeStack {
  std::int64_t num_experts, n, k;
  std::int64_t expert_bytes, row_bytes, word_bytes;
  const std::byte* data;
};

[[noreturn]] void refuse(const char* name, const StridedView& view, std::string_view wanted) {
  fail(ErrorCode::kInvalidArgument, "{}: expected {}, got {} {}", name, wanted,
       to_string(view.tensor.dtype), view.tensor.shape.to_string());
}

/// What codes of a layout are, for messages.
std::string_view wanted_codes(WeightLayout layout) {
  switch (layout) {
    case WeightLayout::kInt4:
      return "int8 [num_experts, N, K / 2]";
    case WeightLayout::kMxfp4:
      return "uint8 [num_experts, N, K / 2]";
    case WeightLayout::kUint4b8:
      return "int32 [num_experts, N, K / 8]";
    case WeightLayout::kUint4b8Transposed:
      return "int32 [num_experts, K / 8, N]";
  }
  fail(ErrorCode::kInternal, "no such layout of weights");
}

CodeStack codes_of(const char* name, const StridedView& view, WeightLayout layout) {
  const bool is_bytes = layout == WeightLayout::kInt4 || layout == WeightLayout::kMxfp4;
  const TensorView& t = view.tensor;
  const bool fits = is_bytes ? t.dtype == DType::kInt8 || t.dtype == DType::kUInt8 ||
                                   t.dtype == DType::kPackedInt4
                             : t.dtype == DType::kInt32;
  if (t.shape.rank() != 3 || !fits) refuse(name, view, wanted_codes(layout));
  const std::int64_t element = is_bytes ? 1 : 4;
  const int rows = layout == WeightLayout::kUint4b8Transposed ? 2 : 1, words = 3 - rows;
  if (is_bytes && view.strides[2] != 1) {
    fail(ErrorCode::kInvalidArgument,
         "{}: expected the last dimension densest, got strides [{}, {}, {}]", name, view.strides[0],
         view.strides[1], view.strides[2]);
  }
  return {.num_experts = t.dim(0),
          .n = t.dim(rows),
          .k = t.dim(words) * (is_bytes ? 2 : 8),
          .expert_bytes = view.strides[0] * element,
          .row_bytes = view.strides[static_cast<std::size_t>(rows)] * element,
          .word_bytes = is_bytes ? 4 : view.strides[static_cast<std::size_t>(words)] * element,
          .data = t.as<std::byte>()};
}

/// Scales of a stack; strides in elements.
struct ScaleStack {
  int group_size;
  std::int64_t expert;
  MatrixSource where;  ///< Of expert 0; its scales alone are set.
};

/// E8m0 codes, one for each 32, in one order alone.
ScaleStack e8m0_scales_of(const char* name, const StridedView& view, const CodeStack& codes,
                          ScaleLayout layout) {
  const TensorView& t = view.tensor;
  const bool fits =
      t.dtype == DType::kInt8 || t.dtype == DType::kUInt8 || t.dtype == DType::kFloat8E8M0;
  const Shape shape{codes.num_experts, codes.n, codes.k / 32};
  if (!fits || t.shape != shape || codes.k % 32 != 0) {
    refuse(name, view,
           fmt::format("uint8 [{}, {}, {} / 32] of e8m0", codes.num_experts, codes.n, codes.k));
  }
  check_argument(layout != ScaleLayout::kInterleaved,
                 "{}: scales of mxfp4 lie plain, [num_experts, N, K / 32], not interleaved", name);
  ScaleStack stack{.group_size = 32, .expert = view.strides[0], .where = {}};
  stack.where.scales = t.as<std::byte>();
  stack.where.scale_row = view.strides[1];
  stack.where.scale_block = view.strides[2];
  return stack;
}

ScaleStack scales_of(const char* name, const StridedView& view, const CodeStack& codes,
                     ScaleLayout layout) {
  const TensorView& t = view.tensor;
  const bool fits = t.dtype == DType::kFloat32 || t.dtype == DType::kBFloat16;
  const std::string wanted = fmt::format(
      "float32 or bfloat16 [{0}, {1}, {2} / G] of groups G of 128 or 32, or interleaved [{0}, "
      "{2} / G / a, {1} * a]",
      codes.num_experts, codes.n, codes.k);
  if (!fits || t.shape.rank() != 3 || t.dim(0) != codes.num_experts) refuse(name, view, wanted);
  for (const int group : {128, 32}) {
    if (codes.k % group != 0) continue;
    const std::int64_t groups = codes.k / group;
    ScaleStack stack{.group_size = group, .expert = view.strides[0], .where = {}};
    stack.where.scales = t.as<std::byte>();
    if (layout != ScaleLayout::kInterleaved && t.dim(1) == codes.n && t.dim(2) == groups) {
      stack.where.scale_row = view.strides[1];
      stack.where.scale_block = view.strides[2];
      return stack;
    }
    const std::int64_t side_by_side = t.dim(2) % codes.n == 0 ? t.dim(2) / codes.n : 0;
    if (layout != ScaleLayout::kPlain && (side_by_side == 1 || side_by_side == 4) &&
        t.dim(1) * side_by_side == groups) {
      stack.where.scale_row = side_by_side * view.strides[2];
      stack.where.scale_block = view.strides[1];
      stack.where.scale_group = view.strides[2];
      stack.where.groups_per_block = static_cast<int>(side_by_side);
      return stack;
    }
  }
  refuse(name, view, wanted);
}

MatrixSource matrix_of(const CodeStack& codes, const ScaleStack& scales, std::int64_t expert,
                       std::int64_t row, std::int64_t scale_bytes) {
  MatrixSource m = scales.where;
  m.codes = codes.data + expert * codes.expert_bytes + row * codes.row_bytes;
  m.row_bytes = codes.row_bytes;
  m.word_bytes = codes.word_bytes;
  m.scales += (expert * scales.expert + row * m.scale_row) * scale_bytes;
  return m;
}

}  // namespace

StackedSources stacked_sources(const StackedWeights& weights) {
  const CodeStack w13 = codes_of("w13", weights.w13, weights.weight_layout);
  const CodeStack w2 = codes_of("w2", weights.w2, weights.weight_layout);
  const std::int64_t hidden = w13.k, inter = w13.n / 2;
  check_argument(
      w13.num_experts > 0 && inter > 0 && w13.n % 2 == 0 && hidden > 0 &&
          hidden % kActivationGroup == 0 && inter % kActivationGroup == 0,
      "w13: {} experts, hidden {}, 2 * intermediate {}; expected at least one expert and "
      "multiples of {}",
      w13.num_experts, hidden, w13.n, kActivationGroup);
  check_argument(w2.num_experts == w13.num_experts && w2.n == hidden && w2.k == inter,
                 "w2: {} experts of [{}, {}], expected {} of [hidden {}, intermediate {}] as w13 "
                 "has them",
                 w2.num_experts, w2.n, w2.k, w13.num_experts, hidden, inter);
  const bool is_mxfp4 = weights.weight_layout == WeightLayout::kMxfp4;
  const auto find = is_mxfp4 ? e8m0_scales_of : scales_of;
  const ScaleStack s13 = find("w13_scale", weights.w13_scale, w13, weights.scale_layout);
  const ScaleStack s2 = find("w2_scale", weights.w2_scale, w2, weights.scale_layout);
  const DType dtype = is_mxfp4 ? DType::kFloat8E8M0 : weights.w13_scale.tensor.dtype;
  check_argument(
      s2.group_size == s13.group_size && (is_mxfp4 || weights.w2_scale.tensor.dtype == dtype),
      "w2_scale: {} for groups of {}, w13_scale: {} for groups of {}; expected the same",
      to_string(weights.w2_scale.tensor.dtype), s2.group_size, to_string(dtype), s13.group_size);

  StackedSources found;
  found.format = {
      .geometry = {.name = "arrays",
                   .num_experts = static_cast<int>(w13.num_experts),
                   .num_topk = 1,
                   .hidden = static_cast<int>(hidden),
                   .intermediate = static_cast<int>(inter),
                   .group_size = s13.group_size,
                   .weight_format = is_mxfp4 ? WeightFormat::kMxfp4 : WeightFormat::kInt4,
                   .activation = weights.activation},
      .num_experts = static_cast<int>(w13.num_experts),
      .scale_dtype = dtype,
      .codes = weights.weight_layout == WeightLayout::kInt4 || is_mxfp4 ? CodeKind::kTwosComplement
                                                                        : CodeKind::kOffset};
  const auto bytes = static_cast<std::int64_t>(size_bytes(dtype));
  for (std::int64_t e = 0; e < w13.num_experts; ++e) {
    found.experts.push_back({.gate = matrix_of(w13, s13, e, 0, bytes),
                             .up = matrix_of(w13, s13, e, inter, bytes),
                             .down = matrix_of(w2, s2, e, 0, bytes)});
  }
  return found;
}

}  // namespace sluice
