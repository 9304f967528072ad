// DeepSeek-V4's own layout: experts of MXFP4 in a model that declares fp8. Codes are I8 `weight`
// [N, K / 2], scales F8_E8M0 `scale` [N, K / 32].
#include "checkpoint/formats/format.h"
#include "checkpoint/formats/mxfp4.h"
#include "core/fail.h"

namespace sluice {

/// What the config says of the experts decides; where it says nothing, the type of their scales.
std::optional<Recognised> recognise_deepseek_fp4(const FormatClues& clues) {
  const QuantizationConfig& config = clues.config;
  if (config.quant_method != "fp8") return std::nullopt;
  const TensorRef* const scale = clues.first_gate("scale");
  const TensorRef* const weight = clues.first_gate("weight");
  const bool has_e8m0_codes =
      weight && weight->entry.dtype == "I8" && scale && scale->entry.dtype == "F8_E8M0";
  const bool is_declared = config.expert_type == "fp4";
  if (is_declared && weight && weight->entry.dtype == "F8_E4M3") {
    fail(ErrorCode::kUnsupported,
         "{}: {} = 'fp4', which makes the experts MXFP4, but {} is F8_E4M3{}: leave out the key if "
         "they are FP8",
         config.file, config.expert_key, weight->entry.name,
         clues.first_gate("weight_scale_inv") ? " beside weight_scale_inv, as fp8-block has them"
                                              : "");
  }
  if (!is_declared && !(config.expert_type.empty() && has_e8m0_codes)) return std::nullopt;
  const std::string what =
      is_declared ? "expert_dtype = 'fp4'" : fmt::format("{} is F8_E8M0", scale->entry.name);
  return Recognised{
      .format = make_mxfp4_format({.format = "deepseek-fp4",
                                   .codes = "weight",
                                   .scales = "scale",
                                   .code_dtypes = {"I8", "U8"},
                                   .scale_dtypes = {"F8_E8M0", "U8"}}),
      .evidence = fmt::format("config.json: quant_method = 'fp8', {}: MXFP4 experts", what)};
}

}  // namespace sluice
