// gpt-oss: MXFP4 of all experts of a layer in six tensors, gate and up row by row in one of them.
//
//   gate_up_proj_blocks U8 [E, 2 I, H / 32, 16]   gate 0, up 0, gate 1, up 1 ..; even k low
//   gate_up_proj_scales U8 [E, 2 I, H / 32]       e8m0
//   gate_up_proj_bias   BF16 [E, 2 I]
//   down_proj_blocks, _scales, _bias              [E, H, I / 32, 16], [E, H, I / 32], [E, H]
//
// The tensor index gives every expert its part of each (expert_names.h).
#include <cstring>

#include "checkpoint/formats/format.h"
#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr int kGroup = 32;

class GptOssFormat final : public Format {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "gpt-oss"; }
  [[nodiscard]] std::optional<WeightFormat> weight_format() const noexcept override {
    return WeightFormat::kMxfp4;
  }
  [[nodiscard]] int group_size() const noexcept override { return kGroup; }
  [[nodiscard]] bool has_bias() const noexcept override { return true; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto k = static_cast<std::uint64_t>(matrix.k);
    const auto rows = static_cast<std::uint64_t>(matrix.n * this->rows(matrix).step);
    return {{.name = codes_part(matrix), .dtypes = {"U8"}, .shape = {rows, k / kGroup, kGroup / 2}},
            {.name = scale_part(matrix), .dtypes = {"U8", "F8_E8M0"}, .shape = {rows, k / kGroup}},
            {.name = bias_part(matrix), .dtypes = {"BF16", "F16", "F32"}, .shape = {rows}}};
  }
  [[nodiscard]] std::string input_scale_part(const MatrixLayout&) const override { return ""; }
  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return stem(matrix) + "_blocks";
  }
  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return stem(matrix) + "_scales";
  }
  [[nodiscard]] std::string bias_part(const MatrixLayout& matrix) const override {
    return stem(matrix) + "_bias";
  }
  [[nodiscard]] RowStep rows(const MatrixLayout& matrix) const override {
    switch (matrix.role) {
      case MatrixLayout::Role::kGate:
        return {.first = 0, .step = 2};
      case MatrixLayout::Role::kUp:
        return {.first = 1, .step = 2};
      case MatrixLayout::Role::kDown:
        return {};
    }
    fail(ErrorCode::kInternal, "no such matrix of an expert");
  }
  [[nodiscard]] DType scale_dtype(const ExpertTensors&, const MatrixLayout&) const override {
    return DType::kFloat8E8M0;
  }
  [[nodiscard]] std::size_t copied_bytes(const MatrixLayout& matrix) const override {
    return aligned_in_room(static_cast<std::size_t>(matrix.n * (matrix.k / kGroup)));
  }
  [[nodiscard]] TensorView scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const override {
    const RowStep step = rows(matrix);
    const std::int64_t groups = matrix.k / kGroup;
    const TensorView all =
        load_e8m0(part_of(expert, scale_part(matrix)), matrix.n * step.step, groups, storage);
    return step.step == 1 ? all : own_rows(all, matrix, storage);
  }

  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override {
    const RowStep step = rows(matrix);
    MatrixLayout all = matrix;
    all.n *= step.step;
    const TensorView codes =
        view_codes(part_of(expert, codes_part(matrix)), all, storage, WeightFormat::kMxfp4);
    return {.codes = step.step == 1 ? codes : own_rows(codes, matrix, storage),
            .scales = scales(expert, matrix, storage),
            .group_size = kGroup,
            .format = WeightFormat::kMxfp4};
  }

 private:
  [[nodiscard]] static std::string stem(const MatrixLayout& matrix) {
    return matrix.role == MatrixLayout::Role::kDown ? "down_proj" : "gate_up_proj";
  }

  /// Rows of bytes that are the matrix's, one after the other.
  [[nodiscard]] TensorView own_rows(const TensorView& all, const MatrixLayout& matrix,
                                    ExpertStorage& storage) const {
    const RowStep step = rows(matrix);
    const auto width = static_cast<std::size_t>(all.dim(1));
    std::byte* const out = allocate(storage, static_cast<std::size_t>(matrix.n) * width).data();
    for (std::int64_t i = 0; i < matrix.n; ++i) {
      std::memcpy(
          out + static_cast<std::size_t>(i) * width,
          all.as<std::byte>() + static_cast<std::size_t>(step.first + i * step.step) * width,
          width);
    }
    return {out, all.dtype, {matrix.n, all.dim(1)}};
  }
};

}  // namespace

/// `mxfp4` is what gpt-oss calls its method; no other layout is published under this name.
std::optional<Recognised> recognise_gpt_oss(const FormatClues& clues) {
  if (clues.config.quant_method != "mxfp4") return std::nullopt;
  for (const char* const part : {"weight", "weight_packed", "qweight"}) {
    const TensorRef* const tensor = clues.first_gate(part);
    if (!tensor || !tensor->exists()) continue;
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = 'mxfp4' is gpt-oss' MXFP4, whose weights are in "
         "tensors of all experts (gate_up_proj_blocks); {} is of one",
         clues.config.file, tensor->entry.name);
  }
  return Recognised{.format = std::make_unique<GptOssFormat>(),
                    .evidence =
                        "config.json: quant_method = 'mxfp4': gpt-oss' MXFP4 experts, with "
                        "biases"};
}

}  // namespace sluice
