// Planted faults and sound oddities, each with the kinds of warnings that it must give.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <string>

#include "raw_checkpoint.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::f32_bytes;
using ::testing::HasSubstr;
using testing::RawCheckpoint;
using testing::RawTensor;
using testing::TempDir;

constexpr int kNumLayers = 4, kNumExperts = 4;

/// Layers 3 .. 6 of 4 experts, W4AFP8 with F32 scales.
SyntheticCheckpoint sound_spec() {
  ModelGeometry geometry = preset_geometry("tiny");
  geometry.num_experts = kNumExperts;
  return {.geometry = geometry, .num_layers = kNumLayers};
}

/// Calls `edit` for each tensor whose name contains all of `parts`; fails if there is none.
void for_each(RawCheckpoint& raw, const std::vector<std::string>& parts,
              const std::function<void(RawTensor&)>& edit) {
  int count = 0;
  for (auto& [file, tensors] : raw.files) {
    for (auto& [name, tensor] : tensors) {
      bool matches = true;
      for (const std::string& part : parts) matches &= name.find(part) != std::string::npos;
      if (!matches) continue;
      edit(tensor);
      ++count;
    }
  }
  ASSERT_GT(count, 0) << parts.front();
}

void map_floats(RawTensor& tensor, const std::function<float(float)>& f) {
  ASSERT_EQ(tensor.dtype, "F32");
  for (std::size_t i = 0; i < tensor.bytes.size(); i += sizeof(float)) {
    float value = 0;
    std::memcpy(&value, tensor.bytes.data() + i, sizeof value);
    value = f(value);
    std::memcpy(tensor.bytes.data() + i, &value, sizeof value);
  }
}

/// Weight scales of tensors whose names contain all of `parts`, times `factor`.
std::function<void(RawCheckpoint&)> times(float factor, std::vector<std::string> parts) {
  parts.emplace_back("weight_scale_inv");
  return [=](RawCheckpoint& raw) {
    for_each(raw, parts, [&](RawTensor& t) { map_floats(t, [&](float s) { return s * factor; }); });
  };
}

std::function<void(RawCheckpoint&)> both(std::function<void(RawCheckpoint&)> a,
                                         std::function<void(RawCheckpoint&)> b) {
  return [=](RawCheckpoint& raw) { a(raw), b(raw); };
}

std::function<void(RawCheckpoint&)> set_input_scale(float value, std::vector<std::string> parts) {
  parts.emplace_back("input_scale");
  return [=](RawCheckpoint& raw) {
    for_each(raw, parts, [&](RawTensor& t) { t.bytes = f32_bytes({value}); });
  };
}

void reciprocals(RawCheckpoint& raw, const std::vector<std::string>& parts) {
  for_each(raw, parts, [](RawTensor& t) { map_floats(t, [](float s) { return 1 / s; }); });
}

/// Codes of 0, and scales as uninitialized memory may hold them.
void never_written(RawCheckpoint& raw) {
  for (const char* expert : {"experts.1.", "experts.2.", "experts.3."}) {
    for_each(raw, {expert, "_proj.weight"}, [](RawTensor& t) {
      if (t.dtype == "F32") return map_floats(t, [](float) { return 1e35f; });
      t.bytes.assign(t.bytes.size(), '\0');
    });
  }
}

/// -7 becomes -8 here and there: what scales of amax / 8 make.
void minus_eight(RawCheckpoint& raw) {
  for_each(raw, {"_proj.weight"}, [](RawTensor& t) {
    if (t.dtype != "I8") return;
    for (std::size_t i = 0; i < t.bytes.size(); i += 3) {
      if ((t.bytes[i] & 15) == 9) t.bytes[i] = static_cast<char>((t.bytes[i] & 0xf0) | 8);
    }
  });
}

/// A group of zeros has a scale of 1 in each matrix: its first 64 bytes of codes, its first scale.
void zero_group(RawCheckpoint& raw) {
  for_each(raw, {"_proj.weight"}, [](RawTensor& t) {
    if (t.dtype == "I8") {
      std::fill_n(t.bytes.begin(), 64, '\0');
    } else {
      t.bytes.replace(0, sizeof(float), f32_bytes({1.0f}));
    }
  });
}

struct Case {
  const char* name;
  std::function<void(RawCheckpoint&)> spoil;
  std::set<std::string> warnings = {}, notes = {};
  const char* tensor = "";  ///< Part of the place that is named.
  const char* text = "";
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.name;
}

class Plausibility : public ::testing::TestWithParam<Case> {};

TEST_P(Plausibility, IsJudgedRight) {
  static const TempDir sound_dir;
  static const RawCheckpoint sound = [] {
    write_synthetic_checkpoint(sound_spec(), sound_dir / "sound");
    return RawCheckpoint(sound_dir / "sound");
  }();
  const Case& c = GetParam();
  RawCheckpoint raw = sound;
  if (c.spoil) c.spoil(raw);
  const TempDir dir;
  raw.write(dir / "x");
  const Checkpoint checkpoint = Checkpoint::open(dir / "x");
  const CheckpointReview review = checkpoint.review(checkpoint.moe_layers());
  EXPECT_EQ(review.num_layers, kNumLayers);
  EXPECT_EQ(review.num_experts, kNumLayers * kNumExperts);
  std::set<std::string> warnings, notes;
  std::string lines;
  for (const CheckpointWarning& w : review.warnings) {
    EXPECT_TRUE((w.is_note ? notes : warnings).insert(w.kind).second) << w.kind << " twice";
    EXPECT_GE(w.count, 1);
    lines += w.tensor + ": " + w.text + "\n";
  }
  EXPECT_EQ(warnings, c.warnings) << lines;
  EXPECT_EQ(notes, c.notes) << lines;
  EXPECT_THAT(lines, HasSubstr(c.tensor));
  EXPECT_THAT(lines, HasSubstr(c.text));
}

const Case kCases[] = {
    // Sound.
    {"Unchanged", {}},
    {"MinusEight", minus_eight, {}, {"minus-eight"}, "", "amax / 8 (48 matrices like this"},
    {"ZeroGroupWithScaleOne", zero_group},
    {"LayerTimes5", times(5, {"layers.4."})},
    {"LayersApartBy5EachWay", both(times(5, {"layers.4."}), times(0.2f, {"layers.6."}))},
    {"ExpertTimes5", times(5, {"layers.5.", "experts.2."})},
    {"GateTimes5", times(5, {"gate_proj"})},
    {"DownBy5", times(0.2f, {"down_proj"})},
    {"ModelTimes8", times(8, {"layers."})},
    {"ModelBy8", times(1 / 8.0f, {"layers."})},
    {"PredictionLayer",
     [](RawCheckpoint& raw) { raw.config["num_hidden_layers"] = 6; },
     {},
     {"prediction-layer"},
     "layers.6.",
     "past the model's 6 layers"},
    // Scales of weights.
    {"Reciprocals",
     [](RawCheckpoint& raw) { reciprocals(raw, {"weight_scale_inv"}); },
     {"weight-size"},
     {},
     "",
     "; reciprocals of the scales"},
    {"ReciprocalsInOneLayer",
     [](RawCheckpoint& raw) {
       reciprocals(raw, {"layers.5.", "weight_scale_inv"});
     },
     {"weight-size", "layer-sizes"},
     {},
     "layers.5.",
     "reciprocals"},
    {"LayerTimes118",
     times(118, {"layers.6."}),
     {"weight-size", "layer-sizes"},
     {},
     "layers.6.",
     "layer 6's weights of gate_proj, up_proj, down_proj"},
    {"GateAndUpOfALayerTimes118",
     both(times(118, {"layers.3.", "gate_proj"}), times(118, {"layers.3.", "up_proj"})),
     {"weight-size", "layer-sizes"},
     {},
     "layers.3.",
     "layer 3's weights of gate_proj, up_proj are"},
    {"LayerTimes12", times(12, {"layers.4."}), {"layer-sizes"}, {}, "layers.4.", "layer 4's"},
    {"LayerBy12", times(1 / 12.0f, {"layers.4."}), {"layer-sizes"}, {}, "layers.4.", "layer 4's"},
    {"ExpertTimes12",
     times(12, {"layers.5.", "experts.2."}),
     {"expert-sizes"},
     {},
     "layers.5.mlp.experts.2.",
     "(3 matrices like this"},
    {"GateTimes12", times(12, {"gate_proj"}), {"matrix-sizes"}, {}, "gate_proj", "up_proj's"},
    {"DividedBy448Again",
     times(1 / 448.0f, {"layers."}),
     {"weight-size"},
     {},
     "",
     "divided by 448 once too often? (48 matrices"},
    {"TimesFourHundredAndFortyEight",
     times(448, {"layers."}),
     {"weight-size"},
     {},
     "",
     "not divided by 448? (48 matrices"},
    {"NeverWritten", never_written, {"zero-weights"}, {}, "", "scales up to 1e+35"},
    {"DeadExpert", times(1e-20f, {"layers.4.", "experts.0."}), {"dead-scales"}, {}, "experts.0."},
    // Scales of inputs.
    {"InputScalesOne",
     set_input_scale(1, {"layers."}),
     {"input-scales-one"},
     {},
     "input_scale",
     "`direct`, which needs none (4 layers like this"},
    {"InputScaleOfW1One",
     set_input_scale(1, {"layers.3.", "experts.0.w1."}),
     {"input-scale-one"},
     {},
     "layers.3.mlp.experts.0.w1.input_scale",
     "exactly 1.0"},
    {"InputScalesOfAPairDiffer",
     set_input_scale(0.03125f, {"layers.3.", "experts.0.w1."}),
     {"input-scale-pair"},
     {},
     "layers.3.mlp.experts.0.w1.input_scale",
     "0.03125, but w3's is"},
    {"InputScaleFar",
     set_input_scale(1e-7f, {"layers.3.", "experts.0.w2."}),
     {"input-scale-far"},
     {},
     "experts.0.w2.input_scale",
     "1e-07 is far"},
};

INSTANTIATE_TEST_SUITE_P(Cases, Plausibility, ::testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

/// With 58 layers only one expert of each is read, and four of the one that stands out.
TEST(Review, FindsOneLayerAmongMany) {
  SyntheticCheckpoint spec = sound_spec();
  spec.geometry.hidden = 128;
  spec.num_layers = 58;
  const TempDir dir;
  write_synthetic_checkpoint(spec, dir / "sound");
  RawCheckpoint raw(dir / "sound");
  times(118, {"layers.40."})(raw);
  raw.write(dir / "x");
  const Checkpoint checkpoint = Checkpoint::open(dir / "x");
  const CheckpointReview review = checkpoint.review(checkpoint.moe_layers());
  EXPECT_EQ(review.num_layers, 58);
  EXPECT_EQ(review.num_experts, 58 + 3);
  ASSERT_EQ(review.warnings.size(), 2);
  EXPECT_EQ(review.warnings[0].kind, "weight-size");
  EXPECT_EQ(review.warnings[1].kind, "layer-sizes");
  EXPECT_THAT(review.warnings[1].tensor, HasSubstr("layers.40."));
}

/// A layer that cannot be loaded does not hide what is said of the others.
TEST(Review, GoesOnPastALayerThatCannotBeLoaded) {
  const TempDir dir;
  write_synthetic_checkpoint(sound_spec(), dir / "sound");
  RawCheckpoint raw(dir / "sound");
  for_each(raw, {"layers.4.", "gate_proj.weight_scale_inv"},
           [](RawTensor& t) { map_floats(t, [](float) { return std::nanf(""); }); });
  times(118, {"layers.5."})(raw);
  raw.write(dir / "x");
  const Checkpoint checkpoint = Checkpoint::open(dir / "x");
  const CheckpointReview review = checkpoint.review(checkpoint.moe_layers());
  ASSERT_EQ(review.warnings.size(), 3);
  EXPECT_EQ(review.warnings[0].kind, "unreadable");
  EXPECT_THAT(review.warnings[0].text, HasSubstr("gate_proj.weight_scale_inv"));
  EXPECT_EQ(review.warnings[2].kind, "layer-sizes");
  const int absent[] = {77};
  EXPECT_THROW((void)checkpoint.review(absent), Error);
}

}  // namespace
}  // namespace sluice
