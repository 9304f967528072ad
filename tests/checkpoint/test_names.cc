// One set of experts under every name, in every container, with every fault of names and shapes:
// each combination has its verdict, and what loads has the same codes and scales.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "spelled_checks.h"

namespace sluice {
namespace {

using testing::expect_cases;
using testing::expect_error;
using testing::expect_loads;
using testing::expect_refused;
using testing::f32_bytes;
using testing::kCorrupt;
using testing::kStorages;
using testing::kUnsupported;
using testing::SpelledFiles;
using testing::Spelling;
using testing::Storage;
using testing::TempDir;

constexpr const char* kPrefixes[] = {"model.layers", "model.language_model.layers",
                                     "language_model.model.layers", "language_model.layers",
                                     "layers"};
constexpr const char* kContainers[] = {"mlp.experts", "block_sparse_moe.experts", "ffn.experts",
                                       "feed_forward.experts"};
/// 5 prefixes x 4 containers x 2 stems x 2 formats.
TEST(Names, EverySpellingLoadsTheSameWeights) {
  int count = 0;
  for (const char* const prefix : kPrefixes) {
    for (const char* const container : kContainers) {
      for (const bool has_numbers : {false, true}) {
        for (const Storage storage : {Storage::kW4afp8, Storage::kWords}) {
          const SpelledFiles files(Spelling{.prefix = prefix,
                                            .container = container,
                                            .has_numbers = has_numbers,
                                            .storage = storage});
          SCOPED_TRACE(files.codes_name(0, 0));
          expect_loads(files);
          ++count;
        }
      }
    }
  }
  EXPECT_EQ(count, 80);
}

/// 6 containers of codes x 3 dtypes of scales.
TEST(Names, EveryStorageLoadsTheSameWeights) {
  for (const Storage storage : kStorages) {
    for (const char* const dtype : {"F32", "BF16", "F16"}) {
      SCOPED_TRACE(dtype);
      SCOPED_TRACE(static_cast<int>(storage));
      expect_loads(SpelledFiles(Spelling{.storage = storage, .scale_dtype = dtype}));
    }
  }
}

const Spelling kCt = {.storage = Storage::kWords};
std::string shape_bytes(std::int64_t n, std::int64_t k) {
  const std::int64_t values[] = {n, k};
  return {reinterpret_cast<const char*>(values), sizeof values};
}

TEST(Names, WeightShapeIsCheckedWhereItIsThere) {
  expect_loads(SpelledFiles(Spelling{.storage = Storage::kWords, .shape_dtype = "I32"}));
  expect_loads(SpelledFiles(Spelling{.storage = Storage::kWords, .shape_dtype = ""}));
  const auto says = [](std::int64_t n, std::int64_t k) {
    return [=](SpelledFiles& f) { f.at(f.name(1, 0, "weight_shape")).bytes = shape_bytes(n, k); };
  };
  expect_cases({
      {"transposed", kCt, says(256, 128), kCorrupt, {"1.gate_proj.weight_shape: says [256, 128]"}},
      {"odd", kCt, says(128, 255), kCorrupt, {"1.gate_proj.weight_shape: says [128, 255]"}},
      {"negative", kCt, says(-128, 256), kCorrupt, {"1.gate_proj.weight_shape: says [-128, 256]"}},
  });
}

TEST(Names, ShapesThatContradictTheConfig) {
  const auto reshape = [](bool is_scale, std::vector<std::uint64_t> shape) {
    return [=](SpelledFiles& f) {
      f.at(is_scale ? f.scales_name(1, 1) : f.codes_name(1, 1)).shape = shape;
    };
  };
  const Spelling bytes = {.storage = Storage::kBytesOffset};
  expect_cases({
      {"w4afp8 scale", {}, reshape(true, {2, 128}), kUnsupported, {"[2, 128]", "transposed?"}},
      {"ct groups",
       kCt,
       [](SpelledFiles& f) {
         f.at(f.scales_name(1, 1)).shape = {128, 1};
         f.at(f.scales_name(1, 1)).bytes.resize(std::size_t{128} * 4);
       },
       kUnsupported,
       {"[128, 1]", "scales of groups of 256, and the configuration has 128"}},
      {"w4afp8 codes", {}, reshape(false, {64, 256}), kUnsupported, {"[64, 256]", "[128, 128]"}},
      {"ct scale", kCt, reshape(true, {2, 128}), kUnsupported, {"[2, 128]", "transposed?"}},
      {"ct words", kCt, reshape(false, {32, 128}), kUnsupported, {"[32, 128]", "transposed?"}},
      {"ct bytes", bytes, reshape(false, {64, 256}), kUnsupported, {"[64, 256]", "[128, 128]"}},
  });
}

/// Replaces the experts by tensors of all of them.
std::function<void(SpelledFiles&)> fused(const std::string& name) {
  return [=](SpelledFiles& f) {
    f.files.clear(), f.weight_map = nlohmann::ordered_json::object();
    f.add("0.safetensors", f.experts() + name, {"I32", {2, 1, 1}, std::string(8, '\0')});
  };
}

TEST(Names, FusedExpertsAreRefusedAsSuch) {
  for (const char* const prefix : kPrefixes) {
    for (const char* const name :
         {"gate_up_proj_packed", "gate_up_proj", "gate_up_proj.weight", "gate_up_proj_blocks",
          "down_proj_packed", "w13_weight", "w2_weight_scale"}) {
      SCOPED_TRACE(name);
      SpelledFiles files(Spelling{.prefix = prefix, .storage = Storage::kWords});
      fused(name)(files);
      const bool is_gpt_oss = std::string(name).ends_with("_blocks");
      expect_refused(files, kUnsupported,
                     {files.experts() + name, "in one tensor",
                      is_gpt_oss ? "quant_method 'mxfp4'" : "gate or up"});
    }
  }
}

TEST(Names, WhatIsNotSupportedIsNamed) {
  const auto experts = std::string("model.layers.3.mlp.experts.");
  const auto add = [](const std::string& name) {
    return [=](SpelledFiles& f) { f.add("0.safetensors", name, {"BF16", {1}, "ab"}); };
  };
  const auto rename = [](int m, const char* what, const std::string& to) {
    return [=](SpelledFiles& f) { f.rename(f.name(1, m, what), to); };
  };
  const auto packed_to_weight = [](const char* dtype, std::vector<std::uint64_t> shape) {
    return [=](SpelledFiles& f) {
      for (int e = 0; e < 2; ++e) {
        for (int m = 0; m < 3; ++m) f.rename(f.codes_name(e, m), f.name(e, m, "weight"));
      }
      f.at(f.name(0, 2, "weight")).dtype = dtype, f.at(f.name(0, 2, "weight")).shape = shape;
    };
  };
  const Spelling numbers = {.has_numbers = true, .storage = Storage::kWords};
  expect_cases({
      {"weight I32",
       kCt,
       packed_to_weight("I32", {256, 16}),
       kUnsupported,
       {"0.down_proj.weight is I32", "down_proj.weight_packed"}},
      {"weight BF16",
       kCt,
       packed_to_weight("BF16", {256, 32}),
       kUnsupported,
       {"0.down_proj.weight is BF16", "declares INT4", "down_proj.weight_packed"}},
      {"gate bias",
       {},
       add(experts + "0.gate_proj.bias"),
       kUnsupported,
       {"0.gate_proj.bias is a bias"}},
      {"down bias",
       kCt,
       add(experts + "1.down_proj.bias"),
       kUnsupported,
       {"1.down_proj.bias is a bias"}},
      {"w1 bias", numbers, add(experts + "1.w1.bias"), kUnsupported, {"1.w1.bias is a bias"}},
      {"fused bias",
       kCt,
       add(experts + "gate_up_proj_bias"),
       kUnsupported,
       {experts + "gate_up_proj_bias", "beside tensors of each"}},
      {"both stems",
       kCt,
       add(experts + "0.w1.weight_packed"),
       kUnsupported,
       {"0.w1.weight_packed", "gate_proj", "w1, w3, w2", "one of the two"}},
      {"w1 under words",
       {},
       rename(0, "weight", experts + "1.w1.weight"),
       kUnsupported,
       {"1.w1.weight", "one of the two"}},
      {"words under numbers",
       numbers,
       rename(2, "weight_packed", experts + "1.down_proj.weight_packed"),
       kUnsupported,
       {"one of the two", "1.down_proj.weight_packed"}},
      {"two prefixes",
       kCt,
       rename(2, "weight_packed", "language_model.layers.3.mlp.experts.1.down_proj.weight_packed"),
       kUnsupported,
       {"language_model.layers.3", "one prefix"}},
      {"two containers",
       kCt,
       rename(2, "weight_packed", "model.layers.3.ffn.experts.1.down_proj.weight_packed"),
       kUnsupported,
       {"ffn.experts", "one prefix"}},
      {"missing, own spelling",
       numbers,
       [](SpelledFiles& f) { f.erase(f.codes_name(1, 1)); },
       kUnsupported,
       {experts + "1.w3.weight_packed is missing", "complete the files"}},
      {"unknown prefix",
       {.prefix = "decoder.blocks"},
       [](SpelledFiles&) {},
       kUnsupported,
       {"no tensor named", "decoder.blocks.3.mlp.experts.0.down_proj.weight"}},
      {"unknown container",
       {.container = "moe.experts"},
       [](SpelledFiles&) {},
       kUnsupported,
       {"no tensor named", "model.layers.3.moe.experts.0."}},
      {"scale dtype",
       {},
       [](SpelledFiles& f) { f.at(f.scales_name(1, 0)).dtype = "U32"; },
       kUnsupported,
       {"1.gate_proj.weight_scale_inv: dtype U32", "F32 or BF16 or F16"}},
      {"E8M0 scale",
       kCt,
       [](SpelledFiles& f) {
         f.at(f.scales_name(0, 0)) = {"F8_E8M0", {128, 2}, std::string(256, 'x')};
       },
       kUnsupported,
       {"0.gate_proj.weight_scale: dtype F8_E8M0"}},
  });
}

TEST(Names, BytesWithoutEvidenceAreRefused) {
  for (const Storage storage : {Storage::kW4afp8U8, Storage::kBytesOffset}) {
    SpelledFiles files(Spelling{.storage = storage});
    std::string& bytes = files.at(files.codes_name(0, 0)).bytes;
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i);
    expect_refused(files, kUnsupported, {files.codes_name(0, 0), "dtype U8 does not say"});
  }
}

TEST(Names, OtherExpertsAndEmptyTensorsAreLeftAlone) {
  SpelledFiles files;
  files.add("0.safetensors", "model.empty", {"F32", {0, 256}, ""});
  files.add("0.safetensors", "model.layers.3.mlp.shared_experts.gate_proj.weight",
            {"U8", {1}, "x"});
  files.add("0.safetensors", "model.layers.3.mlp.experts.e_score_correction_bias",
            {"U8", {1}, "x"});
  expect_loads(files);
}

/// A norm of the experts' outputs, a scale of each: without them the outputs would be others.
TEST(Names, WhatLiesAmongTheExpertsIsNotLeftOut) {
  for (const Storage storage : {Storage::kW4afp8, Storage::kWords}) {
    for (const char* const name : {"post_expert_norm.weight", "scale", "weight_zero_point",
                                   "00.gate_proj.weight", "expert_bias", "act_fn.alpha"}) {
      SCOPED_TRACE(name);
      SpelledFiles files(Spelling{.storage = storage});
      files.add("0.safetensors", files.experts() + name, {"BF16", {1}, "ab"});
      expect_refused(files, kUnsupported, {files.experts() + name});
    }
  }
}

TEST(Names, RoutingAmongTheExpertsIsLeftAlone) {
  for (const char* const name : {"router.weight", "gate.weight", "e_score_correction_bias"}) {
    SCOPED_TRACE(name);
    SpelledFiles files;
    files.add("0.safetensors", files.experts() + name, {"BF16", {1}, "ab"});
    expect_loads(files);
  }
}

TEST(Names, ExpertsUnderAnUnknownNameBesideKnownOnesAreAWarning) {
  SpelledFiles files;
  files.add("0.safetensors", "visual.blocks.0.mlp.experts.0.gate_proj.weight", {"U8", {1}, "x"});
  files.add("0.safetensors", "visual.blocks.0.mlp.experts.0.up_proj.weight", {"U8", {1}, "x"});
  expect_loads(files, 1,
               "visual.blocks.0.mlp.experts.0.gate_proj.weight: in 0.safetensors: looks like a "
               "tensor of experts, whose name is not known; it is not read (2 tensors like this)");
}

TEST(Names, PredictionLayersWithTheirOwnNumbersAreLeftOutWithAWarning) {
  SpelledFiles files;
  for (const char* const part : {"0.gate_proj.weight", "0.up_proj.weight", "gate_up_proj"}) {
    files.add("0.safetensors", std::string("mtp.layers.0.mlp.experts.") + part, {"U8", {1}, "x"});
  }
  expect_loads(
      files, 1,
      "mtp.layers.0.mlp.experts.0.gate_proj.weight: in 0.safetensors: of a prediction layer");
}

TEST(Names, ALayerOfFusedExpertsBesideOneThatLoads) {
  SpelledFiles files;
  files.add("0.safetensors", "model.layers.4.mlp.experts.gate_up_proj", {"U8", {1}, "x"});
  expect_loads(files);
  const TempDir dir;
  files.write(dir.path());
  expect_error(kUnsupported,
               {"layer 4", "model.layers.4.mlp.experts.gate_up_proj", "in one tensor"},
               [&] { (void)Checkpoint::open(dir.path()).load_experts(4, 0, 1); });
  files.config["num_hidden_layers"] = 5;
  expect_loads(files, 1,
               "config.json: of its 2 layers with routed experts, the files have 1; missing: 4; "
               "model.layers.4.mlp.experts.gate_up_proj holds the weights of all experts");
}

}  // namespace
}  // namespace sluice
