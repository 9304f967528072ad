#include "scale_dtype.h"

#include <fmt/core.h>

#include "sluice/error.h"

namespace sluice::cli {

DType parse_scale_dtype(const ModelGeometry& geometry, const std::string& text, DType otherwise) {
  if (geometry.weight_format == WeightFormat::kInt4) {
    return text.empty() ? otherwise : text == "bf16" ? DType::kBFloat16 : DType::kFloat32;
  }
  if (!text.empty()) {
    throw Error(
        ErrorCode::kInvalidArgument,
        fmt::format("--scale-dtype {}: scales of {} are {}", text,
                    to_string(geometry.weight_format), scale_dtype_names(geometry.weight_format)));
  }
  return DType::kFloat8E8M0;
}

const char* scale_dtype_text(DType dtype) {
  return dtype == DType::kFloat32 ? "f32" : dtype == DType::kBFloat16 ? "bf16" : "e8m0";
}

}  // namespace sluice::cli
