// Keys of quantization_config that no reader takes: those of published files pass in silence, those
// that may change what weights mean do not pass, and any other is named.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "expect_error.h"
#include "format_fixture.h"
#include "model_files.h"
#include "temp_dir.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

/// A good checkpoint of `format`, `patch` merged into its quantization_config.
struct Patched {
  TempDir dir;
  Patched(const std::string& format, const std::string& patch) {
    const bool is_mxfp4 = format == "gpt-oss" || format == "deepseek-fp4";
    SyntheticCheckpoint spec = is_mxfp4 ? spec_of(format, 32, DType::kFloat8E8M0) : spec_of(format);
    spec.geometry.has_bias = format == "gpt-oss";
    write_synthetic_checkpoint(spec, dir / "good");
    RawCheckpoint raw(dir / "good");
    raw.config["quantization_config"].merge_patch(Json::parse(patch));
    raw.write(dir / "patched");
  }
  [[nodiscard]] Checkpoint open() const { return Checkpoint::open(dir / "patched"); }
};

std::string in_group(const std::string& patch) {
  return R"({"config_groups": {"group_0": )" + patch + "}}";
}

std::string in_weights(const std::string& patch) {
  return in_group(R"({"weights": )" + patch + "}");
}

TEST(QuantizationKeys, OfPublishedFilesPassInSilence) {
  const std::pair<const char*, std::string> rows[] = {
      {"w4afp8", R"({"linear_activation_scheme": "dynamic", "moe_activation_scheme": "static",
                     "modules_to_not_convert": ["indexer"], "weight_block_size": [128, 128],
                     "is_checkpoint_w4afp8_serialized": true, "fmt": "e4m3", "bits": 4})"},
      {"w4afp8", R"({"zero_point": false, "sym": true, "desc_act": false, "rotation": null,
                     "transform": {}, "hadamard": "none", "version": "1"})"},
      {"angelslim", R"({"kv_cache_quant_method": "fp8", "ignored_layers": ["lm_head"],
                        "ignored_quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
                        "kv_cache_quant_method": "fp8", "weight_block_size": [128, 128]}})"},
      {"compressed-tensors", R"({"quantization_status": "compressed", "version": "0.13.0",
                                 "global_compression_ratio": null, "kv_cache_scheme": null,
                                 "sparsity_config": {}, "transform_config": {},
                                 "moe_sparsity_config": null})"},
      {"compressed-tensors", R"({"kv_cache_scheme": {"num_bits": 8, "type": "float",
                                 "symmetric": false, "rotation": true}})"},
      {"compressed-tensors",
       in_weights(R"({"observer": "mse", "observer_kwargs": {"maxshrink": 0.2},
                      "block_structure": null, "zp_dtype": "torch.int8", "scale_dtype": null})")},
      {"compressed-tensors",
       in_group(R"({"output_activations": null, "input_activations": {"observer": null,
                    "observer_kwargs": {}, "block_structure": null, "zp_dtype": null}})")},
      {"deepseek-fp4", R"({"scale_fmt": "ue8m0", "dequantize": false, "bits": 8,
                           "modules_to_convert": null})"},
      {"gpt-oss", R"({"dequantize": false})"},
  };
  for (const auto& [format, patch] : rows) {
    SCOPED_TRACE(patch);
    const Patched patched(format, patch);
    EXPECT_THAT(patched.open().warnings(), ::testing::IsEmpty());
  }
}

TEST(QuantizationKeys, ThatChangeWhatWeightsMeanAreRefusedByName) {
  const std::vector<std::pair<std::string, std::string>> rows = {
      {R"({"zero_point": true})", "zero_point = true; only symmetric"},
      {R"({"symmetric": false})", "symmetric = false; only symmetric"},
      {R"({"is_asym": true})", "is_asym = true"},
      {R"({"desc_act": true})", "desc_act = true"},
      {R"({"rotation": "hadamard"})", "rotation = \"hadamard\""},
      {R"({"hadamard": true})", "hadamard = true"},
      {R"({"rotate": 1})", "rotate = 1"},
      {R"({"online_hadamard": {"dim": 128}})", "online_hadamard = {"},
      {R"({"smoothquant": true})", "smoothquant = true"},
      {R"({"transform": true})", "transform = true"},
      {R"({"expert_bits": 3})", "expert_bits = 3"},
      {R"({"weight_scale_encoding": "csf"})", "weight_scale_encoding = \"csf\""},
      {R"({"transform_config": {"config_groups": {}}})", "transform_config = {...}"},
      {R"({"sparsity_config": {"format": "sparse"}})", "sparsity_config = {...}"},
  };
  for (const char* const format : {"w4afp8", "angelslim", "compressed-tensors", "gpt-oss"}) {
    for (const auto& [patch, part] : rows) {
      SCOPED_TRACE(std::string(format) + " " + patch);
      const Patched patched(format, patch);
      expect_error(ErrorCode::kUnsupported, {"config.json: quantization_config." + part},
                   [&] { (void)patched.open(); });
    }
  }
}

TEST(QuantizationKeys, BitsAreThoseOfTheCodes) {
  for (const char* const format : {"w4afp8", "angelslim", "compressed-tensors", "gpt-oss"}) {
    const Patched patched(format, R"({"bits": 8})");
    expect_error(ErrorCode::kUnsupported, {"quantization_config.bits = 8", "4-bit codes"},
                 [&] { (void)patched.open(); });
  }
}

TEST(QuantizationKeys, OfTheExpertsGroupAreRefusedToo) {
  const std::pair<std::string, std::string> rows[] = {
      {in_weights(R"({"zero_point": true})"), "group_0.weights.zero_point = true"},
      {in_weights(R"({"rotation": "hadamard"})"), "group_0.weights.rotation = \"hadamard\""},
      {in_group(R"({"output_activations": {"num_bits": 8}})"), "group_0.output_activations = {"},
  };
  for (const auto& [patch, part] : rows) {
    SCOPED_TRACE(patch);
    const Patched patched("compressed-tensors", patch);
    expect_error(ErrorCode::kUnsupported, {"quantization_config.config_groups." + part},
                 [&] { (void)patched.open(); });
  }
}

TEST(QuantizationKeys, OfHfQuantConfigAreRefusedToo) {
  ModelFiles files;
  files.config.erase("quantization_config");
  const TempDir dir;
  for (const char* const patch : {R"({"has_zero_point": true})", R"({"rotation": "hadamard"})"}) {
    Json quantization = {{"quant_algo", "MIXED_PRECISION"}, {"kv_cache_quant_algo", nullptr}};
    quantization.merge_patch(Json::parse(patch));
    files.hf_quant_config = {{"quantization", quantization}};
    files.write(dir.path());
    expect_error(ErrorCode::kUnsupported, {"hf_quant_config.json: quantization."},
                 [&] { (void)Checkpoint::open(dir.path()); });
  }
}

/// hf_quant_config.json as mixed precision has it: modules by name.
TEST(QuantizationKeys, OfQuantizedLayersCountWhereTheyNameExperts) {
  constexpr const char* kExpert = "model.layers.3.mlp.experts.0.up_proj";
  const std::tuple<const char*, const char*, const char*> rows[] = {
      {kExpert, R"({"quant_algo": "W4A8_AWQ", "group_size": 128, "has_zero_point": false})", ""},
      {"*.mlp.experts*", R"({"quant_algo": "W4A8_AWQ"})", ""},
      {"model.layers.3.self_attn.o_proj", R"({"quant_algo": "NVFP4", "rotation": "x"})", ""},
      {"model.layers.3.mlp.shared_experts.up_proj", R"({"quant_algo": "FP8"})", ""},
      {kExpert, R"({"quant_algo": "W4A16_AWQ"})", ".up_proj.quant_algo = W4A16_AWQ"},
      {"*.mlp.experts*", R"({"quant_algo": "NVFP4"})", "*.mlp.experts*.quant_algo = NVFP4"},
      {kExpert, R"({"quant_algo": "W4A8_AWQ", "group_size": 64})", ".up_proj.group_size = 64"},
      {kExpert, R"({"has_zero_point": true})", ".up_proj.has_zero_point = true"},
      {kExpert, R"({"rotation": "hadamard"})", ".up_proj.rotation = \"hadamard\""},
  };
  ModelFiles files;
  files.config.erase("quantization_config");
  const TempDir dir;
  for (const auto& [module, entry, refusal] : rows) {
    SCOPED_TRACE(fmt::format("{}: {}", module, entry));
    const Json layers = {{module, Json::parse(entry)}};
    files.hf_quant_config = {
        {"quantization", {{"quant_algo", "MIXED_PRECISION"}, {"quantized_layers", layers}}}};
    files.write(dir.path());
    if (*refusal == '\0') {
      EXPECT_TRUE(Checkpoint::open(dir.path()).warnings().empty());
    } else {
      expect_error(ErrorCode::kUnsupported, {"hf_quant_config.json: quantization.", refusal},
                   [&] { (void)Checkpoint::open(dir.path()); });
    }
  }
  const Json layers = {{kExpert, {{"quant_algo", "W4A8_AWQ"}, {"some_new", 1}}}};
  files.hf_quant_config["quantization"]["quantized_layers"] = layers;
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  ASSERT_EQ(checkpoint.warnings().size(), 1U);
  EXPECT_THAT(checkpoint.warnings()[0].text, HasSubstr(".up_proj.some_new"));
}

TEST(QuantizationKeys, ThatNobodyKnowsAreNamedInOneWarning) {
  for (const char* const format : {"w4afp8", "compressed-tensors", "gpt-oss"}) {
    const Patched patched(format, R"({"some_new": 1, "another": {"x": true}})");
    const Checkpoint checkpoint = patched.open();
    ASSERT_EQ(checkpoint.warnings().size(), 1U);
    EXPECT_EQ(checkpoint.warnings()[0].kind, "unknown-keys");
    EXPECT_EQ(checkpoint.warnings()[0].tensor, "config.json: quantization_config");
    EXPECT_THAT(checkpoint.warnings()[0].text, HasSubstr("quantization_config.some_new, "));
    EXPECT_THAT(checkpoint.warnings()[0].text, HasSubstr("quantization_config.another"));
  }
  const Patched patched("compressed-tensors", in_weights(R"({"some_new": 1})"));
  const Checkpoint checkpoint = patched.open();
  ASSERT_EQ(checkpoint.warnings().size(), 1U);
  EXPECT_THAT(checkpoint.warnings()[0].text, HasSubstr("config_groups.group_0.weights.some_new"));
}

/// What one of two descriptions says counts.
TEST(QuantizationKeys, OfBothDescriptionsCount) {
  ModelFiles files;
  files.config["text_config"]["quantization_config"] = files.config["quantization_config"];
  files.config["quantization_config"]["zero_point"] = true;
  const TempDir dir;
  files.write(dir.path());
  expect_error(ErrorCode::kUnsupported, {"quantization_config.zero_point = true"},
               [&] { (void)Checkpoint::open(dir.path()); });
}

TEST(QuantizationKeys, TargetsThatDoNotCoverTheExpertsAreNamed) {
  const std::pair<const char*, bool> rows[] = {
      {R"(["Linear"])", false},
      {R"([])", false},
      {R"(["re:.*mlp[.]experts[.].*"])", false},
      {R"(["re:.*self_attn.*", "Linear"])", false},
      {R"(["re:(?P<name>.*)experts"])", false},  // Python's own syntax: nothing can be said.
      {R"(["re:.*self_attn.*"])", true},
      {R"(["LinearAttention"])", true},
      {R"(["re:.*shared_experts.*", "lm_head"])", true},
  };
  for (const auto& [targets, is_warned] : rows) {
    SCOPED_TRACE(targets);
    const Patched patched("compressed-tensors",
                          in_group(R"({"targets": )" + std::string(targets) + "}"));
    const Checkpoint checkpoint = patched.open();
    EXPECT_EQ(checkpoint.load_experts(kLayer, 0, 3).experts.size(), 3U);
    ASSERT_EQ(checkpoint.warnings().size(), is_warned ? 1U : 0U);
    if (!is_warned) continue;
    EXPECT_EQ(checkpoint.warnings()[0].kind, "untargeted-experts");
    EXPECT_THAT(checkpoint.warnings()[0].text, HasSubstr("experts.0.gate_proj"));
  }
}

}  // namespace
}  // namespace sluice::testing
