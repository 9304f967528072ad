// FP8 in blocks of 128 x 128, as DeepSeek publishes: F8_E4M3 [N, K] and F32 weight_scale_inv
// [N / 128, K / 128], a multiplier. Not INT4: `sluice convert` quantizes it.
#include <fmt/format.h>

#include <cmath>

#include "checkpoint/formats/format.h"
#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr std::int64_t kBlock = 128;

class Fp8BlockFormat final : public Format {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "fp8-block"; }
  [[nodiscard]] std::optional<WeightFormat> weight_format() const noexcept override { return {}; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    const auto n = static_cast<std::uint64_t>(matrix.n), k = static_cast<std::uint64_t>(matrix.k);
    return {{.name = matrix.part("weight"), .dtypes = {"F8_E4M3"}, .shape = {n, k}},
            {.name = matrix.part("weight_scale_inv"),
             .dtypes = {"F32", "BF16"},
             .shape = {n / kBlock, k / kBlock}}};
  }
  [[nodiscard]] std::string input_scale_part(const MatrixLayout&) const override { return ""; }

  void load_floats(const ExpertTensors& expert, const MatrixLayout& matrix,
                   std::span<float> out) const override {
    const TensorRef& weight = part_of(expert, matrix.part("weight"));
    weight.will_need();
    ExpertStorage storage;
    const TensorView scales = load_scales(part_of(expert, matrix.part("weight_scale_inv")),
                                          matrix.n / kBlock, matrix.k / kBlock, storage);
    const auto* codes = reinterpret_cast<const std::uint8_t*>(weight.bytes().data());
    std::array<float, 256> values{};
    for (std::size_t code = 0; code < values.size(); ++code) {
      values[code] = e4m3_to_float(static_cast<std::uint8_t>(code));
    }
    for (std::int64_t i = 0; i < matrix.n; ++i) {
      for (std::int64_t j = 0; j < matrix.k; ++j) {
        const std::int64_t s = i / kBlock * (matrix.k / kBlock) + j / kBlock;
        const float value = values[codes[i * matrix.k + j]] * scale_value(scales, s);
        if (!std::isfinite(value)) {
          fail(ErrorCode::kCorruptFile, "{}: weight [{}, {}] = {} is not a finite number",
               place(weight), i, j, value);
        }
        out[static_cast<std::size_t>(i * matrix.k + j)] = value;
      }
    }
    weight.release();
  }
};

}  // namespace

std::optional<Recognised> recognise_fp8_block(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  if (config.quant_method != "fp8" || config.weight_block_size.empty()) return std::nullopt;
  // FP8 says less than the block size does, and nothing else.
  const bool agrees =
      config.algo.empty() || config.algo == "FP8_BLOCK_SCALES" || config.algo == "FP8";
  if (!agrees) return std::nullopt;
  const std::vector<std::int64_t> block = {kBlock, kBlock};
  if (config.weight_block_size != block) {
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = 'fp8' with weight_block_size = {}; only [128, "
         "128] is supported, and W4A8 runs need INT4 (w4afp8 or compressed-tensors)",
         config.file, fmt::format("[{}]", fmt::join(config.weight_block_size, ", ")));
  }
  const TensorRef* const weight = clues.first_gate("weight");
  const TensorRef* const scale = clues.first_gate("scale");
  if (weight && weight->entry.dtype == "I8" && scale) {
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = 'fp8', but {} is I8 beside {} of {}: these look "
         "like DeepSeek-V4's MXFP4 experts (deepseek-fp4), which expert_dtype = 'fp4' declares; "
         "expert_dtype here is {}",
         config.file, weight->entry.name, scale->entry.name, scale->entry.dtype,
         config.expert_type.empty() ? "not given" : "'" + config.expert_type + "'");
  }
  return Recognised{
      .format = std::make_unique<Fp8BlockFormat>(),
      .evidence = "config.json: quant_method = 'fp8', weight_block_size = [128, 128]"};
}

}  // namespace sluice
