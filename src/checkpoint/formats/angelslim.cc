// AngelSlim w4a8_fp8: qweight I8 [N, K / 2] with W4AFP8's nibbles, weight_scale.int4 [N, K / 128],
// and weight_scale, the scale of an FP8 stage that the INT4 values do not need. Sources:
// docs/checkpoint-formats.md#angelslim-w4a8_fp8.
#include "checkpoint/formats/format.h"
#include "checkpoint/formats/part_readers.h"
#include "checkpoint/formats/second_scale.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr int kGroup = 128;

class AngelslimFormat final : public Format {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "angelslim"; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    return {{.name = matrix.part("qweight"), .dtypes = {"I8"}, .shape = {n, k / 2}},
            {.name = matrix.part("weight_scale.int4"),
             .dtypes = {"BF16", "F32"},
             .shape = {n, k / kGroup}},
            {.name = matrix.part("weight_scale"), .dtypes = {"BF16", "F32"}, .shape = {}}};
  }

  [[nodiscard]] std::string scale_part(const MatrixLayout& matrix) const override {
    return matrix.part("weight_scale.int4");
  }

  [[nodiscard]] std::string codes_part(const MatrixLayout& matrix) const override {
    return matrix.part("qweight");
  }

  [[nodiscard]] TensorView scales(const ExpertTensors& expert, const MatrixLayout& matrix,
                                  ExpertStorage& storage) const override {
    const TensorView result = Format::scales(expert, matrix, storage);
    check_second_scale(part_of(expert, matrix.part("weight_scale")),
                       part_of(expert, scale_part(matrix)), result);
    return result;
  }

  [[nodiscard]] QuantMatrix load(const ExpertTensors& expert, const MatrixLayout& matrix,
                                 ExpertStorage& storage) const override {
    return {.codes = view_codes(part_of(expert, codes_part(matrix)), matrix, storage),
            .scales = scales(expert, matrix, storage),
            .group_size = kGroup};
  }
};

}  // namespace

std::optional<Recognised> recognise_angelslim(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  if (config.quant_method != "w4a8_awq") return std::nullopt;
  if (config.group_size && *config.group_size != kGroup) {
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.weight_group_size = {}; only {} is "
         "supported",
         config.file, *config.group_size, kGroup);
  }
  // AngelSlim writes no hf_quant_config.json; one that is there must say the same.
  if (!config.algo.empty() && config.algo != "W4A8_AWQ") {
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = 'w4a8_awq', but {} has quant_algo = '{}'",
         config.file, config.algo_file, config.algo);
  }
  if (config.algo_group_size && *config.algo_group_size != kGroup) {
    fail(ErrorCode::kUnsupported, "{}: quantization.group_size = {}; only {} is supported",
         config.algo_file, *config.algo_group_size, kGroup);
  }
  return Recognised{.format = std::make_unique<AngelslimFormat>(),
                    .evidence = "config.json: quant_method = 'w4a8_awq' (AngelSlim w4a8_fp8)"};
}

}  // namespace sluice
