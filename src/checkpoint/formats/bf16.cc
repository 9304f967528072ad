// Unquantized BF16 [N, K]. Not INT4: `sluice convert` quantizes it.
#include <cmath>
#include <cstring>

#include "checkpoint/formats/format.h"
#include "checkpoint/formats/part_readers.h"
#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

class Bf16Format final : public Format {
 public:
  [[nodiscard]] std::string_view name() const noexcept override { return "bf16"; }
  [[nodiscard]] std::optional<WeightFormat> weight_format() const noexcept override { return {}; }

  [[nodiscard]] std::vector<PartSpec> parts(const MatrixLayout& matrix) const override {
    return {
        {.name = matrix.part("weight"),
         .dtypes = {"BF16"},
         .shape = {static_cast<std::uint64_t>(matrix.n), static_cast<std::uint64_t>(matrix.k)}}};
  }
  [[nodiscard]] std::string input_scale_part(const MatrixLayout&) const override { return ""; }

  void load_floats(const ExpertTensors& expert, const MatrixLayout& matrix,
                   std::span<float> out) const override {
    const TensorRef& weight = part_of(expert, matrix.part("weight"));
    weight.will_need();
    const std::byte* const data = weight.bytes().data();
    for (std::size_t i = 0; i < out.size(); ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, data + 2 * i, sizeof bits);
      out[i] = bf16_to_float(bits);
      if (!std::isfinite(out[i])) {
        fail(ErrorCode::kCorruptFile, "{}: weight [{}, {}] = {} is not a finite number",
             place(weight), i / static_cast<std::size_t>(matrix.k),
             i % static_cast<std::size_t>(matrix.k), out[i]);
      }
    }
    weight.release();
  }
};

}  // namespace

std::optional<Recognised> recognise_bf16(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  if (config.is_present || !config.algo.empty()) return std::nullopt;
  const TensorRef* const gate = clues.first_gate("weight");
  if (!gate || gate->entry.dtype != "BF16") return std::nullopt;
  return Recognised{.format = std::make_unique<Bf16Format>(),
                    .evidence = "config.json: no quantization_config"};
}

}  // namespace sluice
