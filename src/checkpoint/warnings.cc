// A review of a checkpoint: what loads but deserves a look. Input scales are read for all experts,
// weights for a few only.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <utility>

#include "checkpoint/checkpoint_impl.h"
#include "checkpoint/findings.h"
#include "checkpoint/weight_warnings.h"
#include "core/fail.h"

namespace sluice {
namespace {

/// Experts whose weights are looked at: of one layer, and in all where there are many layers.
constexpr int kExpertsPerLayer = 4, kExpertsInAll = 64;

float median_of(std::vector<float> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

/// Names of a layer's tensors in the checkpoint's own format.
struct Names {
  const Format& format;
  std::array<MatrixLayout, 3> layouts;  // gate, up, down
  const ExpertSpelling& spelling;
  int layer;

  [[nodiscard]] std::string input_scale(int expert, std::size_t matrix) const {
    return spelling.name(layer, expert, format.input_scale_part(layouts[matrix]));
  }
  [[nodiscard]] std::string weight(int expert, std::size_t matrix) const {
    return spelling.name(layer, expert, format.parts(layouts[matrix])[0].name);
  }
  [[nodiscard]] std::string scale(int expert, std::size_t matrix) const {
    return spelling.name(layer, expert, format.parts(layouts[matrix])[1].name);
  }
};

Names names_of(const CheckpointData& data, int layer) {
  return {.format = *data.format,
          .layouts = matrix_layouts(data.config.geometry),
          .spelling = data.index.spelling,
          .layer = layer};
}

/// gate, up, down.
/// The largest input that a static scale lets through is 448 times the scale. Models have seen some
/// of 1e5, and none of these.
constexpr float kSmallestInput = 1e-6f, kLargestInput = 1e9f;

constexpr std::array kInputMembers = {&InputScales::w1, &InputScales::w3, &InputScales::w2};

/// Gate and up read the same input, so their scales are the same unless something went wrong.
void check_pairs(const Names& names, const std::vector<InputScales>& scales, Findings& out) {
  for (std::size_t e = 0; e < scales.size(); ++e) {
    const InputScales& s = scales[e];
    if (s.w1 == s.w3 || s.w1 == 1 || s.w3 == 1) continue;
    out.add(WarningKind::kInputScalePair, std::fabs(std::log(s.w1 / s.w3)),
            names.input_scale(static_cast<int>(e), 0),
            fmt::format("{:.4g}, but w3's is {:.4g}, though both have the same input; the largest "
                        "of the layer is used",
                        s.w1, s.w3));
  }
}

void check_input_scales(const Names& names, const std::vector<InputScales>& scales, Findings& out) {
  if (scales.empty()) return;
  if (std::ranges::all_of(
          scales, [](const InputScales& s) { return s.w1 == 1 && s.w2 == 1 && s.w3 == 1; })) {
    out.add(WarningKind::kInputScalesOne, 0, names.input_scale(0, 0),
            "every input scale of the layer is exactly 1.0, so they were never calibrated: use the "
            "recipe `direct`, which needs none");
    return;
  }
  for (std::size_t m = 0; m < kInputMembers.size(); ++m) {
    std::vector<float> values;
    for (const InputScales& s : scales) values.push_back(s.*kInputMembers[m]);
    const float median = median_of(values);
    for (std::size_t e = 0; e < values.size(); ++e) {
      const std::string tensor = names.input_scale(static_cast<int>(e), m);
      const float ratio = values[e] / median;
      if (values[e] == 1) {
        out.add(WarningKind::kInputScaleOne, 0, tensor,
                "exactly 1.0, though others of the layer are not: not calibrated? The largest of "
                "the layer is used");
      } else if (!(ratio <= kFarScale && ratio >= 1 / kFarScale)) {
        out.add(WarningKind::kInputScaleFar, std::fabs(std::log(ratio)), tensor,
                fmt::format("{:.4g} is far from the layer's median {:.4g}", values[e], median));
      }
      const float largest = values[e] * kE4m3Max;
      if (!(largest >= kSmallestInput && largest <= kLargestInput)) {
        out.add(WarningKind::kInputScaleSize, std::fabs(std::log(values[e])), tensor,
                fmt::format("{:.4g} lets inputs up to {:.4g} through, where {:g} to {:g} is "
                            "plausible: static recipes would return zeros or cut-off values",
                            values[e], largest, kSmallestInput, kLargestInput));
      }
    }
  }
  check_pairs(names, scales, out);
}

void check_expected(const Names& names, const ModelConfig& config, Findings& out) {
  const int layer = names.layer;
  if (config.num_layers > 0 && layer >= config.num_layers) {
    out.add(WarningKind::kPredictionLayer, 0, names.weight(0, 0),
            fmt::format("layer {} is past the model's {} layers (a prediction layer?)", layer,
                        config.num_layers));
  } else if (const std::string dense = config.dense_reason(layer); !dense.empty()) {
    out.add(WarningKind::kUnexpectedLayer, 0, names.weight(0, 0),
            fmt::format("layer {} has routed experts, though {}", layer, dense));
  }
}

/// `count` of the layer's experts, first and last included; if it is one, another in each layer.
std::set<int> experts_to_look_at(int num_experts, int count, std::size_t layer_position) {
  if (count == 1)
    return {static_cast<int>(layer_position * 37 % static_cast<unsigned>(num_experts))};
  std::set<int> picks;
  for (int i = 0; i < count; ++i) picks.insert((num_experts - 1) * i / (count - 1));
  return picks;
}

/// Looks at layers and remembers which experts it has seen.
class Reviewer {
 public:
  explicit Reviewer(const CheckpointData& data) : data_(data) {}

  /// Throws: as Checkpoint::load_experts().
  void look_at_layer(int layer, const std::set<int>& experts) {
    const Names names = names_of(data_, layer);
    check_input_scales(names, data_.input_scales(layer), findings_);
    check_expected(names, data_.config, findings_);
    look_at_experts(layer, experts);
  }

  void look_at_layers(std::span<const int> layers) {
    const int count = std::clamp(kExpertsInAll / std::max(1, static_cast<int>(layers.size())), 1,
                                 kExpertsPerLayer);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      (void)data_.layer_tensors(layers[i]);  // Throws if the layer is not there.
      try {
        look_at_layer(layers[i], experts_to_look_at(data_.geometry().num_experts, count, i));
      } catch (const Error& error) {
        findings_.add(WarningKind::kUnreadable, 0, names_of(data_, layers[i]).weight(0, 0),
                      error.what());
        if (!first_error_) first_error_ = error.code();
      }
    }
    // One expert of a layer may be no good example of it.
    for (const int layer : outlying_layers(looks_)) {
      look_at_experts(layer, experts_to_look_at(data_.geometry().num_experts, kExpertsPerLayer, 0));
    }
  }

  [[nodiscard]] CheckpointReview finish() {
    const WeightNames names = {
        .codes = [this](int layer, int e,
                        std::size_t m) { return names_of(data_, layer).weight(e, m); },
        .scales = [this](int layer, int e,
                         std::size_t m) { return names_of(data_, layer).scale(e, m); }};
    check_weights(looks_, names, data_.format->makes_minus_eight(), findings_);
    std::set<int> layers;
    for (const ExpertLook& look : looks_) layers.insert(look.layer);
    std::vector<CheckpointWarning> warnings = findings_.take();
    for (CheckpointWarning& w : warnings) {
      if (w.kind == "unreadable") w.code = first_error_;
    }
    return {.warnings = std::move(warnings),
            .num_layers = static_cast<int>(layers.size()),
            .num_experts = static_cast<int>(looks_.size())};
  }

 private:
  void look_at_experts(int layer, const std::set<int>& experts) {
    if (!data_.format->weight_format()) return;
    data_.check_layer(layer);
    for (const int e : experts) {
      const auto is_this = [&](const ExpertLook& l) { return l.layer == layer && l.expert == e; };
      if (std::ranges::any_of(looks_, is_this)) continue;
      ExpertStorage storage;
      const Expert expert = data_.load_expert(layer, e, storage);
      looks_.push_back({.layer = layer,
                        .expert = e,
                        .matrices = {weight_stats(expert.gate), weight_stats(expert.up),
                                     weight_stats(expert.down)}});
      // Looking must not make the layer resident.
      const ExpertTensors& tensors =
          data_.layer_tensors(layer).experts[static_cast<std::size_t>(e)];
      for (const auto& part : tensors.parts) part.tensor.release();
    }
  }

  const CheckpointData& data_;
  std::vector<ExpertLook> looks_;
  Findings findings_;
  std::optional<ErrorCode> first_error_;
};

}  // namespace

CheckpointReview Checkpoint::review(std::span<const int> layers) const {
  Reviewer reviewer(*impl_);
  reviewer.look_at_layers(layers);
  return reviewer.finish();
}

std::vector<CheckpointWarning> Checkpoint::warnings(int layer) const {
  Reviewer reviewer(*impl_);
  const int num_experts = impl_->geometry().num_experts;
  reviewer.look_at_layer(layer, experts_to_look_at(num_experts, kExpertsPerLayer, 0));
  return reviewer.finish().warnings;
}

}  // namespace sluice
