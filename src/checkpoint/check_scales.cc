#include <cmath>
#include <cstdint>

#include "core/fail.h"
#include "quant/scale_limit.h"
#include "sluice/checkpoint.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

float to_float(float scale) {
  return scale;
}
float to_float(std::uint16_t scale) {
  return bf16_to_float(scale);
}
float to_float(std::uint8_t scale) {
  return e8m0_to_float(scale);
}

template <class T>
void check_matrix(const QuantMatrix& matrix, int expert, const char* name) {
  const T* const scales = matrix.scales.as<T>();
  const std::int64_t groups = matrix.scales.dim(1);
  for (std::int64_t i = 0; i < matrix.scales.dim(0) * groups; ++i) {
    const float scale = to_float(scales[i]);
    if (scale > 0 && scale < kScaleLimit) continue;  // Not so for NaN.
    fail(ErrorCode::kInvalidArgument,
         "expert {} {}: scale [{}, {}] = {} is not a positive finite number below 2^118", expert,
         name, i / groups, i % groups, scale);
  }
}

}  // namespace

void check_scales(const ExpertWeights& weights) {
  for (std::size_t e = 0; e < weights.experts.size(); ++e) {
    const Expert& expert = weights.experts[e];
    const auto check = [&](const QuantMatrix& matrix, const char* name) {
      const int number = weights.first_expert + static_cast<int>(e);
      if (matrix.scales.dtype == DType::kFloat32) return check_matrix<float>(matrix, number, name);
      if (matrix.scales.dtype == DType::kBFloat16) {
        return check_matrix<std::uint16_t>(matrix, number, name);
      }
      SLUICE_ASSERT(matrix.scales.dtype == DType::kFloat8E8M0);
      check_matrix<std::uint8_t>(matrix, number, name);
    };
    check(expert.gate, "gate");
    check(expert.up, "up");
    check(expert.down, "down");
  }
}

}  // namespace sluice
