#include "accuracy/casts.h"

#include <cmath>

#include "core/fail.h"
#include "quant/row_cast.h"
#include "sluice/quant.h"

namespace sluice {

namespace {

/// What one cast multiplied the values of a group (or of the row) by. `scale` is what it stored.
float inverse_of(Cast cast, std::span<const float> group, float scale) {
  switch (cast) {
    case Cast::kNone:
      break;
    case Cast::kGroup:
    case Cast::kToken:
      return kE4m3Max / group_amax(group);
    case Cast::kGroupPow2:
    case Cast::kStatic:
    case Cast::kStaticPow2:
      return 1.0f / scale;
  }
  fail(ErrorCode::kInternal, "cast {} gives no e4m3 row", to_string(cast));
}

/// Counts what `cast` did to `values` on their way to `row`. `values` is not empty.
void count_cast(Cast cast, std::span<const float> values, const CastRow& row, CastCounts& counts) {
  const std::size_t width = values.size() / row.scales.size();
  for (std::size_t g = 0; g < row.scales.size(); ++g) {
    const auto group = values.subspan(g * width, width);
    const float inverse = inverse_of(cast, group, row.scales[g]);
    for (std::size_t i = 0; i < width; ++i) {
      counts.saturated += std::fabs(group[i] * inverse) > accuracy::kSaturates ? 1 : 0;
      counts.underflowed += group[i] != 0 && (row.codes[g * width + i] & 0x7f) == 0 ? 1 : 0;
    }
  }
}

/// `values` after `casts`, one after the other. A value counts once, whichever cast it is that
/// clips or loses it.
Gemm1Row cast_in_turn(std::span<const Cast> casts, float static_scale, std::vector<float> values) {
  CastCounts counts{.values = values.size()};
  CastRow row;
  for (const Cast cast : casts) {
    row = cast_row(cast, values, static_scale);
    count_cast(cast, values, row, counts);
    values = row.values();
  }
  return {.codes = std::move(row.codes), .scales = std::move(row.scales), .counts = counts};
}

}  // namespace

Gemm1Row gemm1_row(const LayerRecipe& recipe, const std::uint16_t* x, int hidden) {
  std::vector<float> values(static_cast<std::size_t>(hidden));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = bf16_to_float(x[i]);
  return cast_in_turn(gemm1_casts(recipe), recipe.s1, std::move(values));
}

Gemm1Row accuracy::gemm2_row(Cast cast, float s2, std::span<const float> h) {
  return cast_in_turn({&cast, 1}, s2, {h.begin(), h.end()});
}

void accuracy::dequantize(const Gemm1Row& row, std::span<double> out) {
  const std::size_t group = row.scales.size() == 1 ? row.codes.size() : kActivationGroup;
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<double>(e4m3_to_float(row.codes[i])) * row.scales[i / group];
  }
}

CastCounts& accuracy::operator+=(CastCounts& sum, const CastCounts& part) noexcept {
  sum.values += part.values;
  sum.saturated += part.saturated;
  sum.underflowed += part.underflowed;
  return sum;
}

}  // namespace sluice
