// The W4AFP8 layout as published, in every variant that must load.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "expect_error.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "sluice/quant.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::ModelFiles;
using testing::TempDir;

constexpr int kLayer = ModelFiles::kLayer;

/// Writes `files` to a directory of its own and opens it.
Checkpoint open(const TempDir& dir, const ModelFiles& files) {
  files.write(dir.path());
  return Checkpoint::open(dir.path());
}

TEST(Layout, ReadsGeometryAndFormat) {
  const TempDir dir;
  const Checkpoint checkpoint = open(dir, ModelFiles());
  const ModelGeometry& g = checkpoint.geometry();
  EXPECT_EQ(g.name, "deepseek_v3");
  EXPECT_EQ(g.num_experts, 2);
  EXPECT_EQ(g.num_topk, 2);
  EXPECT_EQ(g.hidden, 256);
  EXPECT_EQ(g.intermediate, 128);
  EXPECT_EQ(g.group_size, 128);
  EXPECT_EQ(g.routed_scaling_factor, 2.5f);
  EXPECT_EQ(checkpoint.format(), "w4afp8");
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("quant_method = 'w4afp8'"));
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("I8 [128, 128]"));
  EXPECT_THAT(checkpoint.moe_layers(), ElementsAre(kLayer));
  EXPECT_EQ(checkpoint.path(), dir.path());
}

TEST(Layout, HandsOutTheFilesBytes) {
  const TempDir dir;
  ModelFiles files;
  const Checkpoint checkpoint = open(dir, files);
  const ExpertWeights weights = checkpoint.load_experts(kLayer, 1, 1);
  ASSERT_EQ(weights.experts.size(), 1U);
  EXPECT_EQ(weights.layer, kLayer);
  EXPECT_EQ(weights.first_expert, 1);
  EXPECT_EQ(weights.geometry.hidden, 256);
  const Expert& expert = weights.experts.front();
  const std::pair<const char*, const QuantMatrix*> matrices[] = {
      {"gate_proj", &expert.gate}, {"up_proj", &expert.up}, {"down_proj", &expert.down}};
  for (const auto& [stem, matrix] : matrices) {
    const bool is_down = matrix == &expert.down;
    EXPECT_EQ(matrix->n(), is_down ? 256 : 128);
    EXPECT_EQ(matrix->k(), is_down ? 128 : 256);
    EXPECT_EQ(matrix->group_size, 128);
    EXPECT_EQ(matrix->codes.dtype, DType::kPackedInt4);
    EXPECT_EQ(matrix->scales.dtype, DType::kFloat32);
    const std::string& codes = files.tensor(1, std::string(stem) + ".weight").bytes;
    const std::string& scales = files.tensor(1, std::string(stem) + ".weight_scale_inv").bytes;
    ASSERT_EQ(matrix->codes.bytes(), codes.size());
    ASSERT_EQ(matrix->scales.bytes(), scales.size());
    EXPECT_EQ(std::memcmp(matrix->codes.data, codes.data(), codes.size()), 0);
    EXPECT_EQ(std::memcmp(matrix->scales.data, scales.data(), scales.size()), 0);
  }
  EXPECT_EQ(weights.bytes(), 3U * 128 * 128 + 3U * 256 * 4);
}

TEST(Layout, WeightsOutliveTheCheckpoint) {
  const TempDir dir;
  ExpertWeights weights;
  {
    const Checkpoint checkpoint = open(dir, ModelFiles());
    weights = checkpoint.load_experts(kLayer, 0, 2);
  }
  const ExpertWeights copy = weights;
  weights = {};
  EXPECT_EQ(copy.experts[0].gate.scales.as<float>()[0], 0.001f);
}

TEST(Layout, StaticScalesAreTheMaximumOverAllExperts) {
  const TempDir dir;
  const Checkpoint checkpoint = open(dir, ModelFiles());
  const auto all = checkpoint.input_scales(kLayer);
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(all[0].w1, 0.5f);
  EXPECT_EQ(all[0].w3, 0.625f);
  EXPECT_EQ(all[1].w2, 0.625f);
  const auto scales = checkpoint.static_scales(kLayer);
  ASSERT_TRUE(scales);
  EXPECT_EQ(scales->s1, 0.75f);
  EXPECT_EQ(scales->s2, 0.625f);
  // A rank that owns only expert 0 still gets the layer's.
  const auto own = checkpoint.load_experts(kLayer, 0, 1).static_scales;
  ASSERT_TRUE(own);
  EXPECT_EQ(own->s1, 0.75f);
  EXPECT_EQ(own->s2, 0.625f);
}

TEST(Layout, WithoutInputScalesThereAreNoStaticScales) {
  const TempDir dir;
  ModelFiles files;
  files.files.erase("act_scales.safetensors");
  const Checkpoint checkpoint = open(dir, files);
  EXPECT_FALSE(checkpoint.static_scales(kLayer));
  EXPECT_TRUE(checkpoint.input_scales(kLayer).empty());
  EXPECT_FALSE(checkpoint.load_experts(kLayer, 0, 2).static_scales);
}

TEST(Layout, Bf16ScalesAndScalarInputScales) {
  const TempDir dir;
  ModelFiles files;
  const auto to_bf16 = [](testing::RawTensor& t) {
    std::string out;
    for (std::size_t i = 0; i < t.bytes.size(); i += 4) {
      float value;
      std::memcpy(&value, t.bytes.data() + i, 4);
      const std::uint16_t bits = bf16_from_float(value);
      out.append(reinterpret_cast<const char*>(&bits), 2);
    }
    t.dtype = "BF16", t.bytes = out;
  };
  for (int e = 0; e < 2; ++e) {
    for (const char* stem : {"gate_proj", "up_proj", "down_proj"}) {
      to_bf16(files.tensor(e, std::string(stem) + ".weight_scale_inv"));
    }
    to_bf16(files.tensor(e, "w1.input_scale"));
    files.tensor(e, "w2.input_scale").shape = {};
  }
  const Checkpoint checkpoint = open(dir, files);
  const ExpertWeights weights = checkpoint.load_experts(kLayer, 0, 2);
  EXPECT_EQ(weights.experts[0].up.scales.dtype, DType::kBFloat16);
  EXPECT_EQ(weights.experts[0].up.scales.as<std::uint16_t>()[0], bf16_from_float(0.001f));
  EXPECT_EQ(weights.static_scales->s1, 0.75f);
  EXPECT_EQ(weights.static_scales->s2, 0.625f);
}

/// Everything in model.safetensors, without an index.
ModelFiles single_file() {
  ModelFiles files;
  testing::RawFile all;
  for (auto& [name, file] : files.files) all.merge(file);
  files.files.clear();
  files.files["model.safetensors"] = all;
  files.with_index = false;
  return files;
}

TEST(Layout, OneFileWithoutIndex) {
  const TempDir dir;
  const Checkpoint checkpoint = open(dir, single_file());
  EXPECT_EQ(checkpoint.load_experts(kLayer, 0, 2).static_scales->s1, 0.75f);
}

TEST(Layout, ShardsWithoutIndex) {
  const TempDir dir;
  ModelFiles files;
  files.with_index = false;
  EXPECT_EQ(open(dir, files).load_experts(kLayer, 0, 2).static_scales->s1, 0.75f);
}

TEST(Layout, IndexMayNameTheInputScalesToo) {
  const TempDir dir;
  ModelFiles files;
  files.files["model-00003-of-00003.safetensors"] = files.files["act_scales.safetensors"];
  files.files.erase("act_scales.safetensors");
  EXPECT_EQ(open(dir, files).static_scales(kLayer)->s1, 0.75f);
}

TEST(Layout, TheSameInputScaleTwiceIsHarmless) {
  const TempDir dir;
  ModelFiles files;
  files.files["model-00003-of-00003.safetensors"] = files.files["act_scales.safetensors"];
  EXPECT_EQ(open(dir, files).static_scales(kLayer)->s1, 0.75f);
}

TEST(Layout, FilesThatTheIndexLeavesOutGiveInputScalesOnly) {
  const TempDir dir;
  ModelFiles files;
  files.write(dir.path());
  // An older copy of the weights lies beside the shards.
  testing::write_file(dir / "consolidated.safetensors",
                      files.files[ModelFiles::shard_name(0)].to_bytes());
  EXPECT_EQ(Checkpoint::open(dir.path()).load_experts(kLayer, 0, 2).experts.size(), 2U);
}

TEST(Layout, OtherTensorsAreIgnored) {
  const TempDir dir;
  ModelFiles files;
  testing::RawFile& shard = files.files[ModelFiles::shard_name(0)];
  shard["model.embed_tokens.weight"] = {"Q5_EXOTIC", {4}, "abcd"};
  shard["model.layers.5.mlp.gate.weight"] = {"F64", {1}, "abcdefgh"};
  shard["model.layers.5.mlp.shared_experts.up_proj.weight"] = {"F8_E4M3", {2}, "ab"};
  shard["model.layers.05.mlp.experts.0.up_proj.weight"] = {"I8", {2}, "ab"};
  const Checkpoint checkpoint = open(dir, files);
  EXPECT_THAT(checkpoint.moe_layers(), ElementsAre(kLayer));
  EXPECT_EQ(checkpoint.load_experts(kLayer, 0, 2).experts.size(), 2U);
}

TEST(Layout, NumbersBeyondAnyModelAreRefused) {
  for (const char* const name : {"model.layers.5.mlp.experts.99999999999999999999.w1.weight",
                                 "model.layers.5.mlp.experts.2147483648.up_proj.weight",
                                 "model.layers.99999999999.mlp.experts.0.up_proj.weight"}) {
    const TempDir dir;
    ModelFiles files;
    files.files[ModelFiles::shard_name(0)][name] = {"I8", {2}, "ab"};
    testing::expect_error(ErrorCode::kUnsupported, {name, "is above 2147483647"},
                          [&] { (void)open(dir, files); });
  }
}

TEST(Layout, MisalignedScalesAreCopied) {
  int num_misaligned = 0;
  // Bytes before everything else ("a" sorts first) put the rest at every position modulo 4.
  for (std::uint64_t offset = 1; offset <= 4; ++offset) {
    const TempDir dir;
    ModelFiles files;
    files.files[ModelFiles::shard_name(0)]["a"] = {"U8", {offset}, std::string(offset, 'x')};
    const Checkpoint checkpoint = open(dir, files);
    const ExpertWeights weights = checkpoint.load_experts(kLayer, 0, 1);
    const Expert& expert = weights.experts.front();
    for (int pass = 0; pass < 2; ++pass) {
      for (const auto* matrix : {&expert.gate, &expert.up, &expert.down}) {
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(matrix->scales.data) % 4, 0U);
        EXPECT_EQ(matrix->scales.as<float>()[1], 0.002f);
      }
      weights.release_pages(0);  // must leave the copies alone
    }
    num_misaligned += reinterpret_cast<std::uintptr_t>(expert.gate.codes.data) % 4 != 0;
  }
  EXPECT_EQ(num_misaligned, 3);
}

TEST(Layout, RecognisesMixedPrecision) {
  const TempDir dir;
  ModelFiles files;
  files.config.erase("quantization_config");
  files.hf_quant_config = {
      {"quantization", {{"quant_algo", "MIXED_PRECISION"}, {"kv_cache_quant_algo", nullptr}}}};
  const Checkpoint checkpoint = open(dir, files);
  EXPECT_EQ(checkpoint.format(), "w4afp8");
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("MIXED_PRECISION"));
}

TEST(Layout, KnowsThreeNamesForTheNumberOfExperts) {
  for (const char* const key : {"num_experts", "num_local_experts"}) {
    const TempDir dir;
    ModelFiles files;
    files.config.erase("n_routed_experts");
    files.config[key] = 2;
    files.config.erase("routed_scaling_factor");
    files.config["first_k_dense_replace"] = nullptr;
    const Checkpoint checkpoint = open(dir, files);
    EXPECT_EQ(checkpoint.geometry().num_experts, 2) << key;
    EXPECT_EQ(checkpoint.geometry().routed_scaling_factor, 1.0f);
  }
}

TEST(Layout, TheActivationIsPartOfTheGeometry) {
  for (const char* const act : {"", "silu"}) {
    const TempDir dir;
    ModelFiles files;
    if (*act) files.config["hidden_act"] = act;
    EXPECT_EQ(open(dir, files).geometry().activation, ActivationFn{ActivationKind::kSwiglu});
    EXPECT_EQ(open(dir, files).geometry().weight_format, WeightFormat::kInt4);
  }
}

TEST(Layout, IdentityFollowsConfigAndHeaders) {
  const TempDir a, b, c, d;
  ModelFiles files;
  const std::uint64_t identity = open(a, files).identity();
  EXPECT_EQ(open(b, files).identity(), identity);
  files.config["routed_scaling_factor"] = 1.0;
  EXPECT_NE(open(c, files).identity(), identity);
  ModelFiles other;
  other.files[ModelFiles::shard_name(0)]["extra"] = {"U8", {1}, "x"};
  EXPECT_NE(open(d, other).identity(), identity);
  // Another training of the same model has the same: weights are not looked at.
  const TempDir e;
  ModelFiles trained;
  for (char& code : trained.tensor(0, "gate_proj.weight").bytes) code = static_cast<char>(~code);
  EXPECT_EQ(open(e, trained).identity(), identity);
}

}  // namespace
}  // namespace sluice
