// What a checkpoint says about its own numbers: containers that are not read, groups that are told
// apart by their targets, two descriptions of one checkpoint, lists of exclusions.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "checkpoint/formats/module_match.h"
#include "expect_error.h"
#include "format_fixture.h"
#include "model_files.h"
#include "temp_dir.h"

namespace sluice::testing {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::ordered_json;

struct Row {
  const char* quantization;
  std::vector<std::string> parts;
};

TEST(Containers, AreRefusedByName) {
  const Row rows[] = {
      {R"({"quant_method": "gptq", "bits": 4, "group_size": 128, "pack_dtype": "int32"})",
       {"quant_method = 'gptq'", "compressed-tensors"}},
      {R"({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq",
           "activation": {"version": 1, "mode": "w4afp8"}})",
       {"quant_method = 'gptq'"}},
      {R"({"quant_method": "gptq_w4afp8"})", {"quant_method = 'gptq_w4afp8'"}},
      {R"({"quant_method": "awq", "bits": 4, "zero_point": true})", {"'awq'", "zero points"}},
      {R"({"quant_method": "auto-round"})", {"'auto-round'"}},
      {R"({"quant_method": "bitsandbytes", "load_in_4bit": true})", {"'bitsandbytes'", "convert"}},
      {R"({"quant_method": "fbgemm_fp8"})", {"'fbgemm_fp8'"}},
      {R"({"quant_method": "quark"})", {"'quark'"}},
      {R"({"quant_method": "hqq"})", {"'hqq'"}},
      {R"({"quant_method": "mxfp4"})", {"'mxfp4'", "MXFP4"}},
      {R"({"quant_method": "modelopt", "quant_algo": "NVFP4"})", {"'NVFP4'", "E2M1"}},
      {R"({"quant_method": "modelopt_fp4"})", {"'modelopt_fp4'", "NVFP4"}},
      {R"({"quant_method": "w8a8_int8"})", {"'w8a8_int8'", "INT4"}},
      {R"({"quant_method": "brand_new"})", {"'brand_new'", "supported are"}},
      {R"({"quant_method": "fp8", "weight_block_size": [32, 32]})", {"[32, 32]", "[128, 128]"}},
      {R"({"quant_method": "w4afp8", "weight_block_size": "128"})",
       {"weight_block_size = \"128\" is not rows and columns of a block"}},
      {R"({"quant_method": "w4afp8", "weight_block_size": 128})",
       {"weight_block_size = 128 is not rows and columns of a block"}},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.quantization);
    ModelFiles files;
    files.config["quantization_config"] = Json::parse(row.quantization);
    const TempDir dir;
    files.write(dir.path());
    expect_error(ErrorCode::kUnsupported, row.parts, [&] { (void)Checkpoint::open(dir.path()); });
  }
}

TEST(Containers, AlgorithmsOfHfQuantConfigAreRefusedByName) {
  for (const char* const algo : {"NVFP4", "MXFP8", "W4A16_AWQ", "W4A8_NVFP4_FP8", "BRAND_NEW"}) {
    ModelFiles files;
    files.config.erase("quantization_config");
    files.hf_quant_config = {{"quantization", {{"quant_algo", algo}}}};
    const TempDir dir;
    files.write(dir.path());
    expect_error(ErrorCode::kUnsupported,
                 {"hf_quant_config.json", std::string("quant_algo = '") + algo + "'"},
                 [&] { (void)Checkpoint::open(dir.path()); });
  }
}

TEST(Containers, UndeclaredW4afp8IsHintedAt) {
  ModelFiles files;
  files.config.erase("quantization_config");
  const TempDir dir;
  files.write(dir.path());
  expect_error(ErrorCode::kUnsupported,
               {"no quantization_config", "is I8", "looks like w4afp8", "quant_method"},
               [&] { (void)Checkpoint::open(dir.path()); });
}

/// A good compressed-tensors checkpoint, its quantization_config changed by merging `patch`.
struct Patched {
  TempDir dir;
  explicit Patched(const char* patch) {
    write_synthetic_checkpoint(spec_of("compressed-tensors"), dir / "good");
    RawCheckpoint raw(dir / "good");
    raw.config["quantization_config"].merge_patch(Json::parse(patch));
    raw.write(dir / "patched");
  }
  [[nodiscard]] Checkpoint open() const { return Checkpoint::open(dir / "patched"); }
};

constexpr const char* kOther = R"("group_1": {"targets": [TARGETS], "format": "float-quantized",
  "weights": {"num_bits": 8, "type": "float", "symmetric": true, "strategy": "block"}})";

std::string with_targets(const std::string& first, const std::string& second) {
  std::string other = kOther;
  other.replace(other.find("TARGETS"), 7, second);
  return R"({"format": "mixed-precision", "config_groups": {"group_0":
    {"format": "pack-quantized", "targets": [)" +
         first + "]}, " + other + "}}";
}

TEST(Groups, TheOneThatTargetsTheExpertsCounts) {
  const std::pair<const char*, const char*> rows[] = {
      {R"("re:.*experts.*")", R"("re:.*self_attn.*")"},
      {R"("re:.*experts.*")", R"("Linear")"},
      {R"("Linear")", R"("re:.*self_attn.*")"},
      {R"("model.layers.3.mlp.experts.0.gate_proj")", R"("re:.*")"},
      {R"("re:.*mlp[.]experts[.]\\d+[.](gate|up|down)_proj$")", R"("re:.*shared_experts.*")"},
      {R"("re:model.layers.3.*")", R"("re:layers.*")"},  // Patterns match from the beginning.
      {R"("re:.*experts.*")", R"("LinearAttention", "Conv1d")"},
  };
  for (const auto& [first, second] : rows) {
    SCOPED_TRACE(first);
    const Patched patched(with_targets(first, second).c_str());
    EXPECT_EQ(patched.open().load_experts(kLayer, 0, 3).experts.size(), 3U);
  }
}

TEST(Groups, ThatCannotBeToldApartOrAreNotInt4AreRefused) {
  const std::tuple<const char*, const char*, std::vector<std::string>> rows[] = {
      {R"("Linear")", R"("Linear")", {"'group_0' and 'group_1'", "both target"}},
      {R"("re:.*experts.*")", R"("re:.*mlp.*")", {"both target", "experts.0.gate_proj"}},
      {R"("re:.*self_attn.*")", R"("re:.*lm_head")", {"none targets", "experts.0.gate_proj"}},
      {R"("Linear")", R"("re:.*experts.*")", {"group_1.format = 'float-quantized'", "FP8"}},
      {R"("re:(")", R"("Linear")", {"targets = 're:('", "pattern"}},
  };
  for (const auto& [first, second, parts] : rows) {
    SCOPED_TRACE(first);
    const Patched patched(with_targets(first, second).c_str());
    expect_error(ErrorCode::kUnsupported, parts, [&] { (void)patched.open(); });
  }
}

TEST(Groups, ContainersOfCompressedTensorsAreRefusedByName) {
  for (const char* const format :
       {"int-quantized", "float-quantized", "nvfp4-pack-quantized", "marlin-24", "brand-new"}) {
    SCOPED_TRACE(format);
    const std::string patch = std::string(R"({"format": ")") + format +
                              R"(", "config_groups": {"group_0": {"format": null}}})";
    const Patched patched(patch.c_str());
    expect_error(ErrorCode::kUnsupported,
                 {std::string("format = '") + format + "'", "'pack-quantized'"},
                 [&] { (void)patched.open(); });
  }
}

TEST(Exclusions, NeverSwitchOffQuantizedExperts) {
  struct Entry {
    const char* patch;
    bool is_warned;
  };
  const Entry rows[] = {
      {R"({"ignore": ["lm_head", "model.layers.0.mlp.experts.0"]})", false},
      {R"({"ignore": ["model.layers.3.mlp.shared_experts.down_proj"]})", false},
      {R"({"ignore": ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp[.]gate$"]})", false},
      {R"({"ignore": ["model.layers.3.mlp.experts.0"]})", true},
      {R"({"ignore": ["re:.*mlp[.]experts.*"]})", true},
      {R"({"modules_to_not_convert": ["experts"]})", true},
      {R"({"modules_to_not_convert": ["indexer", "gate"]})", false},
      {R"({"ignored_layers": ["model.layers.3.mlp"]})", true},
      {R"({"exclude_modules": ["*.experts.*"]})", true},
      {R"({"ignore": "lm_head"})", false},
  };
  for (const Entry& row : rows) {
    SCOPED_TRACE(row.patch);
    const Patched patched(row.patch);
    const Checkpoint checkpoint = patched.open();
    EXPECT_EQ(checkpoint.load_experts(kLayer, 0, 3).experts.size(), 3U);
    ASSERT_EQ(checkpoint.warnings().size(), row.is_warned ? 1U : 0U);
    if (!row.is_warned) continue;
    EXPECT_THAT(checkpoint.warnings()[0].text, HasSubstr("quantized all the"));
  }
}

TEST(Exclusions, HostilePatternsEnd) {
  const std::string many = "re:" + std::string(600, '(');
  EXPECT_FALSE(is_excluded(many, "model.layers.3.mlp.experts.0.gate_proj"));
  EXPECT_FALSE(is_excluded("re:(a*)*(a*)*(a*)*b", std::string(64, 'a')));
  EXPECT_FALSE(is_excluded("re:((a{100}){100}){100}", "a"));
  EXPECT_FALSE(is_excluded("***", "a.b"));
  EXPECT_FALSE(is_excluded("", "a.b"));
}

TEST(TwoDescriptions, MayAgreeAndMustNotContradict) {
  ModelFiles same;
  same.config["text_config"]["quantization_config"] = same.config["quantization_config"];
  const TempDir dir;
  same.write(dir / "same");
  EXPECT_EQ(Checkpoint::open(dir / "same").format(), "w4afp8");

  ModelFiles other = same;
  other.config["text_config"]["quantization_config"]["quant_method"] = "fp8";
  other.write(dir / "other");
  expect_error(ErrorCode::kUnsupported, {"quantization_config.quant_method", "w4afp8", "fp8"},
               [&] { (void)Checkpoint::open(dir / "other"); });

  ModelFiles group;
  group.config["quantization_config"]["group_size"] = 128;
  group.hf_quant_config = {{"quantization", {{"group_size", 32}}}};
  group.write(dir / "group");
  expect_error(ErrorCode::kUnsupported, {"group_size = 128", "hf_quant_config.json", "32"},
               [&] { (void)Checkpoint::open(dir / "group"); });
  group.hf_quant_config["quantization"] = {{"group_size", 128}, {"quant_algo", "MIXED_PRECISION"}};
  group.write(dir / "agree");
  EXPECT_EQ(Checkpoint::open(dir / "agree").format(), "w4afp8");

  ModelFiles algo;
  algo.hf_quant_config = {{"quantization", {{"quant_algo", "NVFP4"}}}};
  algo.write(dir / "algo");
  expect_error(ErrorCode::kUnsupported, {"quant_method = 'w4afp8'", "quant_algo = 'NVFP4'"},
               [&] { (void)Checkpoint::open(dir / "algo"); });
}

/// AngelSlim writes no such file, but one that is there is not passed over.
TEST(TwoDescriptions, OfAngelslimMustNotContradict) {
  const std::pair<Json, std::vector<std::string>> cases[] = {
      {{{"quant_algo", "NVFP4"}}, {"quant_method = 'w4a8_awq'", "quant_algo = 'NVFP4'"}},
      {{{"quant_algo", "W4A8_AWQ"}, {"group_size", 32}}, {"quantization.group_size = 32"}},
      {{{"quant_algo", "W4A8_AWQ"}, {"has_zero_point", true}}, {"has_zero_point = true"}},
  };
  for (const auto& [quantization, parts] : cases) {
    ModelFiles files;
    files.config["quantization_config"] = {{"quant_method", "w4a8_awq"}};
    files.hf_quant_config = {{"quantization", quantization}};
    const TempDir dir;
    files.write(dir.path());
    expect_error(ErrorCode::kUnsupported, parts, [&] { (void)Checkpoint::open(dir.path()); });
  }
}

}  // namespace
}  // namespace sluice::testing
