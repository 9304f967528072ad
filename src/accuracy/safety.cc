#include "accuracy/safety.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

#include "sluice/quant.h"

namespace sluice::accuracy {
namespace {

/// e4m3 spans 2^18 from its smallest subnormal to 448: past this headroom, ordinary values of a
/// few thousandths of the maximum begin to lose bits.
constexpr double kMaxHeadroom = 64;

double amax_of_routed(const RowPlan& plan, const Workload& tokens) {
  double amax = 0;
  const auto hidden = static_cast<std::size_t>(tokens.hidden);
  for (const RowPlan::Row& row : plan.rows) {
    const std::uint16_t* x = &tokens.x[static_cast<std::size_t>(row.token) * hidden];
    for (std::size_t i = 0; i < hidden; ++i) {
      amax = std::max(amax, std::fabs(static_cast<double>(bf16_to_float(x[i]))));
    }
  }
  return amax;
}

float scale_for(double amax) {
  return static_cast<float>(std::max(amax, static_cast<double>(kMinGroupAmax)) / kE4m3Max);
}

/// "s1 clips 0.3 % ..., s2 ..." or that all is well.
std::string recommend(const ScaleSafety& s) {
  if (s.origin == "none") return "no static scales: use direct, which needs none";
  std::string text;
  const auto judge = [&](const char* name, const char* tensor, double headroom, double clip_rate,
                         double amax) {
    std::string finding;
    if (clip_rate > 0) {
      finding = fmt::format("{} clips {:.3g} % of values: raise {}.input_scale to {:.4g} or more",
                            name, clip_rate * 100, tensor, amax / kE4m3Max);
    } else if (headroom > kMaxHeadroom) {
      finding = fmt::format(
          "{} leaves {:.0f}x headroom: small values lose bits; {}.input_scale of {:.4g} would do",
          name, headroom, tensor, 4 * amax / kE4m3Max);
    }
    if (!finding.empty()) text += (text.empty() ? "" : "; ") + finding;
  };
  judge("s1", "w1, w3", s.headroom1, s.clip_rate1, s.amax1);
  judge("s2", "w2", s.headroom2, s.clip_rate2, s.amax2);
  return text.empty() ? "static scales fit these tokens" : text + "; direct needs none of them";
}

}  // namespace

StaticScales calibrate(const LayerSource& source, const Workload& tokens, ThreadPool& pool,
                       const Progress& progress) {
  Evaluator evaluator(source, tokens, pool);
  const Gemm1Variant variant{.float32_sums = true};
  evaluator.run_gemm1({variant}, progress);
  double amax2 = 0;
  for (const double h : evaluator.h(variant)) amax2 = std::max(amax2, std::fabs(h));
  return {.s1 = scale_for(amax_of_routed(evaluator.rows(), tokens)), .s2 = scale_for(amax2)};
}

ScaleSafety judge_scales(const RowPlan& plan, const Workload& tokens, std::span<const double> h,
                         const ModelGeometry& geometry, const std::optional<StaticScales>& scales,
                         const std::string& origin) {
  ScaleSafety s;
  s.origin = origin;
  s.scales = scales.value_or(StaticScales{});
  s.experts.resize(static_cast<std::size_t>(geometry.num_experts));
  const auto hidden = static_cast<std::size_t>(geometry.hidden);
  const auto width = static_cast<std::size_t>(geometry.intermediate);
  const double limit1 = kSaturates * static_cast<double>(s.scales.s1);
  const double limit2 = kSaturates * static_cast<double>(s.scales.s2);
  std::uint64_t clipped1 = 0, clipped2 = 0;
  for (std::size_t e = 0; e < s.experts.size(); ++e) {
    ScaleSafety::PerExpert& expert = s.experts[e];
    expert.rows = plan.expert_begin[e + 1] - plan.expert_begin[e];
    for (auto r = static_cast<std::size_t>(plan.expert_begin[e]);
         r < static_cast<std::size_t>(plan.expert_begin[e + 1]); ++r) {
      const std::uint16_t* x = &tokens.x[static_cast<std::size_t>(plan.rows[r].token) * hidden];
      for (std::size_t i = 0; i < hidden; ++i) {
        const double value = std::fabs(static_cast<double>(bf16_to_float(x[i])));
        expert.amax1 = std::max(expert.amax1, value);
        clipped1 += value > limit1 ? 1 : 0;
      }
      for (const double value : h.subspan(r * width, width)) {
        expert.amax2 = std::max(expert.amax2, std::fabs(value));
        clipped2 += std::fabs(value) > limit2 ? 1 : 0;
      }
    }
    s.amax1 = std::max(s.amax1, expert.amax1);
    s.amax2 = std::max(s.amax2, expert.amax2);
  }
  if (scales && !plan.rows.empty()) {
    const auto rows = static_cast<double>(plan.rows.size());
    s.clip_rate1 = static_cast<double>(clipped1) / (rows * static_cast<double>(hidden));
    s.clip_rate2 = static_cast<double>(clipped2) / (rows * static_cast<double>(width));
    s.headroom1 = s.amax1 > 0 ? kE4m3Max * static_cast<double>(s.scales.s1) / s.amax1 : 0;
    s.headroom2 = s.amax2 > 0 ? kE4m3Max * static_cast<double>(s.scales.s2) / s.amax2 : 0;
  }
  s.recommendation = recommend(s);
  return s;
}

}  // namespace sluice::accuracy
