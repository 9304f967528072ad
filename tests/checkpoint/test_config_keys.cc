// Keys of config.json, one by one, on a checkpoint that is otherwise good: each with its verdict.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "patched_config.h"

namespace sluice {
namespace {

using ::testing::AllOf;
using testing::expect_patch_refused;
using ::testing::HasSubstr;
using testing::ModelFiles;
using testing::patched;
using testing::PatchRow;
using testing::TempDir;

std::string warnings_of(const Checkpoint& checkpoint) {
  std::string text;
  for (const CheckpointWarning& w : checkpoint.warnings()) text += w.tensor + ": " + w.text + "\n";
  return text;
}

/// Loads, with all parts among the warnings; with none if there are no parts.
void expect_loads(const PatchRow& row) {
  SCOPED_TRACE(row.patch);
  const TempDir dir;
  patched(row.patch).write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  EXPECT_EQ(checkpoint.geometry().hidden, ModelFiles::kHidden);
  EXPECT_EQ(checkpoint.geometry().intermediate, ModelFiles::kIntermediate);
  EXPECT_EQ(checkpoint.geometry().num_topk, 2);
  EXPECT_EQ(checkpoint.load_experts(ModelFiles::kLayer, 0, 2).experts.size(), 2U);
  const std::string warnings = warnings_of(checkpoint);
  if (row.parts.empty()) {
    EXPECT_EQ(warnings, "");
  }
  for (const std::string& part : row.parts) EXPECT_THAT(warnings, HasSubstr(part));
}

TEST(ConfigKeys, SpellingsThatLoad) {
  const PatchRow rows[] = {
      {R"({})", {}},
      {R"({"num_experts_per_tok": null, "num_experts_per_token": 2})", {}},
      {R"({"num_experts_per_tok": null, "moe_topk": 2})", {}},
      {R"({"num_experts_per_tok": null, "moe_topk": [2, 2, 2, 2, 2, 2]})", {}},
      {R"({"num_experts_per_tok": null, "moe_router_topk": 2})", {}},
      {R"({"num_experts_per_tok": null, "moe_k": 2})", {}},
      {R"({"num_experts_per_tok": null, "moe_top_k": 2})", {}},
      {R"({"num_experts_per_tok": null, "num_selected_experts": 2})", {}},
      {R"({"num_experts_per_tok": null, "experts_per_token": 2})", {}},
      {R"({"num_experts_per_tok": null, "top_k_experts": 2})", {}},
      {R"({"num_experts_per_tok": 2, "experts_per_token": 2})", {}},
      {R"({"n_routed_experts": null, "num_experts": 2})", {}},
      {R"({"n_routed_experts": null, "num_local_experts": 2})", {}},
      {R"({"n_routed_experts": null, "moe_num_experts": 2})", {}},
      {R"({"n_routed_experts": null, "moe_num_experts": [2, 2]})", {}},
      {R"({"moe_intermediate_size": null, "moe_ffn_hidden_size": 128})", {}},
      {R"({"moe_intermediate_size": null, "expert_ffn_hidden_size": 128})", {}},
      {R"({"moe_intermediate_size": null, "intermediate_size": 128})", {}},
      {R"({"intermediate_size": 18432})", {}},
      {R"({"intermediate_size": 200})", {}},
      {R"({"routed_scaling_factor": null, "moe_router_topk_scaling_factor": 2.5})", {}},
      {R"({"top_k": 50, "temperature": 0.6})", {}},
  };
  for (const PatchRow& row : rows) expect_loads(row);
}

TEST(ConfigKeys, NestedLanguageModels) {
  const PatchRow rows[] = {
      {R"({"hidden_size": 1152, "text_config": {"hidden_size": 256}})", {}},
      {R"({"hidden_size": null, "language_config": {"hidden_size": 256}})", {}},
      {R"({"hidden_size": null, "llm_config": {"hidden_size": 256}})", {}},
      {R"({"vision_config": {"hidden_size": 1152, "mlp_bias": true, "hidden_act": "gelu"}})", {}},
      {R"({"text_config": {"brand_new": 1}})", {"config.json", "brand_new"}},
  };
  for (const PatchRow& row : rows) expect_loads(row);
  expect_patch_refused(ErrorCode::kUnsupported,
                       {R"({"text_config": {"moe_brand_new": 1}})", {"moe_brand_new = 1"}});
  expect_patch_refused(ErrorCode::kUnsupported,
                       {R"({"text_config": {"hidden_act": "gelu"}})", {"gelu"}});
}

TEST(ConfigKeys, KeysThatWouldChangeResults) {
  const PatchRow rows[] = {
      {R"({"mlp_bias": true})", {"mlp_bias = true"}},
      {R"({"use_bias": true})", {"use_bias = true"}},
      {R"({"add_bias_linear": true})", {"add_bias_linear = true"}},
      {R"({"moe_use_bias": true})", {"moe_use_bias = true"}},
      {R"({"zero_expert_num": 128})", {"zero_expert_num = 128"}},
      {R"({"zero_expert_type": "identity"})", {"zero_expert_type = \"identity\""}},
      {R"({"block_configs": [{"ffn": {}}]})", {"block_configs = [{"}},
      {R"({"num_experts_per_layer": [2, 4]})", {"num_experts_per_layer = [2,4]"}},
      {R"({"apply_router_weight_on_input": true})", {"apply_router_weight_on_input = true"}},
      // Unknown, and not what one would like to leave out.
      {R"({"expert_dropout_shape": 3})", {"expert_dropout_shape = 3", "not known"}},
      {R"({"moe_brand_new": true})", {"moe_brand_new = true"}},
      {R"({"router_magic": "x"})", {"router_magic = \"x\""}},
      {R"({"ffn_multiplier": 2})", {"ffn_multiplier = 2"}},
      {R"({"mlp_multiplier": 2})", {"mlp_multiplier = 2"}},
      {R"({"gate_clamp": 7.0})", {"gate_clamp = 7.0"}},
      {R"({"latent_dim": 64})", {"latent_dim = 64"}},
      {R"({"up_proj_bias": true})", {"up_proj_bias = true"}},
      {R"({"down_scale": [1, 2]})", {"down_scale = [1,2]"}},
      {R"({"MoEStyle": {"a": 1}})", {"MoEStyle = {"}},
      {R"({"moe_apply_router_weight_on_input": true})", {"moe_apply_router_weight_on_input"}},
      {R"({"up_first": true})", {"up_first = true", "its name sounds"}},
      {R"({"gate_up_order": "interleaved"})", {"gate_up_order"}},
      {R"({"gated_linear_unit": false})", {"gated_linear_unit = false"}},
      {R"({"act_limit": 7.0})", {"act_limit = 7.0"}},
      {R"({"clip_hidden": 3})", {"clip_hidden = 3"}},
      {R"({"weight_transposed": true})", {"weight_transposed = true"}},
      {R"({"interleaved_halves": true})", {"interleaved_halves = true"}},
      // Nothing is wrong with these names.
      {R"({"function": "gelu_new"})", {"function = \"gelu_new\"", "its value sounds"}},
      {R"({"act": "quick_gelu"})", {"act = \"quick_gelu\""}},
      {R"({"phi": "relu2"})", {"phi = \"relu2\""}},
      {R"({"text_config": {"phi": "situ"}})", {"phi = \"situ\""}},
      // Activations that are not there.
      {R"({"swiglu_brand_new": 0.01})", {"swiglu_brand_new = 0.01"}},
      {R"({"activation_brand_new": 4.0})", {"activation_brand_new = 4.0"}},
      {R"({"hidden_act": "gelu_pytorch_tanh"})", {"hidden_act = gelu_pytorch_tanh"}},
      {R"({"hidden_activation": "gelu"})", {"hidden_activation = gelu"}},
      {R"({"mlp_hidden_act": "relu2"})", {"mlp_hidden_act = relu2"}},
      // Sizes.
      {R"({"hidden_size": 2880})", {"hidden_size = 2880", "multiple of 128", "2944"}},
      {R"({"hidden_size": 64})", {"hidden_size = 64", "multiple of 128"}},
      {R"({"moe_intermediate_size": 2880})", {"moe_intermediate_size = 2880", "128"}},
      {R"({"moe_intermediate_size": 2097152})", {"moe_intermediate_size = 2097152", "1048576"}},
      {R"({"moe_intermediate_size": [128, 256]})", {"moe_intermediate_size holds 128 and 256"}},
      {R"({"moe_topk": [2, 1]})", {"moe_topk holds 2 and 1"}},
      {R"({"routed_expert_hidden_size": 200})", {"routed_expert_hidden_size = 200"}},
      // Sizes that no known key gives.
      {R"({"hidden_size": null})", {"no key gives the width", "hidden_size"}},
      {R"({"n_routed_experts": null})", {"routed experts", "n_routed_experts, num_experts"}},
      {R"({"num_experts_per_tok": null})", {"experts per token", "num_experts_per_token"}},
      {R"({"n_routed_experts": null, "thinker_config": {"n_routed_experts": 2}})",
       {"no key gives the number of routed experts", "nor looked into: thinker_config"}},
      {R"({"moe_intermediate_size": null})", {"experts' width", "moe_intermediate_size"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

TEST(ConfigKeys, Contradictions) {
  const PatchRow rows[] = {
      {R"({"num_experts_per_token": 1})", {"num_experts_per_token = 1", "num_experts_per_tok = 2"}},
      {R"({"num_local_experts": 4})", {"num_local_experts = 4", "n_routed_experts = 2"}},
      {R"({"moe_ffn_hidden_size": 256})", {"moe_intermediate_size = 128", "= 256"}},
      {R"({"moe_router_topk_scaling_factor": 1.0})", {"routed_scaling_factor = 2.5", "= 1"}},
      {R"({"num_experts_per_tok": null, "moe_k": 3})", {"moe_k = 3", "2 experts"}},
      {R"({"num_experts_per_tok": 3})", {"num_experts_per_tok = 3", "2 experts"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

/// What config.json itself may not hold, whatever the model.
TEST(ConfigKeys, ValuesThatAreNone) {
  const PatchRow rows[] = {
      {R"({"num_experts_per_tok": []})", {"num_experts_per_tok = []"}},
      {R"({"hidden_size": 0})", {"hidden_size = 0"}},
  };
  for (const PatchRow& row : rows) expect_patch_refused(ErrorCode::kUnsupported, row);
}

/// As Python writes them, which is no JSON; where a number counts they are none.
TEST(ConfigKeys, InfinityAndNaN) {
  const std::pair<std::string, std::vector<std::string>> rows[] = {
      {R"("time_step_limit": [0.0, Infinity], "mtp_loss_factor": NaN, "temperature": -Infinity)",
       {}},
      {R"("swiglu_limit": Infinity)", {"swiglu_limit = inf"}},
      {R"("swiglu_limit": NaN)", {"swiglu_limit = nan"}},
      {R"("n_routed_experts": Infinity)", {"n_routed_experts = Infinity is not a whole number"}},
  };
  for (const auto& [members, parts] : rows) {
    SCOPED_TRACE(members);
    ModelFiles files;
    if (members.find("n_routed") != std::string::npos) files.config.erase("n_routed_experts");
    files.config["x_last"] = 1;
    const TempDir dir;
    files.write(dir.path());
    std::ofstream(dir / "config.json") << [&] {
      std::string text = files.config.dump();
      return text.replace(text.rfind("\"x_last\":1"), 10, members);
    }();
    if (parts.empty()) {
      EXPECT_EQ(Checkpoint::open(dir.path()).load_experts(ModelFiles::kLayer, 0, 2).experts.size(),
                2U);
    } else {
      testing::expect_error(ErrorCode::kUnsupported, parts,
                            [&] { (void)Checkpoint::open(dir.path()); });
    }
  }
}

TEST(ConfigKeys, OffIsAsGoodAsAbsent) {
  for (const char* const key : {"mlp_bias", "use_bias", "zero_expert_num", "zero_expert_type",
                                "block_configs", "moe_use_bias", "swiglu_limit"}) {
    for (const char* const value : {"null", "false", "0", "0.0", "[]"}) {
      const std::string patch = std::string("{\"") + key + "\": " + value + "}";
      expect_loads({patch.c_str(), {}});
    }
  }
  expect_loads({R"({"zero_expert_type": ""})", {}});
}

TEST(ConfigKeys, RoutingAndTheRestOfTheModelSayNothing) {
  const PatchRow rows[] = {
      {R"({"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": true})", {}},
      {R"({"moe_renormalize": true, "n_group": 8, "topk_group": 4, "use_expert_bias": true})", {}},
      {R"({"n_shared_experts": 1, "shared_expert_intermediate_size": 512})", {}},
      {R"({"rope_scaling": {"type": "yarn", "factor": 40}, "attention_bias": true})", {}},
      {R"({"kv_lora_rank": 512, "mla_scale_q_lora": true, "linear_attn_config": {"a": 1}})", {}},
      {R"({"torch_dtype": "bfloat16", "activation_dropout": 0.1, "ep_size": 8})", {}},
  };
  for (const PatchRow& row : rows) expect_loads(row);
}

TEST(ConfigKeys, UnknownKeysAreNamed) {
  const PatchRow rows[] = {
      {R"({"brand_new": 1, "other_one": {"deep": [1]}})",
       {"config.json: keys that are not known", "brand_new, other_one"}},
      {R"({"attention_brand_scale": 2})", {"attention_brand_scale"}},
      {R"({"rope_brand_bias": 2})", {"rope_brand_bias"}},
  };
  for (const PatchRow& row : rows) expect_loads(row);
}

/// What a model's code does without a key for it.
TEST(ConfigKeys, RouterWeightsOnTheInputs) {
  expect_loads({R"({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}})",
                {"config.json: model_type: models of type 'llama4_text' multiply the experts' "
                 "inputs by the router's weights"}});
}

TEST(ConfigKeys, LatentWidth) {
  const PatchRow rows[] = {
      {R"({"hidden_size": 512, "routed_expert_hidden_size": 256})",
       {"config.json: routed_expert_hidden_size: latent: 256 of 512"}},
      {R"({"hidden_size": 2880, "moe_latent_size": 256})", {"moe_latent_size: latent: 256 of"}},
  };
  for (const PatchRow& row : rows) expect_loads(row);
}

TEST(ConfigKeys, PredictionLayersThatAreNotThere) {
  expect_loads({R"({"num_nextn_predict_layers": 1})",
                {"num_nextn_predict_layers", "1 prediction layers are announced", "no layer 6"}});
  expect_loads({R"({"num_nextn_predict_layers": 0})", {}});
  expect_loads({R"({"num_nextn_predict_layers": 1, "num_hidden_layers": 5})", {}});
}

/// A config with more layers of experts than the files have.
TEST(ConfigKeys, LayersThatAreNotThere) {
  const PatchRow rows[] = {
      {R"({"num_hidden_layers": 8})",
       {"config.json: of its 3 layers with routed experts, the files have 1; missing: 6, 7"}},
      {R"({"num_hidden_layers": 12})", {"the files have 1; missing: 6, 7, 8 and 3 more"}},
      {R"({"first_k_dense_replace": 0})", {"of its 6 layers", "missing: 0, 1, 2 and 2 more"}},
      {R"({"num_hidden_layers": 8, "mlp_only_layers": [6, 7]})", {}},
      {R"({"num_hidden_layers": 8, "moe_layer_freq": [0, 0, 0, 0, 0, 1, 0, 0]})", {}},
      {R"({"num_hidden_layers": 7, "mlp_layer_types":
           ["dense", "dense", "dense", "dense", "dense", "sparse", "dense"]})",
       {}},
      {R"({"num_hidden_layers": 7, "mlp_layer_types":
           ["dense", "dense", "dense", "dense", "dense", "sparse", "sparse"]})",
       {"of its 2 layers", "missing: 6"}},
      // Which layers these mean is not read.
      {R"({"num_hidden_layers": 8, "moe_layers": [5]})", {}},
      {R"({"num_hidden_layers": 8, "hybrid_override_pattern": "M-M-MEMM"})", {}},
      {R"({"num_hidden_layers": 8, "expert_layer_period": 2, "expert_layer_offset": 1})", {}},
  };
  for (const PatchRow& row : rows) expect_loads(row);
}

/// Layers with experts where the config has none.
TEST(ConfigKeys, LayersThatShouldBeDense) {
  struct Layers {
    const char* patch;
    const char* part;  // Empty: no warning.
  };
  const Layers rows[] = {
      {R"({"first_k_dense_replace": 6})", "though first_k_dense_replace = 6"},
      {R"({"mlp_only_layers": [1, 5]})", "though mlp_only_layers holds 5"},
      {R"({"mlp_only_layers": [1, 4]})", ""},
      {R"({"moe_layer_freq": [0, 1, 1, 1, 1, 0]})", "though moe_layer_freq [5] = 0"},
      {R"({"moe_layer_freq": [0, 1, 1, 1, 1, 1]})", ""},
      {R"({"moe_layer_freq": 2})", "though moe_layer_freq = 2"},
      {R"({"moe_layer_freq": 5})", ""},
      {R"({"moe_layer_freq": 1})", ""},
      {R"({"decoder_sparse_step": 2})", ""},
      {R"({"decoder_sparse_step": 4})", "though decoder_sparse_step = 4"},
      {R"({"mlp_layer_types": ["dense", "dense", "dense", "dense", "dense", "dense"]})",
       "though mlp_layer_types [5] = dense"},
      {R"({"interleave_moe_layer_step": 4})", "though interleave_moe_layer_step = 4"},
      {R"({"num_hidden_layers": 5})", "layer 5 is past the model's 5 layers"},
  };
  for (const Layers& row : rows) {
    SCOPED_TRACE(row.patch);
    const TempDir dir;
    patched(row.patch).write(dir.path());
    std::string text;
    for (const auto& w : Checkpoint::open(dir.path()).warnings(ModelFiles::kLayer)) text += w.text;
    if (*row.part) {
      EXPECT_THAT(text, HasSubstr(row.part));
    } else {
      EXPECT_THAT(text, Not(AllOf(HasSubstr("layer 5"), HasSubstr("though"))));
    }
  }
}

}  // namespace
}  // namespace sluice
