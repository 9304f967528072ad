#include "checkpoint/weight_warnings.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>

#include "core/fail.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

constexpr double kMostSize = 30, kMostBetweenAlike = 10, kMostBetweenUnlike = 30;
/// Weights with scales below this contribute nothing; experts that were never routed to in training
/// look like this, and other engines turn them into NaN.
constexpr float kDeadScale = 1e-12f;
constexpr std::array kStems = {"gate_proj", "up_proj", "down_proj"};

bool is_dead(const WeightStats& s) {
  return s.largest_scale < kDeadScale;
}
bool is_comparable(const WeightStats& s) {
  return !s.are_all_zero() && !is_dead(s);
}
bool is_within(double value, double factor) {
  return value <= factor && value >= 1 / factor;
}
/// How far from 1, either way.
double distance(double ratio) {
  return std::fabs(std::log(ratio));
}

/// How many times `value` is the median of `others`; 1 while it is no farther from it than `most`.
/// Of an even number of others there are two medians. The nearer one counts, so that one outlier
/// among three values does not make outliers of the other two.
double times_the_others(double value, std::vector<double> others, double most) {
  std::ranges::sort(others);
  const double low = others[(others.size() - 1) / 2], high = others[others.size() / 2];
  const double ratio = value > high ? value / high : value < low ? value / low : 1;
  return is_within(ratio, most) ? 1 : ratio;
}

void warn_of_codes(const WeightStats& s, const std::string& tensor, bool expects_minus_eight,
                   Findings& out) {
  if (s.are_all_zero()) {
    out.add(WarningKind::kZeroWeights, s.largest_scale, tensor,
            fmt::format("every weight looked at is 0, beside scales up to {:.4g}{}",
                        s.largest_scale, s.largest_scale > 1 ? ": never written?" : ""));
  } else if (s.format != WeightFormat::kInt4) {
    return;  // What follows is of int4's nibbles.
  } else if (s.codes[0] > s.codes[8]) {
    // Around zero lie most weights: code 0 if signed, code 8 if stored with an offset of 8.
    out.add(WarningKind::kOffsetCodes, static_cast<double>(s.codes[0]), tensor,
            fmt::format("-8 occurs {} times and 0 only {} times: codes with an offset of 8 instead "
                        "of signed ones?",
                        s.codes[0], s.codes[8]));
  } else if (s.codes[0] > 0 && !expects_minus_eight) {
    out.add(WarningKind::kMinusEight, static_cast<double>(s.codes[0]), tensor,
            fmt::format("-8 occurs {} times in {} weights: scales of amax / 8", s.codes[0],
                        s.num_codes));
  }
}

/// What would make the weights of a matrix plausible, where that is known.
std::string remedy(const WeightStats& s) {
  constexpr double kPlausible = 5, kLargest = kE4m3Max;
  const double reciprocal = s.code_rms / s.median_scale * s.size / s.rms;
  std::string text;
  const auto add = [&](bool fits, const char* what) {
    if (fits) text += (text.empty() ? "; " : " or ") + std::string(what);
  };
  add(s.size > kMostSize && is_within(reciprocal, kPlausible), "reciprocals of the scales");
  add(is_within(s.size * kLargest, kPlausible), "scales divided by 448 once too often");
  add(is_within(s.size / kLargest, kPlausible), "scales not divided by 448");
  return text.empty() ? text : text + "?";
}

void warn_of_scales(const WeightStats& s, const std::string& tensor, Findings& out) {
  if (is_dead(s)) {
    out.add(WarningKind::kDeadScales, -s.largest_scale, tensor,
            fmt::format("largest scale is {:.4g}: a dead expert", s.largest_scale));
    return;
  }
  if (s.are_all_zero()) return;  // Its scales mean nothing, and warn_of_codes() names them.
  if (s.largest_used_scale > s.median_scale * kFarScale) {
    out.add(WarningKind::kFarScale, s.largest_used_scale / s.median_scale, tensor,
            fmt::format("largest scale {:.4g} is far from the median {:.4g}", s.largest_used_scale,
                        s.median_scale));
  }
  if (!is_within(s.size, kMostSize)) {
    out.add(WarningKind::kWeightSize, distance(s.size), tensor,
            fmt::format("implausible scales: the weights' root mean square is {:.4g} = {:.3g} / "
                        "sqrt(K), and near 1 / sqrt(K) is usual{}",
                        s.rms, s.size, remedy(s)));
  }
}

/// The matrices of one expert beside each other; nothing where one is implausible by itself.
void warn_of_expert(const ExpertLook& look, const WeightNames& names, Findings& out) {
  for (const WeightStats& s : look.matrices) {
    if (!is_comparable(s) || !is_within(s.size, kMostSize)) return;
  }
  struct Pair {
    std::size_t a, b;
    double most;
  };
  double worst = 1;
  Pair found{};
  for (const Pair& p : {Pair{0, 1, kMostBetweenAlike}, Pair{0, 2, kMostBetweenUnlike},
                        Pair{1, 2, kMostBetweenUnlike}}) {
    const double ratio = look.matrices[p.a].size / look.matrices[p.b].size;
    if (is_within(ratio, p.most) || distance(ratio) <= distance(worst)) continue;
    worst = ratio;
    found = p;
  }
  if (worst == 1) return;
  out.add(WarningKind::kMatrixSizes, distance(worst),
          names.scales(look.layer, look.expert, found.a),
          fmt::format("implausible scales: {}'s weights, in units of 1 / sqrt(K), are {:.3g} times "
                      "{}'s",
                      kStems[found.a], worst, kStems[found.b]));
}

/// Sizes of matrix `m` by layer and expert, of those that can be compared.
std::map<int, std::map<int, double>> sizes_of(const std::vector<ExpertLook>& looks, std::size_t m) {
  std::map<int, std::map<int, double>> sizes;
  for (const ExpertLook& look : looks) {
    if (is_comparable(look.matrices[m])) sizes[look.layer][look.expert] = look.matrices[m].size;
  }
  return sizes;
}

/// The values of all other keys.
std::vector<double> others_of(const std::map<int, double>& values, int key) {
  std::vector<double> others;
  for (const auto& [k, value] : values) {
    if (k != key) others.push_back(value);
  }
  return others;
}

void check_experts(const std::vector<ExpertLook>& looks, const WeightNames& names, Findings& out) {
  for (std::size_t m = 0; m < kStems.size(); ++m) {
    for (const auto& [layer, sizes] : sizes_of(looks, m)) {
      if (sizes.size() < 3) continue;  // Of two nobody can say which is the odd one.
      for (const auto& [expert, size] : sizes) {
        const double times = times_the_others(size, others_of(sizes, expert), kMostBetweenAlike);
        if (times == 1) continue;
        out.add(WarningKind::kExpertSizes, distance(times), names.scales(layer, expert, m),
                fmt::format("implausible scales: {:.3g} times the weights of the layer's other "
                            "experts",
                            times));
      }
    }
  }
}

/// A layer beside the others.
struct LayerDistance {
  std::string stems;  // "gate_proj, up_proj"
  double times = 1;   // Of the worst of them.
  std::size_t worst = 0;
};

std::map<int, LayerDistance> layer_distances(const std::vector<ExpertLook>& looks) {
  std::map<int, LayerDistance> result;
  for (std::size_t m = 0; m < kStems.size(); ++m) {
    std::map<int, double> by_layer;
    for (const auto& [layer, sizes] : sizes_of(looks, m)) {
      std::vector<double> values = others_of(sizes, -1);
      std::ranges::sort(values);
      by_layer[layer] = values[values.size() / 2];
    }
    for (const auto& [layer, size] : by_layer) {
      if (by_layer.size() < 2) break;
      const std::vector<double> others = others_of(by_layer, layer);
      // Of two layers, the one that is farther from 1 / sqrt(K) is the odd one.
      if (others.size() == 1 && distance(size) < distance(others.front())) continue;
      const double times = times_the_others(size, others, kMostBetweenAlike);
      if (times == 1) continue;
      LayerDistance& d = result[layer];
      d.stems += (d.stems.empty() ? "" : ", ") + std::string(kStems[m]);
      if (distance(times) <= distance(d.times)) continue;
      d.times = times;
      d.worst = m;
    }
  }
  return result;
}

void check_layers(const std::vector<ExpertLook>& looks, const WeightNames& names, Findings& out) {
  for (const auto& [layer, d] : layer_distances(looks)) {
    const auto first = std::ranges::find(looks, layer, &ExpertLook::layer);
    out.add(WarningKind::kLayerSizes, distance(d.times),
            names.scales(layer, first->expert, d.worst),
            fmt::format("implausible scales: layer {}'s weights of {} are {:.3g} times those of "
                        "the other layers",
                        layer, d.stems, d.times));
  }
}

}  // namespace

std::vector<int> outlying_layers(const std::vector<ExpertLook>& looks) {
  std::vector<int> layers;
  for (const auto& [layer, unused] : layer_distances(looks)) layers.push_back(layer);
  return layers;
}

void check_weights(const std::vector<ExpertLook>& looks, const WeightNames& names,
                   bool expects_minus_eight, Findings& out) {
  for (const ExpertLook& look : looks) {
    for (std::size_t m = 0; m < look.matrices.size(); ++m) {
      const WeightStats& stats = look.matrices[m];
      warn_of_codes(stats, names.codes(look.layer, look.expert, m), expects_minus_eight, out);
      warn_of_scales(stats, names.scales(look.layer, look.expert, m), out);
    }
    warn_of_expert(look, names, out);
  }
  check_experts(looks, names, out);
  check_layers(looks, names, out);
}

}  // namespace sluice
