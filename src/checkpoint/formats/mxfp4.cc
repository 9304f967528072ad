// MXFP4 as its layouts share it, and the layout of a tensor of codes and one of scales per matrix.
#include "checkpoint/formats/mxfp4.h"

#include <cstring>
#include <utility>

#include "checkpoint/formats/part_readers.h"

namespace sluice {
namespace {

class SeparateMxfp4 final : public Mxfp4Format {
 public:
  explicit SeparateMxfp4(Mxfp4Layout layout) : layout_(std::move(layout)) {}

  [[nodiscard]] std::string_view name() const noexcept override { return layout_.format; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    std::vector<PartSpec> specs = {
        {.name = codes_part(matrix), .dtypes = layout_.code_dtypes, .shape = {n, k / 2}},
        {.name = scale_part(matrix),
         .dtypes = layout_.scale_dtypes,
         .shape = {n, k / kMxfp4Group}}};
    if (has_bias()) specs.push_back(bias_spec(matrix, n));
    return specs;
  }
  [[nodiscard]] bool has_bias() const noexcept override { return !layout_.bias.empty(); }
  [[nodiscard]] std::string bias_part(const MatrixLayout& matrix) const override {
    return has_bias() ? matrix.part(layout_.bias) : std::string();
  }
  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return matrix.part(layout_.scales);
  }
  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return matrix.part(layout_.codes);
  }

  [[nodiscard]] std::string refusal(const ExpertTensors::Part& extra) const override {
    if (extra.name.ends_with("weight_global_scale")) {
      return "is a scale of the whole matrix, as NVFP4 has it; MXFP4 has none";
    }
    return Format::refusal(extra);
  }

 private:
  Mxfp4Layout layout_;
};

}  // namespace

std::size_t Mxfp4Format::copied_bytes(const MatrixLayout& matrix) const {
  if (rows(matrix).step == 1) return 0;
  return aligned_in_room(static_cast<std::size_t>(matrix.n * (matrix.k / kMxfp4Group)));
}

TensorView Mxfp4Format::scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                               ExpertStorage& storage) const {
  const std::int64_t step = rows(matrix).step;
  const TensorView all = load_e8m0(part_of(expert, scale_part(matrix)), matrix.n * step,
                                   matrix.k / kMxfp4Group, storage);
  return step == 1 ? all : own_rows(all, matrix, storage);
}

QuantMatrix Mxfp4Format::load(const ExpertTensors& expert, const MatrixLayout& matrix,
                              ExpertStorage& storage) const {
  const std::int64_t step = rows(matrix).step;
  MatrixLayout all = matrix;
  all.n *= step;
  const TensorView codes =
      view_codes(part_of(expert, codes_part(matrix)), all, storage, WeightFormat::kMxfp4);
  return {.codes = step == 1 ? codes : own_rows(codes, matrix, storage),
          .scales = scales(expert, matrix, storage),
          .group_size = kMxfp4Group,
          .format = WeightFormat::kMxfp4};
}

PartSpec Mxfp4Format::bias_spec(const MatrixLayout& matrix, std::uint64_t rows) const {
  return {.name = bias_part(matrix), .dtypes = {"BF16", "F16", "F32"}, .shape = {rows}};
}

TensorView Mxfp4Format::own_rows(const TensorView& all, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const {
  const RowStep step = rows(matrix);
  const auto width = static_cast<std::size_t>(all.dim(1));
  std::byte* const out = allocate(storage, static_cast<std::size_t>(matrix.n) * width).data();
  for (std::int64_t i = 0; i < matrix.n; ++i) {
    std::memcpy(out + static_cast<std::size_t>(i) * width,
                all.as<std::byte>() + static_cast<std::size_t>(step.first + i * step.step) * width,
                width);
  }
  return {out, all.dtype, {matrix.n, all.dim(1)}};
}

std::unique_ptr<const Format> make_mxfp4_format(Mxfp4Layout layout) {
  return std::make_unique<SeparateMxfp4>(std::move(layout));
}

}  // namespace sluice
