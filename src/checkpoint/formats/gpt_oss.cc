// gpt-oss: MXFP4 of all experts of a layer in six tensors, gate and up row by row in one of them.
//
//   gate_up_proj_blocks U8 [E, 2 I, H / 32, 16]   gate 0, up 0, gate 1, up 1 ..; even k low
//   gate_up_proj_scales U8 [E, 2 I, H / 32]       e8m0
//   gate_up_proj_bias   BF16 [E, 2 I]
//   down_proj_blocks, _scales, _bias              [E, H, I / 32, 16], [E, H, I / 32], [E, H]
//
// The tensor index gives every expert its part of each (expert_names.h).
#include "checkpoint/formats/format.h"
#include "checkpoint/formats/mxfp4.h"
#include "core/fail.h"

namespace sluice {
namespace {

class GptOssFormat final : public Mxfp4Format {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "gpt-oss"; }
  [[nodiscard]] bool has_bias() const noexcept override { return true; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto groups = static_cast<std::uint64_t>(matrix.k) / kMxfp4Group;
    const auto rows = static_cast<std::uint64_t>(matrix.n * this->rows(matrix).step);
    return {
        {.name = codes_part(matrix), .dtypes = {"U8"}, .shape = {rows, groups, kMxfp4Group / 2}},
        {.name = scale_part(matrix), .dtypes = {"U8", "F8_E8M0"}, .shape = {rows, groups}},
        bias_spec(matrix, rows)};
  }
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

 private:
  [[nodiscard]] static std::string stem(const MatrixLayout& matrix) {
    return matrix.role == MatrixLayout::Role::kDown ? "down_proj" : "gate_up_proj";
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
