// The float64 layer. Plain loops over one token at a time; every quantity carries its error bound.
#include "sluice/lab/reference.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/fail.h"
#include "core/unwatched.h"
#include "quant/code_table.h"
#include "quant/row_cast.h"
#include "sluice/lab/parallel.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr double kBf16HalfUlp = 0x1p-8;  // Largest relative error of rounding to bf16.
constexpr double kF32Slack = 0x1p-22;    // A few float32 roundings, relative.
/// Of x s(a x), s the logistic function, for any a > 0: it is silu(a x) / a, and max |silu'(x)| is
/// 1.0998 at x = 2.4. SiTU's b tanh(x / b) s(x) has the slope sech^2 s + b tanh s (1 - s). As b
/// |tanh(x / b)| <= |x|, that is at most silu'(x) for x > 0, and below s + |x| s (1 - s) <= 0.5
/// for x < 0. So one number serves every kind.
constexpr double kGateSlope = 1.1;

/// A number known up to +-error.
struct Interval {
  double value = 0, error = 0;
};

/// Values a quantized vector takes, and by how much each may differ from ours.
struct QuantizedVector {
  std::vector<double> value, deviation;
};

double scale_at(const QuantMatrix& m, std::int64_t n, std::int64_t g) {
  return scale_value(m.scales, n * m.scales.dim(1) + g);
}

constexpr std::int64_t kAlignedProducts = 32;  // Of one step; see ErrorModel::alignment.

/// Largest |v| + deviation of each step of 32.
std::vector<double> step_peaks(const QuantizedVector& v) {
  std::vector<double> peaks(v.value.size() / kAlignedProducts, 0.0);
  for (std::size_t k = 0; k < v.value.size(); ++k) {
    double& peak = peaks[k / kAlignedProducts];
    peak = std::max(peak, std::fabs(v.value[k]) + v.deviation[k]);
  }
  return peaks;
}

/// What aligning may lose: the sum of independent parts of known sign, each from nothing to a known
/// size.
struct AlignmentLoss {
  double most = 0;     ///< All parts whole and of one sign.
  double mean = 0;     ///< All parts half.
  double squares = 0;  ///< Of the parts' widths.

  void add(double size, double sign) {
    most += size;
    mean += 0.5 * sign * size;
    squares += sign == 0 ? 4 * size * size : size * size;
  }
};

/// What one accumulator sums.
struct AccumulatorUnit {
  WeightFormat format;
  const std::uint8_t* codes;  ///< Of the row.
  std::int64_t begin, size;   ///< k in [begin, begin + size)
  std::array<double, kActivationGroup / kAlignedProducts> step_scales;  ///< Inside the products.
};

/// Of which every value of a code is a multiple.
double lowest_code_bit(WeightFormat format) {
  return format == WeightFormat::kInt4 ? 1.0 : 0.5;
}

/// The cut of a step is at most `cut`:
///  - the running sum loses less than `cut` when it is aligned, the new one when it is shortened;
///  - a product is a multiple of the lowest bit of v, which is more than |v| / 16, times that of w:
///    where that is not below the cut, nothing is lost; elsewhere no more than the cut, nor than
///    the product.
AlignmentLoss alignment_loss(const AccumulatorUnit& unit, const QuantizedVector& v,
                             const std::vector<double>& peaks, double alignment) {
  AlignmentLoss loss;
  double sum = 0, slack = 0;  // Running sum; what flipped codes may change of it.
  const auto sign_of_sum = [&] {
    return std::fabs(sum) <= slack + loss.most ? 0.0 : std::copysign(1.0, sum);
  };
  for (std::int64_t step = unit.begin; step < unit.begin + unit.size; step += kAlignedProducts) {
    const double scale =
        unit.step_scales[static_cast<std::size_t>((step - unit.begin) / kAlignedProducts)];
    const double lowest = lowest_code_bit(unit.format) * scale;
    const double peak = peaks[static_cast<std::size_t>(step / kAlignedProducts)];
    const double before = std::fabs(sum) + slack + loss.most;
    const double cut = alignment * std::max(max_code_value(unit.format) * scale * peak, before);
    loss.add(std::min(cut, before), sign_of_sum());
    for (std::int64_t k = step; k < step + kAlignedProducts; ++k) {
      const auto i = static_cast<std::size_t>(k);
      const double w = scale * code_value(unit.format, unit.codes, k), product = w * v.value[i];
      const double magnitude = std::fabs(v.value[i]), deviation = v.deviation[i];
      sum += product;
      slack += std::fabs(w) * deviation;
      if (w != 0 && (magnitude - deviation) * lowest < 16 * cut) {
        loss.add(std::min(cut, std::fabs(w) * (magnitude + deviation)),
                 deviation >= magnitude ? 0.0 : std::copysign(1.0, product));
      }
    }
    loss.add(alignment * (std::fabs(sum) + slack + loss.most), sign_of_sum());
  }
  return loss;
}

/// Bounds the loss of a row: parts are independent, so by Hoeffding's inequality their sum strays
/// from its mean by more than kHoeffding times the root sum square of their widths with a
/// probability below 1e-12. Of each group's mean an unknown share counts, as `cut` is an upper
/// limit.
class RowLoss {
 public:
  void add(const AlignmentLoss& group, double scale) {
    most_ += scale * group.most;
    mean_ += scale * group.mean;
    squares_ += scale * scale * group.squares;
    mean_squares_ += scale * scale * group.mean * group.mean;
  }
  [[nodiscard]] double bound() const {
    constexpr double kHoeffding = 3.77;  // sqrt(ln(2e12) / 2)
    return std::min(
        most_, std::fabs(mean_) + kHoeffding * (std::sqrt(squares_) + std::sqrt(mean_squares_)));
  }

 private:
  double most_ = 0, mean_ = 0, squares_ = 0, mean_squares_ = 0;
};

/// Of the products of one group.
struct GroupSums {
  double sum = 0, magnitude = 0, flips = 0;
};

SLUICE_UNWATCHED GroupSums sum_group(const CodeTable& table, const std::uint8_t* codes,
                                     std::int64_t begin, std::int64_t end, const double* value,
                                     const double* deviation) {
  GroupSums sums;
  for (std::int64_t k = begin; k < end; ++k) {
    const double w = table.value[codes[k / 2]][k % 2];
    const double product = w * value[k];
    sums.sum += product;
    sums.magnitude += std::fabs(product);
    sums.flips += std::fabs(w) * deviation[k];
  }
  return sums;
}

/// out[n] = sum_k w[n, k] * v[k], with what `model` allows and sum |w| deviation as its error.
std::vector<Interval> multiply(const QuantMatrix& m, const QuantizedVector& v,
                               const ErrorModel& model) {
  const CodeTable table(m.format);
  const std::int64_t num_groups = m.k() / m.group_size;
  std::vector<Interval> out(static_cast<std::size_t>(m.n()));
  const std::vector<double> peaks = step_peaks(v);
  for (std::int64_t n = 0; n < m.n(); ++n) {
    const std::uint8_t* codes = m.codes.as<std::uint8_t>() + n * m.codes.dim(1);
    double sum = 0, magnitude = 0, flips = 0;
    RowLoss lost;
    for (std::int64_t g = 0; g < num_groups; ++g) {
      const GroupSums group = sum_group(table, codes, g * m.group_size, (g + 1) * m.group_size,
                                        v.value.data(), v.deviation.data());
      const double scale = scale_at(m, n, g);
      sum += scale * group.sum;
      magnitude += scale * group.magnitude;
      flips += scale * group.flips;
      if (model.alignment > 0 && m.format == WeightFormat::kInt4) {
        const AccumulatorUnit unit{.format = m.format,
                                   .codes = codes,
                                   .begin = g * m.group_size,
                                   .size = m.group_size,
                                   .step_scales = {1, 1, 1, 1}};
        lost.add(alignment_loss(unit, v, peaks, model.alignment), scale);
      }
    }
    // MXFP4's scales are powers of two and go into the products: an accumulator sums 128. Where a
    // backend cannot do that, one for each 32 loses less.
    for (std::int64_t k = 0; model.alignment > 0 && m.format == WeightFormat::kMxfp4 && k < m.k();
         k += kActivationGroup) {
      AccumulatorUnit unit{.format = m.format,
                           .codes = codes,
                           .begin = k,
                           .size = kActivationGroup,
                           .step_scales = {}};
      for (std::size_t i = 0; i < unit.step_scales.size(); ++i) {
        unit.step_scales[i] = scale_at(m, n, k / m.group_size + static_cast<std::int64_t>(i));
      }
      lost.add(alignment_loss(unit, v, peaks, model.alignment), 1);
    }
    Interval& y = out[static_cast<std::size_t>(n)];
    y = {sum, model.accumulation * magnitude + lost.bound() + flips};
    if (!m.has_bias()) continue;
    y.value += m.bias.as<float>()[n];
    y.error += kF32Slack * std::fabs(y.value);  // One addition.
  }
  return out;
}

/// GEMM1's input: x after the recipe's casts, by the scalar formats. Known exactly.
QuantizedVector gemm1_input(const std::uint16_t* x, std::size_t hidden, const LayerRecipe& recipe) {
  std::vector<float> values(hidden);
  for (std::size_t i = 0; i < hidden; ++i) values[i] = bf16_to_float(x[i]);
  CastRow row;
  for (const Cast cast : gemm1_casts(recipe)) {
    row = cast_row(cast, values, recipe.s1);
    values = row.values();
  }
  QuantizedVector v{std::vector<double>(hidden), std::vector<double>(hidden, 0.0)};
  for (std::size_t i = 0; i < hidden; ++i) {
    v.value[i] = static_cast<double>(e4m3_to_float(row.codes[i])) * row.scale_of(i);
  }
  return v;
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

/// h with one scale for each 128 channels, which h's errors make uncertain, too.
QuantizedVector quantize_groups(const std::vector<Interval>& h) {
  QuantizedVector v{std::vector<double>(h.size()), std::vector<double>(h.size())};
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

/// GEMM2's input from h by the recipe's cast.
QuantizedVector gemm2_input(const std::vector<Interval>& h, const LayerRecipe& recipe) {
  switch (recipe.gemm2) {
    case Cast::kNone:
    case Cast::kGroupPow2:
    case Cast::kToken:
      break;
    case Cast::kGroup:
      return quantize_groups(h);
    case Cast::kStatic:
    case Cast::kStaticPow2: {
      QuantizedVector v{std::vector<double>(h.size()), std::vector<double>(h.size())};
      const double s = recipe.s2;
      quantize_interval(h, s, s, s, v.value.data(), v.deviation.data());
      return v;
    }
  }
  fail(ErrorCode::kUnsupported, "the reference has no GEMM2 input by cast {}",
       to_string(recipe.gemm2));
}

/// The image of x under a function that never falls: its ends are the images of x's ends. So a
/// limit costs nothing where it bites for all of x, and where it bites for a part of x (no
/// derivative there) the part beyond it collapses to one point. A NaN stays one.
template <class Function>
Interval image(const Interval& x, const Function& f) {
  const double value = f(x.value), low = f(x.value - x.error), high = f(x.value + x.error);
  return {value, std::max(value - low, high - value)};
}

/// a(gate) * u, where |a'| <= kGateSlope. `slack` is relative, of the float32 operations.
Interval gated(double a, const Interval& gate, const Interval& u, double slack) {
  const double h = a * u.value;
  const double error = kGateSlope * gate.error * (std::fabs(u.value) + u.error) +
                       std::fabs(a) * u.error + slack * std::fabs(h);
  return {h, error};
}

double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}

Interval activate_interval(const ActivationFn& fn, const Interval& gate, const Interval& up) {
  constexpr double kSlack = 4 * kF32Slack;
  const double limit = fn.limit;
  // Written so that a NaN passes, as activate() does it.
  const auto at_most = [&](double x) { return x > limit ? limit : x; };
  const auto clamped = [&](double x) { return x < -limit ? -limit : at_most(x); };
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      return gated(gate.value / (1 + std::exp(-gate.value)), gate, up, kSlack);
    case ActivationKind::kSwigluLimit: {
      const Interval g = image(gate, at_most);
      return gated(g.value / (1 + std::exp(-g.value)), g, image(up, clamped), kSlack);
    }
    case ActivationKind::kSwigluOai: {
      const Interval g = image(gate, at_most);
      const double t = static_cast<double>(fn.alpha) * g.value;
      const Interval u = image(up, [&](double x) { return clamped(x) + 1; });
      // alpha * gate is rounded before exp(), which makes |t| roundings of it where t is far below
      // 0: d s(t) / s(t) = (1 - s(t)) dt.
      const double slack = kSlack + (1 - logistic(t)) * std::fabs(t) * 0x1p-24;
      return gated(g.value / (1 + std::exp(-t)), g, u, slack);
    }
    case ActivationKind::kSitu: {
      const double b = fn.beta, lb = fn.linear_beta;
      const double a = b * std::tanh(gate.value / b) * logistic(gate.value);
      const Interval u = image(up, [&](double x) { return lb * std::tanh(x / lb); });
      return gated(a, gate, u, 2 * kSlack);  // Two tanh() and about as many roundings again.
    }
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

}  // namespace

LayerReference::LayerReference(ExpertWeights experts, LayerRecipe recipe,
                               float routed_scaling_factor, ErrorModel model)
    : experts_(std::move(experts)),
      recipe_(recipe),
      routed_scaling_factor_(routed_scaling_factor),
      model_(model) {
  check_argument(experts_.first_expert == 0,
                 "the reference needs the layer's experts from 0, not {}", experts_.first_expert);
  check_recipe(recipe_);
}

ReferenceRow LayerReference::row(const std::uint16_t* x, const std::int32_t* topk_idx,
                                 const float* topk_weights, int num_topk) const {
  const auto hidden = static_cast<std::size_t>(experts_.geometry.hidden);
  const QuantizedVector a = gemm1_input(x, hidden, recipe_);
  ReferenceRow row{std::vector<double>(hidden, 0.0), std::vector<double>(hidden, 0.0)};
  std::vector<double> magnitude(hidden, 0.0);

  std::vector<std::vector<Interval>> outputs(static_cast<std::size_t>(num_topk));
  const auto compute = [&](std::size_t k) {
    const std::int32_t e = topk_idx[k];
    if (e < 0) return;
    check_argument(static_cast<std::size_t>(e) < experts_.experts.size(),
                   "topk_idx {} but the reference holds {} experts", e, experts_.experts.size());
    const Expert& expert = experts_.experts[static_cast<std::size_t>(e)];
    const std::vector<Interval> gate = multiply(expert.gate, a, model_);
    const std::vector<Interval> up = multiply(expert.up, a, model_);
    std::vector<Interval> h(gate.size());
    for (std::size_t i = 0; i < h.size(); ++i) {
      h[i] = activate_interval(experts_.geometry.activation, gate[i], up[i]);
    }
    outputs[k] = multiply(expert.down, gemm2_input(h, recipe_), model_);
    experts_.release_pages(e);  // A layer may be larger than memory; its tokens come one by one.
  };
  // Real experts, of more than a million weights, take longer than it takes to start a thread.
  const std::int64_t weights =
      std::int64_t{experts_.geometry.hidden} * experts_.geometry.intermediate;
  const std::size_t together = weights < 1 << 20 ? outputs.size() : 1;
  for_pieces_in_parallel(outputs.size(), together, [&](std::size_t first, std::size_t end) {
    for (std::size_t k = first; k < end; ++k) compute(k);
  });

  for (int k = 0; k < num_topk; ++k) {
    if (topk_idx[k] < 0) continue;
    const std::vector<Interval>& c2 = outputs[static_cast<std::size_t>(k)];
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

}  // namespace sluice
