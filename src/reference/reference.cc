// The float64 layer. Plain loops over one token at a time; every quantity carries its error bound.
#include "sluice/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr double kBf16HalfUlp = 0x1p-8;  // Largest relative error of rounding to bf16.
constexpr double kF32Slack = 0x1p-22;    // A few float32 roundings, relative.
constexpr double kSiluSlope = 1.1;       // max |d silu(x) / dx| = 1.0998 at x = 2.4.

/// A number known up to +-error.
struct Interval {
  double value = 0, error = 0;
};

/// Values a quantized vector takes, and by how much each may differ from ours.
struct QuantizedVector {
  std::vector<double> value, deviation;
};

double scale_at(const Int4Matrix& m, std::int64_t n, std::int64_t g) {
  const std::int64_t i = n * m.scales.dim(1) + g;
  return m.scales.dtype == DType::kFloat32 ? m.scales.as<float>()[i]
                                           : bf16_to_float(m.scales.as<std::uint16_t>()[i]);
}

/// out[n] = sum_k w[n, k] * v[k], with error constant * sum |w v| + sum |w| deviation.
std::vector<Interval> multiply(const Int4Matrix& m, const QuantizedVector& v, double constant) {
  const std::int64_t num_groups = m.k() / m.group_size;
  std::vector<Interval> out(static_cast<std::size_t>(m.n()));
  for (std::int64_t n = 0; n < m.n(); ++n) {
    const std::uint8_t* codes = m.codes.as<std::uint8_t>() + n * m.codes.dim(1);
    double sum = 0, magnitude = 0, flips = 0;
    for (std::int64_t g = 0; g < num_groups; ++g) {
      double group_sum = 0, group_magnitude = 0, group_flips = 0;
      for (std::int64_t k = g * m.group_size; k < (g + 1) * m.group_size; ++k) {
        const double w = unpack_int4(codes, k);
        const double product = w * v.value[static_cast<std::size_t>(k)];
        group_sum += product;
        group_magnitude += std::fabs(product);
        group_flips += std::fabs(w) * v.deviation[static_cast<std::size_t>(k)];
      }
      const double scale = scale_at(m, n, g);
      sum += scale * group_sum;
      magnitude += scale * group_magnitude;
      flips += scale * group_flips;
    }
    out[static_cast<std::size_t>(n)] = {sum, constant * magnitude + flips};
  }
  return out;
}

/// Dequantizes codes that are known exactly (GEMM1's input).
QuantizedVector exact_values(const std::vector<std::uint8_t>& codes,
                             const std::vector<float>& scales, std::size_t group) {
  QuantizedVector v{std::vector<double>(codes.size()), std::vector<double>(codes.size(), 0.0)};
  for (std::size_t i = 0; i < codes.size(); ++i) {
    v.value[i] = static_cast<double>(e4m3_to_float(codes[i])) * scales[i / group];
  }
  return v;
}

/// GEMM1's input: the bytes the recipe defines, by the scalar formats.
QuantizedVector gemm1_input(const std::uint16_t* x, std::size_t hidden, const Recipe& recipe) {
  std::vector<float> values(hidden);
  for (std::size_t i = 0; i < hidden; ++i) values[i] = bf16_to_float(x[i]);
  std::vector<std::uint8_t> codes(hidden);

  if (recipe.name == RecipeName::kBf16Static || recipe.name == RecipeName::kStatic) {
    quantize_static(values, recipe.s1, codes);
    return exact_values(codes, {recipe.s1}, hidden);
  }
  std::vector<float> scales(hidden / kActivationGroup);
  for (std::size_t g = 0; g < scales.size(); ++g) {
    const auto in = std::span(values).subspan(g * kActivationGroup, kActivationGroup);
    const auto out = std::span(codes).subspan(g * kActivationGroup, kActivationGroup);
    const bool pow2 = recipe.name == RecipeName::kPow2Static;
    scales[g] = pow2 ? quantize_group_pow2(in, out) : quantize_group(in, out);
  }
  if (recipe.gemm1 == GemmInput::kGroup) return exact_values(codes, scales, kActivationGroup);

  std::vector<std::uint8_t> again(hidden);
  for (std::size_t g = 0; g < scales.size(); ++g) {
    requantize(std::span(codes).subspan(g * kActivationGroup, kActivationGroup), scales[g],
               recipe.s1, std::span(again).subspan(g * kActivationGroup, kActivationGroup));
  }
  return exact_values(again, {recipe.s1}, hidden);
}

double round_e4m3(double t) {
  return e4m3_to_float(e4m3_from_float(static_cast<float>(t)));
}

/// Quantizes h when each element is known up to its error and the scale lies in [lo, hi].
void quantize_interval(std::span<const Interval> h, double scale, double scale_lo, double scale_hi,
                       double* value, double* deviation) {
  for (std::size_t i = 0; i < h.size(); ++i) {
    const double nominal = round_e4m3(h[i].value / scale) * scale;
    const double lo = h[i].value - h[i].error, hi = h[i].value + h[i].error;
    double t_lo = lo / (lo >= 0 ? scale_hi : scale_lo), t_hi = hi / (hi >= 0 ? scale_lo : scale_hi);
    t_lo -= std::fabs(t_lo) * kF32Slack, t_hi += std::fabs(t_hi) * kF32Slack;
    const double c_lo = round_e4m3(t_lo), c_hi = round_e4m3(t_hi);
    const double v_lo = c_lo * (c_lo >= 0 ? scale_lo : scale_hi);
    const double v_hi = c_hi * (c_hi >= 0 ? scale_hi : scale_lo);
    value[i] = nominal;
    deviation[i] = std::max(v_hi - nominal, nominal - v_lo);
  }
}

/// GEMM2's input from h: static s2, or one dynamic scale per 128 channels.
QuantizedVector gemm2_input(const std::vector<Interval>& h, const Recipe& recipe) {
  QuantizedVector v{std::vector<double>(h.size()), std::vector<double>(h.size())};
  if (recipe.gemm2 == GemmInput::kStatic) {
    const double s = recipe.s2;
    quantize_interval(h, s, s, s, v.value.data(), v.deviation.data());
    return v;
  }
  for (std::size_t begin = 0; begin < h.size(); begin += kActivationGroup) {
    const auto group = std::span(h).subspan(begin, kActivationGroup);
    double amax = kMinGroupAmax, lo = kMinGroupAmax, hi = kMinGroupAmax;
    for (const Interval& e : group) {
      amax = std::max(amax, std::fabs(e.value));
      lo = std::max(lo, std::fabs(e.value) - e.error);
      hi = std::max(hi, std::fabs(e.value) + e.error);
    }
    quantize_interval(group, amax / kE4m3Max, lo / kE4m3Max * (1 - kF32Slack),
                      hi / kE4m3Max * (1 + kF32Slack), &v.value[begin], &v.deviation[begin]);
  }
  return v;
}

Interval swiglu_interval(const Interval& gate, const Interval& up) {
  const double silu = gate.value / (1 + std::exp(-gate.value));
  const double h = silu * up.value;
  const double error = kSiluSlope * gate.error * (std::fabs(up.value) + up.error) +
                       std::fabs(silu) * up.error + 4 * kF32Slack * std::fabs(h);
  return {h, error};
}

}  // namespace

ErrorModel error_model(Device::Kind kind) noexcept {
  return {.accumulation = kind == Device::Kind::kCuda ? 0x1p-14 : 0x1p-20};
}

LayerReference::LayerReference(ExpertWeights experts, Recipe recipe, float routed_scaling_factor,
                               ErrorModel model)
    : experts_(std::move(experts)),
      recipe_(recipe),
      routed_scaling_factor_(routed_scaling_factor),
      model_(model) {
  check_argument(experts_.first_expert == 0,
                 "the reference needs the layer's experts from 0, not {}", experts_.first_expert);
}

ReferenceRow LayerReference::row(const std::uint16_t* x, const std::int32_t* topk_idx,
                                 const float* topk_weights, int num_topk) const {
  const auto hidden = static_cast<std::size_t>(experts_.geometry.hidden);
  const QuantizedVector a = gemm1_input(x, hidden, recipe_);
  ReferenceRow row{std::vector<double>(hidden, 0.0), std::vector<double>(hidden, 0.0)};
  std::vector<double> magnitude(hidden, 0.0);

  for (int k = 0; k < num_topk; ++k) {
    if (topk_idx[k] < 0) continue;
    check_argument(static_cast<std::size_t>(topk_idx[k]) < experts_.experts.size(),
                   "topk_idx {} but the reference holds {} experts", topk_idx[k],
                   experts_.experts.size());
    const Expert& expert = experts_.experts[static_cast<std::size_t>(topk_idx[k])];
    const std::vector<Interval> gate = multiply(expert.gate, a, model_.accumulation);
    const std::vector<Interval> up = multiply(expert.up, a, model_.accumulation);
    std::vector<Interval> h(gate.size());
    for (std::size_t i = 0; i < h.size(); ++i) h[i] = swiglu_interval(gate[i], up[i]);
    const std::vector<Interval> c2 =
        multiply(expert.down, gemm2_input(h, recipe_), model_.accumulation);

    experts_.release_pages(
        topk_idx[k]);  // A layer may be larger than memory; its tokens come one by one.

    const double weight = static_cast<double>(topk_weights[k]) * routed_scaling_factor_;
    for (std::size_t i = 0; i < hidden; ++i) {
      const double error = c2[i].error + kBf16HalfUlp * (std::fabs(c2[i].value) + c2[i].error);
      row.y[i] += weight * c2[i].value;
      row.bound[i] += std::fabs(weight) * error;
      magnitude[i] += std::fabs(weight) * (std::fabs(c2[i].value) + error);
    }
  }
  for (std::size_t i = 0; i < hidden; ++i) {
    row.bound[i] += kBf16HalfUlp * (std::fabs(row.y[i]) + row.bound[i]) +
                    num_topk * 0x1p-23 * magnitude[i] + std::numeric_limits<float>::min();
  }
  return row;
}

void compare_row(const ReferenceRow& reference, const std::uint16_t* y, std::int64_t token,
                 VerifyReport& report) {
  // Relative L2 is kept as a running pair of sums of squares.
  double error2 = report.relative_l2 * report.relative_l2 * report.sum_squares;
  for (std::size_t i = 0; i < reference.y.size(); ++i) {
    const double actual = bf16_to_float(y[i]);
    const double expected = reference.y[i];
    const double error = std::fabs(actual - expected);
    // Written so that a NaN on one side only is wrong.
    const bool both_nan = std::isnan(actual) && std::isnan(expected);
    const double ratio = both_nan ? 0 : error / reference.bound[i];
    const bool right = both_nan || error <= reference.bound[i];
    report.num_wrong += right ? 0 : 1;
    if (!(ratio <= report.worst_ratio) || report.worst_element < 0) {
      report.worst_ratio = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
      report.worst_token = token;
      report.worst_element = static_cast<std::int64_t>(i);
      report.worst_expected = expected;
      report.worst_actual = actual;
      report.worst_bound = reference.bound[i];
    }
    error2 += error * error;
    report.sum_squares += expected * expected;
  }
  report.relative_l2 = report.sum_squares > 0 ? std::sqrt(error2 / report.sum_squares) : 0;
  report.num_rows += 1;
  report.num_elements += static_cast<std::int64_t>(reference.y.size());
}

}  // namespace sluice
