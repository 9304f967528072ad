// weight_format.h - how the codes of a weight matrix are stored, and what a code is worth.
//
//   w[n, k] = code_value(format, codes of row n, k) * scales[n, k / group_size]
//
//   format   code                          group       scale
//   int4     two's complement, [-8, 7]     128 or 32   float32 or bfloat16
//   mxfp4    e2m1: 0, 0.5 .. 4, 6, signed  32          e8m0: a power of two
//
// A switch over formats has no default, so that the compiler names those that lack a new one;
// docs/adding-a-format.md lists what else must answer for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "sluice/error.h"
#include "sluice/quant.h"
#include "sluice/tensor.h"

namespace sluice {

enum class WeightFormat : std::uint8_t {
  kInt4,   ///< Signed int4 [-8, 7], even k in the low nibble; float32 or bfloat16 scales.
  kMxfp4,  ///< OCP MXFP4: e2m1, even k in the low nibble; an e8m0 scale for each 32.
};

/// "int4", "mxfp4".
[[nodiscard]] const char* to_string(WeightFormat format);
/// Throws: kUnsupported naming what there is.
[[nodiscard]] WeightFormat parse_weight_format(std::string_view name);

/// Whether the format may have one scale for each `group_size` weights along k.
[[nodiscard]] bool allows_group_size(WeightFormat format, int group_size);
/// For messages: what a group size is that is not allowed, "neither 128 nor 32".
[[nodiscard]] const char* group_size_refusal(WeightFormat format);
/// Type of QuantMatrix::codes.
[[nodiscard]] DType code_dtype(WeightFormat format);
/// Whether QuantMatrix::scales may have this type.
[[nodiscard]] bool allows_scale_dtype(WeightFormat format, DType dtype);
/// For messages: "float32 or bfloat16".
[[nodiscard]] const char* scale_dtype_names(WeightFormat format);
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
    case WeightFormat::kMxfp4:
      return e2m1_to_float(unpack_nibble(codes, i));
  }
  throw Error(ErrorCode::kInternal, "code_value: no such weight format");
}

/// Scale `i` of a matrix, counted row by row. Exact. `scales` lie in host memory.
[[nodiscard]] inline float scale_value(const TensorView& scales, std::int64_t i) {
  if (scales.dtype == DType::kFloat32) return scales.as<float>()[i];
  if (scales.dtype == DType::kBFloat16) return bf16_to_float(scales.as<std::uint16_t>()[i]);
  if (scales.dtype == DType::kFloat8E8M0) return e8m0_to_float(scales.as<std::uint8_t>()[i]);
  throw Error(ErrorCode::kInternal, "scale_value: no such type of scales");
}

}  // namespace sluice
