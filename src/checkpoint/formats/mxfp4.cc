// MXFP4: e2m1 codes and an e8m0 scale for each 32, which are canonical as they lie in the file.
#include "checkpoint/formats/mxfp4.h"

#include <utility>

#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr int kGroup = 32;

class Mxfp4Format final : public Format {
 public:
  explicit Mxfp4Format(Mxfp4Layout layout) : layout_(std::move(layout)) {}

  [[nodiscard]] std::string_view name() const noexcept override { return layout_.format; }
  [[nodiscard]] std::optional<WeightFormat> weight_format() const noexcept override {
    return WeightFormat::kMxfp4;
  }
  [[nodiscard]] int group_size() const noexcept override { return kGroup; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    std::vector<PartSpec> specs = {
        {.name = codes_part(matrix), .dtypes = layout_.code_dtypes, .shape = {n, k / 2}},
        {.name = scale_part(matrix), .dtypes = layout_.scale_dtypes, .shape = {n, k / kGroup}}};
    if (has_bias()) {
      specs.push_back({.name = bias_part(matrix), .dtypes = {"BF16", "F16", "F32"}, .shape = {n}});
    }
    return specs;
  }
  [[nodiscard]] bool has_bias() const noexcept override { return !layout_.bias.empty(); }
  [[nodiscard]] std::string bias_part(const MatrixLayout& matrix) const override {
    return has_bias() ? matrix.part(layout_.bias) : std::string();
  }
  [[nodiscard]] std::string input_scale_part(const MatrixLayout&) const override { return ""; }
  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return matrix.part(layout_.scales);
  }
  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return matrix.part(layout_.codes);
  }
  [[nodiscard]] DType scale_dtype(const ExpertTensors&, const MatrixLayout&) const override {
    return DType::kFloat8E8M0;
  }
  [[nodiscard]] std::size_t copied_bytes(const MatrixLayout&) const override { return 0; }

  [[nodiscard]] std::string refusal(const ExpertTensors::Part& extra) const override {
    if (extra.name.ends_with("weight_global_scale")) {
      return "is a scale of the whole matrix, as NVFP4 has it; MXFP4 has none";
    }
    return Format::refusal(extra);
  }

  [[nodiscard]] TensorView scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const override {
    return load_e8m0(part_of(expert, scale_part(matrix)), matrix.n, matrix.k / kGroup, storage);
  }

  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override {
    return {.codes = view_codes(part_of(expert, codes_part(matrix)), matrix, storage,
                                WeightFormat::kMxfp4),
            .scales = scales(expert, matrix, storage),
            .group_size = kGroup,
            .format = WeightFormat::kMxfp4};
  }

 private:
  Mxfp4Layout layout_;
};

}  // namespace

std::unique_ptr<const Format> make_mxfp4_format(Mxfp4Layout layout) {
  return std::make_unique<Mxfp4Format>(std::move(layout));
}

}  // namespace sluice
