// Checkpoints that load, and what is said about them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model_files.h"
#include "sluice/checkpoint.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::f32_bytes;
using ::testing::HasSubstr;
using testing::ModelFiles;
using testing::TempDir;

constexpr int kLayer = ModelFiles::kLayer;

std::string all_warnings(const ModelFiles& files) {
  const TempDir dir;
  files.write(dir.path());
  std::string text;
  for (const auto& w : Checkpoint::open(dir.path()).warnings(kLayer)) {
    text += w.tensor + ": " + w.text + "\n";
  }
  return text;
}

/// ModelFiles has scales of w1 and w3 that differ, for tests that tell them apart.
ModelFiles sound_files() {
  ModelFiles files;
  for (int e = 0; e < ModelFiles::kNumExperts; ++e) {
    files.tensor(e, "w3.input_scale").bytes = files.tensor(e, "w1.input_scale").bytes;
  }
  return files;
}

TEST(Warnings, NoneForAGoodCheckpoint) {
  EXPECT_EQ(all_warnings(sound_files()), "");
}

TEST(Warnings, UncalibratedInputScales) {
  ModelFiles files;
  for (auto& [name, t] : files.files["act_scales.safetensors"]) t.bytes = f32_bytes({1.0f});
  EXPECT_THAT(all_warnings(files),
              HasSubstr("exactly 1.0, so they were never calibrated: use the recipe `direct`"));
  // They load all the same.
  const TempDir dir;
  files.write(dir.path());
  EXPECT_EQ(Checkpoint::open(dir.path()).static_scales(kLayer)->s1, 1.0f);
}

TEST(Warnings, AnInputScaleFarFromTheOthers) {
  ModelFiles files;
  files.tensor(0, "w2.input_scale").bytes = f32_bytes({1e-6f});
  EXPECT_THAT(all_warnings(files), HasSubstr("experts.0.w2.input_scale: 1e-06 is far from"));
}

TEST(Warnings, CodesThatNoSignedQuantizerMakes) {
  ModelFiles rare;
  rare.tensor(0, "gate_proj.weight").bytes[77] = '\x08';
  EXPECT_THAT(all_warnings(rare), HasSubstr("experts.0.gate_proj.weight: -8 occurs 1 times"));
  ModelFiles offset;
  for (char& byte : offset.tensor(1, "up_proj.weight").bytes) {
    byte = static_cast<char>(static_cast<unsigned char>(byte) ^ 0x88U);
  }
  EXPECT_THAT(all_warnings(offset), HasSubstr("experts.1.up_proj.weight: -8 occurs"));
  EXPECT_THAT(all_warnings(offset), HasSubstr("offset of 8"));
  ModelFiles zeros;
  for (char& byte : zeros.tensor(1, "down_proj.weight").bytes) byte = 0;
  EXPECT_THAT(all_warnings(zeros), HasSubstr("every weight looked at is 0"));
}

TEST(Warnings, DeadAndOutlyingWeightScales) {
  ModelFiles dead;
  dead.tensor(0, "up_proj.weight_scale_inv").bytes = f32_bytes(std::vector<float>(256, 1e-23f));
  EXPECT_THAT(all_warnings(dead), HasSubstr("up_proj.weight_scale_inv: largest scale is 1e-23"));
  ModelFiles outlier;
  std::vector<float> scales(256, 1e-3f);
  scales[9] = 100.0f;
  outlier.tensor(0, "up_proj.weight_scale_inv").bytes = f32_bytes(scales);
  EXPECT_THAT(all_warnings(outlier), HasSubstr("largest scale 100 is far from the median 0.001"));
}

TEST(Warnings, LayerThatTheConfigDoesNotExpect) {
  ModelFiles dense;
  dense.config["first_k_dense_replace"] = 6;
  dense.config["num_hidden_layers"] = 9;
  EXPECT_THAT(all_warnings(dense), HasSubstr("first_k_dense_replace = 6"));
  ModelFiles past;
  past.config["num_hidden_layers"] = 5;
  EXPECT_THAT(all_warnings(past), HasSubstr("past the model's 5 layers"));
}

}  // namespace
}  // namespace sluice
