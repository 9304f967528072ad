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

/// How many times as large the largest input might be; 0 if there is no input or no scale.
double headroom(double scale, double amax) {
  return amax > 0 ? kE4m3Max * scale / amax : 0;
}

/// ", most in expert 5 (1.2 %)" where experts differ in what they lose; else nothing.
std::string most_clipped(const ScaleSafety& s, double ScaleSafety::PerExpert::*clip_rate,
                         double mean) {
  const auto worst = std::ranges::max_element(s.experts, {}, clip_rate);
  if (worst == s.experts.end() || (*worst).*clip_rate < 1.5 * mean) return "";
  return fmt::format(", most in expert {} ({:.3g} %)", worst - s.experts.begin(),
                     (*worst).*clip_rate * 100);
}

/// Experts that met more than their own calibration did. A layer's scale is the largest of all its
/// experts', so this clips nothing by itself; it says what the calibration is worth.
std::string beyond_calibration(const ScaleSafety& s) {
  int num_beyond = 0;
  double lowest = 1;
  std::size_t worst = 0;
  for (std::size_t e = 0; e < s.experts.size(); ++e) {
    bool is_beyond = false;
    for (const double headroom : {s.experts[e].own_headroom1, s.experts[e].own_headroom2}) {
      if (headroom == 0 || headroom * kSaturates >= kE4m3Max) continue;
      is_beyond = true;
      if (headroom < lowest) lowest = headroom, worst = e;
    }
    num_beyond += is_beyond ? 1 : 0;
  }
  if (num_beyond == 0) return "";
  return fmt::format(
      "{} of {} experts met more than their own input_scale allows, at most {:.{}f} times as much "
      "(expert {})",
      num_beyond, s.experts.size(), 1 / lowest, lowest < 0.1 ? 0 : 1, worst);
}

/// "s1 clips 0.3 % ..., s2 ..." or that all is well.
std::string recommend(const ScaleSafety& s) {
  using Expert = ScaleSafety::PerExpert;
  if (s.origin == "none") return "no static scales: use direct, which needs none";
  std::string text;
  const auto add = [&](const std::string& finding) {
    if (!finding.empty()) text += (text.empty() ? "" : "; ") + finding;
  };
  const auto judge = [&](const char* name, const char* tensor, double headroom, double clip_rate,
                         double Expert::*of_expert, double amax) {
    if (clip_rate > 0) {
      add(fmt::format("{} clips {:.3g} % of values{}: raise {}.input_scale to {:.4g} or more", name,
                      clip_rate * 100, most_clipped(s, of_expert, clip_rate), tensor,
                      amax / kE4m3Max));
    } else if (headroom > kMaxHeadroom) {
      add(fmt::format(
          "{} leaves {:.0f}x headroom: small values lose bits; {}.input_scale of {:.4g} would do",
          name, headroom, tensor, 4 * amax / kE4m3Max));
    }
  };
  judge("s1", "w1, w3", s.headroom1, s.clip_rate1, &Expert::clip_rate1, s.amax1);
  judge("s2", "w2", s.headroom2, s.clip_rate2, &Expert::clip_rate2, s.amax2);
  const bool fits = text.empty();
  add(beyond_calibration(s));
  if (!fits) return text + "; direct needs none of them";
  return "static scales fit these tokens" + (text.empty() ? "" : "; yet " + text);
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
                         const ModelGeometry& geometry, const JudgedScales& scales) {
  ScaleSafety s;
  s.origin = scales.origin;
  s.scales = scales.layer.value_or(StaticScales{});
  s.experts.resize(static_cast<std::size_t>(geometry.num_experts));
  const auto hidden = static_cast<std::size_t>(geometry.hidden);
  const auto width = static_cast<std::size_t>(geometry.intermediate);
  const double limit1 = kSaturates * static_cast<double>(s.scales.s1);
  const double limit2 = kSaturates * static_cast<double>(s.scales.s2);
  std::uint64_t clipped1 = 0, clipped2 = 0;
  for (std::size_t e = 0; e < s.experts.size(); ++e) {
    ScaleSafety::PerExpert& expert = s.experts[e];
    expert.rows = plan.expert_begin[e + 1] - plan.expert_begin[e];
    std::uint64_t own_clipped1 = 0, own_clipped2 = 0;
    for (auto r = static_cast<std::size_t>(plan.expert_begin[e]);
         r < static_cast<std::size_t>(plan.expert_begin[e + 1]); ++r) {
      const std::uint16_t* x = &tokens.x[static_cast<std::size_t>(plan.rows[r].token) * hidden];
      for (std::size_t i = 0; i < hidden; ++i) {
        const double value = std::fabs(static_cast<double>(bf16_to_float(x[i])));
        expert.amax1 = std::max(expert.amax1, value);
        own_clipped1 += value > limit1 ? 1 : 0;
      }
      for (const double value : h.subspan(r * width, width)) {
        expert.amax2 = std::max(expert.amax2, std::fabs(value));
        own_clipped2 += std::fabs(value) > limit2 ? 1 : 0;
      }
    }
    s.amax1 = std::max(s.amax1, expert.amax1);
    s.amax2 = std::max(s.amax2, expert.amax2);
    clipped1 += own_clipped1, clipped2 += own_clipped2;
    if (scales.layer && expert.rows > 0) {
      const auto rows = static_cast<double>(expert.rows);
      expert.clip_rate1 = static_cast<double>(own_clipped1) / (rows * static_cast<double>(hidden));
      expert.clip_rate2 = static_cast<double>(own_clipped2) / (rows * static_cast<double>(width));
    }
    if (scales.experts.empty()) continue;
    expert.scale1 = std::max(scales.experts[e].w1, scales.experts[e].w3);
    expert.scale2 = scales.experts[e].w2;
    expert.own_headroom1 = headroom(expert.scale1, expert.amax1);
    expert.own_headroom2 = headroom(expert.scale2, expert.amax2);
  }
  if (scales.layer && !plan.rows.empty()) {
    const auto rows = static_cast<double>(plan.rows.size());
    s.clip_rate1 = static_cast<double>(clipped1) / (rows * static_cast<double>(hidden));
    s.clip_rate2 = static_cast<double>(clipped2) / (rows * static_cast<double>(width));
    s.headroom1 = headroom(s.scales.s1, s.amax1);
    s.headroom2 = headroom(s.scales.s2, s.amax2);
  }
  s.recommendation = recommend(s);
  return s;
}

}  // namespace sluice::accuracy
