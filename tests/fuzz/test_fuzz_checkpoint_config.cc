// Runs the fuzz target's entry point on random programs of edits, and shows that the second reading
// that it relies on sees a change. The entry point aborts on a broken promise, so returning is
// passing.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "checkpoint/formats/mxfp4.h"
#include "config_meaning.h"
#include "random_program.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace sluice::fuzz {
namespace {

constexpr const char* kConfig =
    R"({"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 4, "routed_scaling_factor": 2.5,
        "quantization_config": {"quant_method": "w4afp8"}})";
constexpr const char* kIndex = R"({"weight_map": {"x": "a.safetensors"}})";

ModelConfig read(const std::string& text) {
  return parse_model_config({.text = text, .name = "config.json"}, std::nullopt);
}

/// The config as it is, with `edit` applied to what the reader made of it.
bool agrees(const std::function<void(ModelConfig&)>& edit) {
  ModelConfig config = read(kConfig);
  edit(config);
  return means_the_same({.config = kConfig, .algo = {}, .index = {}}, config);
}

TEST(SecondReading, SeesWhatTheFirstGotWrong) {
  EXPECT_TRUE(agrees([](ModelConfig&) {}));
  EXPECT_FALSE(agrees([](ModelConfig& c) { c.geometry.hidden = 128; }));
  EXPECT_FALSE(agrees([](ModelConfig& c) { c.geometry.intermediate = 256; }));
  EXPECT_FALSE(agrees([](ModelConfig& c) { c.geometry.num_experts = 4; }));
  EXPECT_FALSE(agrees([](ModelConfig& c) { c.geometry.num_topk = 1; }));
  EXPECT_FALSE(agrees([](ModelConfig& c) { c.geometry.routed_scaling_factor = 1; }));
  EXPECT_FALSE(agrees([](ModelConfig& c) { c.num_layers = 3; }));
  EXPECT_FALSE(agrees([](ModelConfig& c) {
    c.geometry.activation = {.kind = ActivationKind::kSwigluLimit, .limit = 10};
  }));
}

TEST(SecondReading, SeesKeysThatWereNotHonoured) {
  for (const char* const key : {"swiglu_limit", "hidden_act", "mlp_bias", "moe_new"}) {
    auto config = nlohmann::ordered_json::parse(kConfig);
    config[key] = "gelu";
    EXPECT_FALSE(means_the_same({.config = config.dump(), .algo = {}, .index = {}}, read(kConfig)))
        << key;
  }
}

TEST(SecondReading, SeesAnotherFile) {
  WeightMap map = parse_weight_map(kIndex, "index");
  const Texts texts = {.config = {}, .algo = {}, .index = kIndex};
  EXPECT_TRUE(means_the_same(texts, map));
  map.at("x").file = "b.safetensors";
  EXPECT_FALSE(means_the_same(texts, map));
}

TEST(SecondReading, SeesAnotherLayersActivation) {
  auto text = nlohmann::ordered_json::parse(kConfig);
  text.update({{"model_type", "deepseek_v4"}, {"swiglu_limit", {0, 7.0, nullptr, 10.0}}});
  const Texts texts = {.config = text.dump(), .algo = {}, .index = {}};
  ModelConfig config = read(texts.config);
  EXPECT_TRUE(means_the_same(texts, config));
  config.activations.by_layer[3].limit = 7;
  EXPECT_FALSE(means_the_same(texts, config));
  config.activations = {.by_layer = {ActivationFn{}}, .list_key = {}, .file = {}};
  EXPECT_FALSE(means_the_same(texts, config));
}

/// What `quantization` and, beside it, `dtype` declare, if a format of that name is recognised.
bool is_declared_as(const char* format, const char* quantization, const char* dtype) {
  auto text = nlohmann::ordered_json::parse(kConfig);
  text["quantization_config"] = nlohmann::ordered_json::parse(quantization);
  if (dtype) text["expert_dtype"] = dtype;
  const Texts texts = {.config = text.dump(), .algo = {}, .index = {}};
  const std::unique_ptr<const Format> mxfp4 = make_mxfp4_format(
      {.format = format, .codes = {}, .scales = {}, .code_dtypes = {}, .scale_dtypes = {}});
  return is_declared(texts, *mxfp4);
}

TEST(SecondReading, SeesWhichExpertsAreMxfp4) {
  constexpr const char* kFp8 = R"({"quant_method": "fp8"})";
  EXPECT_TRUE(is_declared_as("deepseek-fp4", kFp8, "fp4"));
  EXPECT_FALSE(is_declared_as("deepseek-fp4", kFp8, nullptr));
  EXPECT_FALSE(is_declared_as("deepseek-fp4", kFp8, "fp8"));
  EXPECT_FALSE(is_declared_as("deepseek-fp4", R"({"quant_method": "w4afp8"})", "fp4"));
  EXPECT_FALSE(is_declared_as("fp8-block", kFp8, "fp4"));
  EXPECT_TRUE(is_declared_as("fp8-block", kFp8, "fp8"));
  constexpr const char* kOwn = R"({"quant_method": "fp8", "expert_dtype": "fp4"})";
  EXPECT_TRUE(is_declared_as("deepseek-fp4", kOwn, nullptr));
  EXPECT_FALSE(is_declared_as("deepseek-fp4", kOwn, "fp8"));
  nlohmann::ordered_json packed = {{"quant_method", "compressed-tensors"},
                                   {"format", "mxfp4-pack-quantized"}};
  auto& weights = packed["config_groups"]["group_0"]["weights"];
  weights = {{"num_bits", 4}, {"type", "float"}, {"group_size", 32}, {"strategy", "group"}};
  EXPECT_TRUE(is_declared_as("compressed-tensors", packed.dump().c_str(), nullptr));
  weights["group_size"] = 16;
  EXPECT_FALSE(is_declared_as("compressed-tensors", packed.dump().c_str(), nullptr));
}

TEST(SecondReading, SeesWhatChangesCodes) {
  for (const char* const key : {"zero_point", "desc_act", "online_hadamard", "weight_rotation"}) {
    auto own = nlohmann::ordered_json{{"quant_method", "fp8"}};
    own[key] = false;
    EXPECT_TRUE(is_declared_as("deepseek-fp4", own.dump().c_str(), "fp4")) << key;
    own[key] = true;
    EXPECT_FALSE(is_declared_as("deepseek-fp4", own.dump().c_str(), "fp4")) << key;
  }
  constexpr const char* kWide = R"({"quant_method": "fp8", "bits": 16})";
  EXPECT_FALSE(is_declared_as("deepseek-fp4", kWide, "fp4"));
  constexpr const char* kAsymmetric = R"({"quant_method": "fp8", "symmetric": false})";
  EXPECT_FALSE(is_declared_as("deepseek-fp4", kAsymmetric, "fp4"));
}

TEST(SecondReading, TellsBrokenJsonFromValuesOfNoSense) {
  EXPECT_FALSE(may_be_corrupt({.config = R"({"hidden_size": -7})", .algo = {}, .index = {}}));
  EXPECT_TRUE(may_be_corrupt({.config = R"({"hidden_size": })", .algo = {}, .index = {}}));
  EXPECT_TRUE(may_be_corrupt({.config = "{}", .algo = "{", .index = {}}));
}

/// A language model without a name of its own has that of the whole.
TEST(SecondReading, AnEmptyModelTypeIsNone) {
  auto text = nlohmann::ordered_json::parse(kConfig);
  text.update({{"model_type", "gpt_oss"}, {"swiglu_limit", 7.0}});
  text["text_config"] = {{"model_type", ""}};
  const Texts texts = {.config = text.dump(), .algo = {}, .index = {}};
  const ModelConfig config = read(texts.config);
  EXPECT_EQ(config.geometry.activation.kind, ActivationKind::kSwigluOai);
  EXPECT_TRUE(means_the_same(texts, config));
}

/// Edits of sound files, most of them few, so that both verdicts are common.
TEST(FuzzCheckpointConfig, RandomPrograms) {
  constexpr std::uint64_t kSeed = 20261129, kNumPrograms = 10'000;
  const Tally before = tally();
  for (std::uint64_t i = 0; i < kNumPrograms; ++i) {
    const std::vector<std::uint8_t> made = random_program(kSeed, i);
    // Of exact size, so that a sanitizer sees the first byte read past the end.
    const auto program = std::make_unique<std::uint8_t[]>(made.size());
    std::ranges::copy(made, program.get());
    ASSERT_EQ(LLVMFuzzerTestOneInput(program.get(), made.size()), 0) << i;
  }
  EXPECT_GT(tally().accepted - before.accepted, kNumPrograms / 20);
  EXPECT_GT(tally().refused - before.refused, kNumPrograms / 20);
}

}  // namespace
}  // namespace sluice::fuzz
