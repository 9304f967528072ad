#include "accuracy/casts.h"

#include <cmath>

#include "sluice/quant.h"

namespace sluice {

accuracy::Gemm1Cast accuracy::gemm1_cast(RecipeName name) noexcept {
  switch (name) {
    case RecipeName::kDirect:
    case RecipeName::kDirectBf16:
      return Gemm1Cast::kGroup;
    case RecipeName::kBf16Static:
    case RecipeName::kStatic:
      return Gemm1Cast::kStatic;
    case RecipeName::kRequantStatic:
      return Gemm1Cast::kRequantized;
    case RecipeName::kPow2Static:
      return Gemm1Cast::kPow2;
  }
  return Gemm1Cast::kNone;
}

accuracy::Gemm2Cast accuracy::gemm2_cast(RecipeName name) noexcept {
  const bool grouped = name == RecipeName::kDirect || name == RecipeName::kDirectBf16;
  return grouped ? Gemm2Cast::kGroup : Gemm2Cast::kStatic;
}

namespace {

/// Counts what casting x * inverse to `codes` did.
void count_casts(std::span<const float> x, float inverse, std::span<const std::uint8_t> codes,
                 CastCounts& counts) {
  counts.values += x.size();
  for (std::size_t i = 0; i < x.size(); ++i) {
    counts.saturated += std::fabs(x[i] * inverse) > accuracy::kSaturates ? 1 : 0;
    counts.underflowed += x[i] != 0 && (codes[i] & 0x7f) == 0 ? 1 : 0;
  }
}

void cast_static(std::span<const float> x, float scale, Gemm1Row& row) {
  quantize_static(x, scale, row.codes);
  row.scales = {scale};
  count_casts(x, 1.0f / scale, row.codes, row.counts);
}

void cast_groups(std::span<const float> x, bool pow2, Gemm1Row& row) {
  for (std::size_t begin = 0; begin < x.size(); begin += kActivationGroup) {
    const auto in = x.subspan(begin, kActivationGroup);
    const auto out = std::span(row.codes).subspan(begin, kActivationGroup);
    row.scales.push_back(pow2 ? quantize_group_pow2(in, out) : quantize_group(in, out));
    const float inverse = pow2 ? 1.0f / row.scales.back() : kE4m3Max / group_amax(in);
    count_casts(in, inverse, out, row.counts);
  }
}

/// The second cast of a group-scaled row, to static `s1`. A value counts once, whichever cast it is
/// that clips or loses it.
void cast_again(float s1, Gemm1Row& row) {
  std::vector<float> sent(row.codes.size());
  std::vector<std::uint8_t> codes(row.codes.size());
  for (std::size_t i = 0; i < sent.size(); ++i) {
    sent[i] = e4m3_to_float(row.codes[i]) * row.scales[i / kActivationGroup];
  }
  for (std::size_t g = 0; g < row.scales.size(); ++g) {
    const std::size_t begin = g * kActivationGroup;
    requantize(std::span(row.codes).subspan(begin, kActivationGroup), row.scales[g], s1,
               std::span(codes).subspan(begin, kActivationGroup));
  }
  row.codes = std::move(codes);
  row.scales = {s1};
  const std::uint64_t values = row.counts.values;
  count_casts(sent, 1.0f / s1, row.codes, row.counts);
  row.counts.values = values;
}

}  // namespace

Gemm1Row gemm1_row(const Recipe& recipe, const std::uint16_t* x, int hidden) {
  std::vector<float> values(static_cast<std::size_t>(hidden));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = bf16_to_float(x[i]);
  Gemm1Row row{.codes = std::vector<std::uint8_t>(values.size()), .scales = {}, .counts = {}};
  switch (accuracy::gemm1_cast(recipe.name)) {
    case accuracy::Gemm1Cast::kStatic:
      cast_static(values, recipe.s1, row);
      break;
    case accuracy::Gemm1Cast::kRequantized:
      cast_groups(values, false, row);
      cast_again(recipe.s1, row);
      break;
    case accuracy::Gemm1Cast::kPow2:
      cast_groups(values, true, row);
      cast_again(recipe.s1, row);
      break;
    case accuracy::Gemm1Cast::kGroup:
    case accuracy::Gemm1Cast::kNone:
      cast_groups(values, false, row);
      break;
  }
  return row;
}

Gemm1Row accuracy::gemm2_row(Gemm2Cast cast, float s2, std::span<const float> h) {
  Gemm1Row row{.codes = std::vector<std::uint8_t>(h.size()), .scales = {}, .counts = {}};
  if (cast == Gemm2Cast::kStatic) {
    cast_static(h, s2, row);
  } else {
    cast_groups(h, false, row);
  }
  return row;
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
