// config.json's activation keys -> the function of each layer: every kind, lists by layer, what the
// model type decides, and refusals by key and value.
#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "patched_config.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_patch_refused;
using testing::ModelFiles;
using testing::patched;
using testing::PatchRow;
using testing::TempDir;

std::string activation_of(const std::string& patch) {
  const TempDir dir;
  patched(patch).write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  const ActivationFn fn = checkpoint.activation(ModelFiles::kLayer);
  EXPECT_EQ(checkpoint.geometry().activation, fn);
  EXPECT_EQ(checkpoint.load_experts(ModelFiles::kLayer, 0, 2).geometry.activation, fn);
  return to_string(fn);
}

TEST(ActivationConfig, EveryKind) {
  const std::pair<const char*, const char*> rows[] = {
      {R"({})", "swiglu"},
      {R"({"hidden_act": "silu"})", "swiglu"},
      {R"({"hidden_act": "swish", "hidden_activation": "silu"})", "swiglu"},
      {R"({"activation": "swiglu"})", "swiglu"},
      // A limit, as DeepSeek-V4 has it.
      {R"({"model_type": "deepseek_v4", "swiglu_limit": 10.0})", "swiglu:limit=10"},
      {R"({"model_type": "deepseek_v4", "hidden_act": "silu", "swiglu_limit": 0.01})",
       "swiglu:limit=0.01"},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": 0})", "swiglu"},
      {R"({"model_type": "glm_moe_dsa", "swiglu_limit": 7})", "swiglu:limit=7"},
      {R"({"model_type": "hy_v4_vl_text", "swiglu_limit": 10.0})", "swiglu:limit=10"},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": [0, 0, 0, 0, 0, 7.5]})",
       "swiglu:limit=7.5"},
      {R"({"model_type": "deepseek_v4", "swiglu_limits": [9, 9, 9, 9, 9, 0]})", "swiglu"},
      {R"({"model_type": "deepseek_v4", "swiglu_limits": [9, 9, 9, 9, 9, null, 9]})", "swiglu"},
      {R"({"model_type": "x", "text_config": {"swiglu_limit": 0, "hidden_act": "silu"}})",
       "swiglu"},
      {R"({"swiglu_limit": 10.0, "model_type": "deepseek_v4", "text_config":
           {"swiglu_limit": 9.0}})",
       "swiglu:limit=9"},
      // No limit in any layer is no limit in whatever place.
      {R"({"model_type": "step3p5", "swiglu_limits": [0, 0.0, null, 0, 0, 0],
           "swiglu_limits_shared": [0, 0, 0, 0, 0, 16]})",
       "swiglu"},
      {R"({"model_type": "bailing_moe_v3", "expert_swiglu_limit_list": [0, 0, 0, 0, 0, 0],
           "share_expert_swiglu_limit_list": [0, 0, 0, 0, 5, 5]})",
       "swiglu"},
      // OpenAI's form.
      {R"({"model_type": "gpt_oss", "hidden_act": "silu", "swiglu_limit": 7.0})",
       "swiglu-oai:alpha=1.702,limit=7"},
      {R"({"model_type": "minimax_m3", "hidden_act": "swigluoai", "swiglu_alpha": 1.702,
           "swiglu_beta": 1.0, "swiglu_limit": 7.0})",
       "swiglu-oai:alpha=1.702,limit=7"},
      {R"({"hidden_act": "swigluoai", "swiglu_alpha": 2, "swiglu_limit": [1, 1, 1, 1, 1, 4]})",
       "swiglu-oai:alpha=2,limit=4"},
      // SiTU.
      {R"({"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25})",
       "situ:beta=4,linear_beta=25"},
      {R"({"text_config": {"hidden_act": "situ", "activation_situ_beta": 0.1,
           "activation_situ_linear_beta": 1e-3, "swiglu_limit": 0}})",
       "situ:beta=0.1,linear_beta=0.001"},
  };
  for (const auto& [patch, expected] : rows) {
    SCOPED_TRACE(patch);
    EXPECT_EQ(activation_of(patch), expected);
  }
}

TEST(ActivationConfig, WhatIsNotThereIsRefusedByKeyAndValue) {
  const PatchRow rows[] = {
      {R"({"hidden_act": "gelu"})", {"hidden_act = gelu", "silu, swigluoai or situ"}},
      {R"({"hidden_act": "silu", "hidden_activation": "gelu_new"})", {"hidden_activation = gelu"}},
      {R"({"activation_function": "relu2"})", {"activation_function = relu2"}},
      {R"({"act_fn": "SITU"})", {"act_fn = SITU"}},
      // What a limit limits is not the same in every family.
      {R"({"model_type": "mixtral", "swiglu_limit": 10.0})",
       {"swiglu_limit = 10.0", "'mixtral'", "not known"}},
      {R"({"model_type": "step3p5", "swiglu_limits": [0, 0, 0, 0, 0, 7]})",
       {"swiglu_limits = [0,0,0,0,0,7]", "step3p5", "after SiLU"}},
      {R"({"model_type": "step3p7", "swiglu_limit": 7})", {"swiglu_limit = 7", "after SiLU"}},
      {R"({"model_type": "bailing_moe_v3", "expert_swiglu_limit_list": [0, 0, 0, 0, 4, 4]})",
       {"expert_swiglu_limit_list = [0,0,0,0,4,4]", "after SiLU"}},
      {R"({"model_type": "deepseek_v4", "expert_swiglu_limit_list": [4]})",
       {"expert_swiglu_limit_list = [4]", "not supported"}},
      // Parameters without their function, and functions without their parameters.
      {R"({"activation_situ_beta": 4.0})", {"activation_situ_beta = 4.0", "silu"}},
      {R"({"hidden_act": "situ"})", {"situ needs activation_situ_beta"}},
      {R"({"hidden_act": "situ", "activation_situ_beta": 4, "activation_situ_linear_beta": null})",
       {"situ needs activation_situ_linear_beta"}},
      {R"({"hidden_act": "situ", "activation_situ_beta": 4, "activation_situ_linear_beta": 25,
           "swiglu_limit": 10})",
       {"swiglu_limit = 10", "situ"}},
      {R"({"swiglu_alpha": 1.702})", {"swiglu_alpha = 1.702", "silu"}},
      {R"({"model_type": "gpt_oss"})", {"swigluoai needs a swiglu_limit"}},
      {R"({"model_type": "deepseek_v4"})", {"swiglu_limit is not given", "'deepseek_v4'"}},
      {R"({"model_type": "glm5_next", "text_config": {"model_type": "glm5_next_text"}})",
       {"swiglu_limit is not given", "'glm5_next_text'"}},
      {R"({"model_type": "hy_v4", "hidden_act": "silu"})", {"swiglu_limit is not given"}},
      {R"({"model_type": "minimax_m3_vl"})", {"swiglu_limit is not given"}},
      {R"({"model_type": "gemma4_text"})", {"hidden_act is not given", "'gemma4_text'"}},
      {R"({"model_type": "grok-1"})", {"hidden_act is not given", "another function than silu"}},
      {R"({"model_type": "hy_v5", "swiglu_limit": 7.0})", {"'hy_v5' is not known"}},
      {R"({"hidden_act": "swigluoai", "swiglu_limit": 7})", {"swigluoai needs swiglu_alpha"}},
      {R"({"hidden_act": "swigluoai", "swiglu_alpha": 1, "swiglu_limit": [7, 7, 7, 7, 0, 7]})",
       {"swigluoai needs a swiglu_limit above 0 for every layer"}},
      {R"({"hidden_act": "swigluoai", "swiglu_alpha": 1, "swiglu_limit": 7, "swiglu_beta": 0.5})",
       {"swiglu_beta = 0.5", "is not 1"}},
      {R"({"swiglu_brand_new": 0.01})", {"swiglu_brand_new = 0.01", "silu"}},
      {R"({"use_swiglu_step": true})", {"use_swiglu_step = true"}},
      {R"({"activation_brand_new": {"a": 1}})", {"activation_brand_new = {"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

TEST(ActivationConfig, WrongValuesAreNamed) {
  const PatchRow rows[] = {
      {R"({"model_type": "deepseek_v4", "swiglu_limit": -1})", {"swiglu_limit = -1", "float32"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": 1e39})", {"swiglu_limit = 1e+39"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": 1e-60})", {"swiglu_limit = 1e-60"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": [1, 1, 1, 1, -7, 1]})",
       {"swiglu_limit = -7"}},
      {R"({"hidden_act": "situ", "activation_situ_beta": 0, "activation_situ_linear_beta": 1})",
       {"activation_situ_beta = 0 must be above 0"}},
      {R"({"hidden_act": "situ", "activation_situ_beta": -4, "activation_situ_linear_beta": 1})",
       {"activation_situ_beta = -4"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

TEST(ActivationConfig, ValuesOfAnotherKindAreNamed) {
  const PatchRow rows[] = {
      {R"({"hidden_act": 1})", {"hidden_act = 1 is not a name"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": "10"})",
       {"swiglu_limit = \"10\" is not a number"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": true})",
       {"swiglu_limit = true is not a number"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": [1, 1, 1, 1, {}, 1]})",
       {"swiglu_limit = {} is not a number"}},
      {R"({"hidden_act": "situ", "activation_situ_beta": "4", "activation_situ_linear_beta": 1})",
       {"activation_situ_beta = \"4\" is not a number"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

TEST(ActivationConfig, ContradictionsAreNamed) {
  const PatchRow rows[] = {
      {R"({"model_type": "deepseek_v4", "swiglu_limit": [1, 1, 1]})",
       {"swiglu_limit has 3 numbers for 6 layers"}},
      {R"({"model_type": "deepseek_v4", "swiglu_limit": 1, "swiglu_limits": [1, 1, 1, 1, 1, 2]})",
       {"swiglu_limits = [1,1,1,1,1,2] contradicts swiglu_limit"}},
      {R"({"hidden_act": "silu", "hidden_activation": "situ"})",
       {"hidden_activation = situ contradicts hidden_act = silu"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

TEST(ActivationConfig, LayersMayDiffer) {
  const TempDir dir;
  ModelFiles files = patched(
      R"({"model_type": "deepseek_v4", "swiglu_limits": [1, 1, 1, 4, 0, 10],
          "first_k_dense_replace": 3})");
  for (auto& [file_name, file] : files.files) {  // Layer 5 once more, as layer 3.
    const testing::RawFile copy = file;
    for (const auto& [name, tensor] : copy) {
      std::string other = name;
      file[other.replace(name.find(".5."), 3, ".3.")] = tensor;
    }
  }
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  EXPECT_EQ(to_string(checkpoint.geometry().activation), "swiglu:limit=4");
  for (const auto& [layer, expected] : {std::pair(3, "swiglu:limit=4"), {5, "swiglu:limit=10"}}) {
    EXPECT_EQ(to_string(checkpoint.activation(layer)), expected);
    EXPECT_EQ(to_string(checkpoint.load_experts(layer, 0, 1).geometry.activation), expected);
  }
  expect_error(ErrorCode::kInvalidArgument, {"layer 4"}, [&] { (void)checkpoint.activation(4); });
}

// A prediction layer lies behind num_hidden_layers; a list need not reach it.
TEST(ActivationConfig, AListThatDoesNotReachALayerIsNotGuessedAt) {
  const TempDir dir;
  ModelFiles files = patched(
      R"({"model_type": "deepseek_v4", "num_hidden_layers": 3, "swiglu_limits": [1, 1, 1]})");
  files.write(dir.path());
  expect_error(ErrorCode::kUnsupported, {"swiglu_limits has 3 numbers, none for layer 5"},
               [&] { (void)Checkpoint::open(dir.path()); });
}

/// Models whose code has a limit by default: null says that there is none, as 0 does.
TEST(ActivationConfig, NullIsNoLimit) {
  const testing::TempDir dir;
  testing::ModelFiles files = testing::patched(R"({"model_type": "deepseek_v4"})");
  files.config["swiglu_limit"] = nullptr;
  files.write(dir.path());
  EXPECT_EQ(Checkpoint::open(dir.path()).geometry().activation.kind, ActivationKind::kSwiglu);
}

}  // namespace
}  // namespace sluice
