#include "convert/quantize_weights.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr float kScaleOfZeros = 0x1p-24f;

/// Largest |code| on the side of the weight's sign.
int code_limit(float w) {
  return w < 0 ? 8 : 7;
}

/// As the scale falls from amax / 6 to amax / 16, |code| of a weight w steps from j to j + 1 at
/// |w| / (j + 1/2). Between two steps the codes q are fixed and the error is a parabola in s,
///   sum (w - s q)^2 = sum w^2 - 2 s A + s^2 B,  A = sum w q,  B = sum q^2,
/// with its least value at A / B or at the nearer end; among the bf16 numbers between the steps, at
/// one of the two beside that.
class MseSearch {
 public:
  MseSearch(std::span<const float> weights, float amax, DType scale_dtype)
      : is_bf16_(scale_dtype == DType::kBFloat16),
        top_(static_cast<double>(amax) / 6),
        bottom_(static_cast<double>(amax) / 16) {
    for (const float w : weights) add(w);
    std::ranges::sort(steps_, [](const Step& a, const Step& b) { return a.scale > b.scale; });
  }

  [[nodiscard]] float best() {
    double upper = top_;
    for (const Step& step : steps_) {
      try_interval(step.scale, upper);
      // From code j to j + 1.
      sum_wq_ += step.weight;
      sum_qq_ += 2.0 * step.code + 1.0;
      upper = step.scale;
    }
    try_interval(bottom_, upper);
    return static_cast<float>(best_scale_);
  }

 private:
  struct Step {
    double scale, weight;  // |w|
    int code;              // Before the step.
  };

  void add(float w) {
    const double size = std::fabs(static_cast<double>(w));
    int code = std::min(static_cast<int>(std::nearbyint(size / top_)), code_limit(w));
    sum_wq_ += size * code;
    sum_qq_ += static_cast<double>(code) * code;
    for (; code < code_limit(w); ++code) {
      const double scale = size / (code + 0.5);
      if (scale <= bottom_) break;
      steps_.push_back({.scale = std::min(scale, top_), .weight = size, .code = code});
    }
  }

  [[nodiscard]] double error_at(double s) const {
    return s * (s * sum_qq_ - 2 * sum_wq_);  // Plus sum w^2, which is the same for all.
  }

  void try_interval(double lower, double upper) {
    if (sum_qq_ == 0) return;  // All codes 0; a smaller scale does better.
    const double s = std::clamp(sum_wq_ / sum_qq_, lower, upper);
    if (error_at(s) >= best_error_) return;
    if (!is_bf16_) {
      best_error_ = error_at(s), best_scale_ = s;
      return;
    }
    // Positive numbers of bf16 are ordered as their bits are.
    const std::uint16_t near = bf16_from_float(static_cast<float>(s));
    for (const int bits : {near - 1, int{near}, near + 1}) {
      const double stored = bf16_to_float(static_cast<std::uint16_t>(bits));
      if (bits <= 0 || stored < lower || stored > upper) continue;
      if (error_at(stored) < best_error_) best_error_ = error_at(stored), best_scale_ = stored;
    }
  }

  bool is_bf16_;
  double top_, bottom_;
  double sum_wq_ = 0, sum_qq_ = 0;
  double best_error_ = 0, best_scale_ = top_;
  std::vector<Step> steps_;
};

/// kMse: a number of `scale_dtype`, unless amax is so small that there is none in its range.
float unrounded_scale(std::span<const float> weights, float amax, ScaleRule rule,
                      DType scale_dtype) {
  switch (rule) {
    case ScaleRule::kAmax7:
      return amax / 7;
    case ScaleRule::kAmax8:
      return amax / 8;
    case ScaleRule::kMse:
      return MseSearch(weights, amax, scale_dtype).best();
  }
  fail(ErrorCode::kInvalidArgument, "scale rule number {} does not exist", static_cast<int>(rule));
}

struct Matrix {
  std::span<const float> weights;
  std::int64_t k;
  const QuantizeRule& rule;
  std::span<std::uint8_t> codes;
  std::span<float> scales;
};

int code_of(float w, float scale) {
  return static_cast<int>(std::clamp(std::nearbyint(w / scale), -8.0f, 7.0f));
}

/// Group `g` of the whole matrix.
void quantize_one_group(const Matrix& m, std::size_t g) {
  const auto size = static_cast<std::size_t>(m.rule.group_size);
  const auto w = m.weights.subspan(g * size, size);
  const float scale = group_scale(w, m.rule.rule, m.rule.scale_dtype);
  const bool is_zero = scale == 0;
  m.scales[g] = is_zero ? kScaleOfZeros : scale;
  for (std::size_t i = 0; i < size; i += 2) {
    const int low = is_zero ? 0 : code_of(w[i], scale);
    const int high = is_zero ? 0 : code_of(w[i + 1], scale);
    m.codes[(g * size + i) / 2] = static_cast<std::uint8_t>((low & 0xf) | (high & 0xf) << 4);
  }
}

}  // namespace

float group_scale(std::span<const float> weights, ScaleRule rule, DType scale_dtype) {
  float amax = 0;
  for (const float w : weights) amax = std::max(amax, std::fabs(w));
  const float scale = amax == 0 ? 0 : unrounded_scale(weights, amax, rule, scale_dtype);
  return scale_dtype == DType::kBFloat16 ? bf16_to_float(bf16_from_float(scale)) : scale;
}

void quantize_weights(std::span<const float> weights, std::int64_t n, std::int64_t k,
                      const QuantizeRule& rule, ThreadPool& pool, std::span<std::uint8_t> codes,
                      std::span<float> scales) {
  const std::int64_t groups = k / rule.group_size;
  SLUICE_ASSERT(static_cast<std::int64_t>(weights.size()) == n * k);
  SLUICE_ASSERT(static_cast<std::int64_t>(codes.size()) == n * k / 2);
  SLUICE_ASSERT(static_cast<std::int64_t>(scales.size()) == n * groups);
  const Matrix matrix = {
      .weights = weights, .k = k, .rule = rule, .codes = codes, .scales = scales};
  constexpr std::int64_t kRowsPerTask = 16;
  pool.for_each_task((n + kRowsPerTask - 1) / kRowsPerTask, [&](std::int64_t task, int) {
    const std::int64_t end = std::min(n, (task + 1) * kRowsPerTask) * groups;
    for (std::int64_t g = task * kRowsPerTask * groups; g < end; ++g) {
      quantize_one_group(matrix, static_cast<std::size_t>(g));
    }
  });
}

}  // namespace sluice
