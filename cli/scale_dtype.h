// scale_dtype.h - the option --scale-dtype of commands that make weights up or plan for them.
#pragma once

#include <string>

#include "sluice/checkpoint.h"

namespace sluice::cli {

/// Scales of weights of `geometry`. `text` is "f32", "bf16" or empty: `otherwise` for int4.
/// Throws: kInvalidArgument for a text where the weight format leaves no choice.
[[nodiscard]] DType parse_scale_dtype(const ModelGeometry& geometry, const std::string& text,
                                      DType otherwise);

/// "f32", "bf16", "e8m0".
[[nodiscard]] const char* scale_dtype_text(DType dtype);

}  // namespace sluice::cli
