// Runs the fuzz target's entry point on random programs of edits, and shows that the second reading
// that it relies on sees a change. The entry point aborts on a broken promise, so returning is
// passing.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "config_meaning.h"

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

/// Edits of sound files, most of them few, so that both verdicts are common.
TEST(FuzzCheckpointConfig, RandomPrograms) {
  constexpr int kNumPrograms = 10'000;
  std::mt19937_64 random(20261129);
  const Tally before = tally();
  for (int i = 0; i < kNumPrograms; ++i) {
    const std::size_t size = 3 + random() % 48;
    // Of exact size, so that a sanitizer sees the first byte read past the end.
    const auto program = std::make_unique<std::uint8_t[]>(size);
    for (std::size_t at = 0; at < size; ++at) program[at] = static_cast<std::uint8_t>(random());
    ASSERT_EQ(LLVMFuzzerTestOneInput(program.get(), size), 0);
  }
  EXPECT_GT(tally().accepted - before.accepted, kNumPrograms / 20);
  EXPECT_GT(tally().refused - before.refused, kNumPrograms / 20);
}

}  // namespace
}  // namespace sluice::fuzz
