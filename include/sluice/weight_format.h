// weight_format.h - how the codes of a weight matrix are stored, and what a code is worth.
//
//   w[n, k] = code_value(format, codes of row n, k) * scales[n, k / group_size]
//
// INT4 is the only format there is. A switch over formats has no default, so that the compiler
// names those that lack a new one; docs/adding-a-format.md lists what else must answer for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "sluice/error.h"
#include "sluice/quant.h"
#include "sluice/tensor.h"

namespace sluice {

enum class WeightFormat : std::uint8_t {
  kInt4,  ///< Signed int4 [-8, 7], even k in the low nibble; float32 or bfloat16 scales.
};

/// "int4".
[[nodiscard]] const char* to_string(WeightFormat format);
/// Throws: kUnsupported naming what there is.
[[nodiscard]] WeightFormat parse_weight_format(std::string_view name);

/// Whether the format may have one scale for each `group_size` weights along k.
[[nodiscard]] bool allows_group_size(WeightFormat format, int group_size);
/// Largest magnitude of a code.
[[nodiscard]] float max_code_value(WeightFormat format);

/// Bytes of the codes of `num_weights` weights, which are a multiple of 2.
[[nodiscard]] std::size_t code_bytes(WeightFormat format, std::size_t num_weights);

/// The definition: what code `i` of `codes` is worth before its scale. Exact.
[[nodiscard]] inline float code_value(WeightFormat format, const std::uint8_t* codes,
                                      std::int64_t i) {
  switch (format) {
    case WeightFormat::kInt4:
      return unpack_int4(codes, i);
  }
  throw Error(ErrorCode::kInternal, "code_value: no such weight format");
}

/// Scale `i` of a matrix, counted row by row. Exact. `scales` lie in host memory.
[[nodiscard]] inline float scale_value(const TensorView& scales, std::int64_t i) {
  if (scales.dtype == DType::kFloat32) return scales.as<float>()[i];
  if (scales.dtype == DType::kBFloat16) return bf16_to_float(scales.as<std::uint16_t>()[i]);
  throw Error(ErrorCode::kInternal, "scale_value: no such type of scales");
}

}  // namespace sluice
