// Whole configs, shaped after those of the families that are served: none is refused by mistake,
// and no key of theirs is unknown. Written for this test; values that do not matter are shortened.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "checkpoint/model_config.h"
#include "expect_error.h"
#include "model_files.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::TempDir;

struct Family {
  const char* name;
  int experts, topk, hidden, intermediate;
  const char* config;
  const char* note = "";  // Part of the only warning; empty: none.
};

constexpr Family kFamilies[] = {
    {"DeepSeek-V3", 256, 8, 7168, 2048, R"({
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0,
  "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
  "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
  "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
  "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128]},
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 129280, "pretraining_tp": 1, "aux_loss_alpha": 0.001,
  "seq_aux": true})"},
    {"DeepSeek-V3.2", 256, 8, 7168, 2048, R"({
  "model_type": "deepseek_v32", "hidden_size": 7168, "moe_intermediate_size": 2048,
  "intermediate_size": 18432, "n_routed_experts": 256, "num_experts_per_tok": 8,
  "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "hidden_act": "silu",
  "num_hidden_layers": 61, "first_k_dense_replace": 3, "scale_fmt": "ue8m0",
  "routed_scaling_factor": 2.5})"},
    {"DeepSeek-V4", 256, 6, 4096, 2048, R"({
  "model_type": "deepseek_v4", "swiglu_limit": 10.0, "hidden_size": 4096, "moe_intermediate_size": 2048,
  "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "hidden_act": "silu",
  "num_hidden_layers": 43, "num_hash_layers": 3, "scoring_func": "sqrtsoftplus",
  "topk_method": "noaux_tc", "norm_topk_prob": true, "routed_scaling_factor": 1.5,
  "expert_dtype": "fp4", "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20, "o_groups": 8,
  "o_lora_rank": 1024, "compress_ratios": [0, 0, 4, 128], "compress_rope_theta": 160000,
  "sliding_window": 128, "index_topk": 512, "num_nextn_predict_layers": 1})"},
    {"Kimi-K2", 384, 8, 7168, 2048, R"({
  "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "hidden_size": 7168,
  "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384,
  "num_experts_per_tok": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
  "num_hidden_layers": 61, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827,
  "hidden_act": "silu", "aux_loss_alpha": 0.001, "seq_aux": true, "topk_group": 1})"},
    {"Kimi-K2.5", 384, 8, 7168, 2048, R"({
  "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
  "media_placeholder_token_id": 163605, "pad_token_id": 163839, "ignore_index": -100,
  "use_unified_vision_chunk": true, "video_placeholder": "<|video|>", "tie_word_embeddings": false,
  "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "mm_projector_type": "x",
    "projector_hidden_act": "gelu", "activation_func": "gelu"},
  "text_config": {"model_type": "kimi_k2", "hidden_size": 7168, "moe_intermediate_size": 2048,
    "n_routed_experts": 384, "num_experts_per_tok": 8, "hidden_act": "silu", "top_k": 50,
    "chunk_size_feed_forward": 0, "num_hidden_layers": 61, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827, "quantization_config": {"quant_method": "compressed-tensors"}}
  })"},
    {"Kimi-Linear", 256, 8, 2304, 1024, R"({
  "model_type": "kimi_linear", "hidden_size": 2304, "intermediate_size": 9216, "hidden_act": "silu",
  "moe_intermediate_size": 1024, "num_experts": 256, "num_experts_per_token": 8,
  "num_shared_experts": 1, "moe_renormalize": true, "moe_router_activation_func": "sigmoid",
  "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": true, "first_k_dense_replace": 1,
  "moe_layer_freq": 1, "routed_scaling_factor": 2.446, "num_hidden_layers": 27, "head_dim": 72,
  "linear_attn_config": {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3], "num_heads": 32},
  "mla_use_nope": true, "num_nextn_predict_layers": 0, "rope_theta": 10000.0})"},
    {"Kimi-K3 without its activation", 896, 16, 3584, 3072, R"({
  "model_type": "kimi_k3", "vision_config": {"hidden_size": 1152},
  "text_config": {"model_type": "kimi_linear", "hidden_size": 7168, "intermediate_size": 33792,
    "routed_expert_hidden_size": 3584, "latent_moe_use_norm": true, "moe_intermediate_size": 3072,
    "num_experts": 896, "num_experts_per_token": 16, "num_shared_experts": 2,
    "moe_renormalize": true, "first_k_dense_replace": 1, "num_hidden_layers": 93,
    "num_expert_group": 1, "linear_attn_config": {"kda_layers": [1, 2, 3]}}})",
     "latent: 3584 of 7168"},
    {"GLM-4.5", 160, 8, 5120, 1536, R"({
  "model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "hidden_act": "silu",
  "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_experts_per_tok": 8,
  "n_shared_experts": 1, "first_k_dense_replace": 3, "num_hidden_layers": 92, "use_qk_norm": true,
  "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5})"},
    {"GLM-5", 256, 8, 6144, 2048, R"({
  "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "hidden_size": 6144,
  "intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 256,
  "num_experts_per_tok": 8, "num_hidden_layers": 78, "first_k_dense_replace": 3,
  "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "index_topk": 2048, "index_head_dim": 128,
  "indexer_rope_interleave": true, "rope_parameters": {"rope_theta": 1000000},
  "mlp_layer_types": ["dense", "dense", "dense", "sparse"], "dtype": "bfloat16",
  "quantization_config": {"quant_method": "w4afp8", "group_size": 128,
    "modules_to_not_convert": ["lm_head", "indexer"]}})"},
    {"Qwen3-235B", 128, 8, 4096, 1536, R"({
  "model_type": "qwen3_moe", "hidden_size": 4096, "intermediate_size": 12288, "hidden_act": "silu",
  "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 1536,
  "norm_topk_prob": true, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
  "num_hidden_layers": 94, "output_router_logits": false, "router_aux_loss_coef": 0.001,
  "max_window_layers": 94, "sliding_window": null, "use_sliding_window": false})"},
    {"Qwen3.5", 256, 8, 2048, 512, R"({
  "model_type": "qwen3_5_moe", "image_token_id": 248056, "video_token_id": 248057,
  "vision_start_token_id": 248053, "vision_end_token_id": 248054,
  "vision_config": {"hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152},
  "text_config": {"model_type": "qwen3_5_moe_text", "hidden_size": 2048, "hidden_act": "silu",
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts": 256,
    "num_experts_per_tok": 8, "full_attention_interval": 4, "attn_output_gate": true,
    "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_value_head_dim": 128,
    "linear_num_value_heads": 32, "mamba_ssm_dtype": "float32", "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": false, "num_hidden_layers": 40}
  })"},
    {"MiniMax-M2", 256, 8, 3072, 1536, R"({
  "model_type": "minimax_m2", "hidden_size": 3072, "intermediate_size": 1536,
  "num_local_experts": 256, "num_experts_per_tok": 8, "hidden_act": "silu", "attn_type_list": [1],
  "use_mtp": true, "num_mtp_modules": 3, "mtp_transformer_layers": 1, "qk_norm_type": "per_layer",
  "use_qk_norm": true, "use_routing_bias": true, "scoring_func": "sigmoid", "rotary_dim": 64,
  "shared_intermediate_size": 0, "num_hidden_layers": 62, "router_jitter_noise": 0.0,
  "layernorm_full_attention_beta": 1.0, "layernorm_mlp_beta": 1.0, "postnorm": false})"},
    {"Mixtral", 8, 2, 4096, 14336, R"({
  "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu",
  "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 32,
  "output_router_logits": false, "router_aux_loss_coef": 0.02, "sliding_window": null})"},
    {"Jamba", 16, 2, 4096, 14336, R"({
  "model_type": "jamba", "hidden_size": 4096, "intermediate_size": 14336, "hidden_act": "silu",
  "num_experts": 16, "num_experts_per_tok": 2, "num_hidden_layers": 32, "expert_layer_period": 2,
  "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4, "use_mamba_kernels": true,
  "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256,
  "mamba_conv_bias": true, "mamba_proj_bias": false, "use_mambapy": false,
  "use_associative_scan": true, "output_router_logits": false, "router_aux_loss_coef": 0.001})"},
    {"ERNIE-4.5", 64, 6, 2560, 1536, R"({
  "model_type": "ernie4_5_moe", "hidden_size": 2560, "intermediate_size": 12288,
  "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536, "moe_num_shared_experts": 2,
  "moe_layer_start_index": 1, "moe_layer_end_index": 27, "moe_layer_interval": 1,
  "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": true, "use_bias": false,
  "hidden_act": "silu", "num_hidden_layers": 28, "num_nextn_predict_layers": 1})"},
    {"Llama 4", 16, 1, 5120, 8192, R"({
  "model_type": "llama4", "vision_config": {"hidden_act": "gelu"}, "boi_token_index": 200080,
  "text_config": {"model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "interleave_moe_layer_step": 1, "num_local_experts": 16,
    "num_experts_per_tok": 1, "hidden_act": "silu", "attention_chunk_size": 8192,
    "attn_scale": 0.1, "attn_temperature_tuning": true, "floor_scale": 8192,
    "no_rope_layers": [1, 1, 1, 0], "moe_layers": [0, 1, 2], "use_qk_norm": true,
    "router_jitter_noise": 0.0, "num_hidden_layers": 48}})"},
    {"Hunyuan", 64, 8, 4096, 3072, R"({
  "model_type": "hunyuan_v1_moe", "hidden_size": 4096, "intermediate_size": 3072, "mlp_bias": false,
  "moe_intermediate_size": [3072, 3072], "moe_topk": [8, 8], "num_experts": 64,
  "num_shared_expert": [1, 1], "use_mixed_mlp_moe": true, "use_qk_norm": true,
  "hidden_act": "silu", "num_hidden_layers": 32})"},
    {"gpt-oss-120b", 128, 4, 2880, 2880, R"({
  "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
  "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
  "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"],
  "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
  "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_key_value_heads": 8,
  "num_local_experts": 128, "output_router_logits": false, "pad_token_id": 199999,
  "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn",
  "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
  "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
  "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
  "original_max_position_embeddings": 4096, "truncate": false}, "swiglu_limit": 7.0,
  "tie_word_embeddings": false, "use_cache": true, "vocab_size": 201088})"},
    {"Ling", 256, 8, 8192, 2048, R"({
  "model_type": "bailing_moe_v2", "hidden_size": 8192, "intermediate_size": 18432,
  "moe_intermediate_size": 2048, "num_experts": 256, "num_experts_per_tok": 8, "use_bias": false,
  "first_k_dense_replace": 4, "moe_router_enable_expert_bias": true, "score_function": "sigmoid",
  "moe_shared_expert_intermediate_size": 2048, "num_shared_experts": 1, "router_dtype": "fp32",
  "routed_scaling_factor": 2.5, "hidden_act": "silu", "use_qkv_bias": false,
  "use_rmsnorm": true, "embedding_dropout": 0.0, "num_hidden_layers": 80})"},
};

ModelConfig read(const TempDir& dir, const std::string& config) {
  testing::write_file(dir / "config.json", config);
  return read_model_config(dir / "config.json");
}

TEST(ConfigFamilies, LoadWithoutAFalseRefusal) {
  for (const Family& family : kFamilies) {
    SCOPED_TRACE(family.name);
    const TempDir dir;
    const ModelConfig config = read(dir, family.config);
    EXPECT_EQ(config.geometry.num_experts, family.experts);
    EXPECT_EQ(config.geometry.num_topk, family.topk);
    EXPECT_EQ(config.geometry.token_width(), family.hidden);
    EXPECT_EQ(config.geometry.inner_width(), family.intermediate);
    std::string warnings;
    for (const CheckpointWarning& w : config.warnings) warnings += w.text + "\n";
    if (*family.note) {
      EXPECT_EQ(config.warnings.size(), 1U);
      EXPECT_THAT(warnings, ::testing::HasSubstr(family.note));
    } else {
      EXPECT_EQ(warnings, "");
    }
  }
}

TEST(ConfigFamilies, WhatIsNotSupportedIsNamed) {
  const std::pair<const char*, std::vector<std::string>> rows[] = {
      // gpt-oss-120b without its limit, and with a width that no group of weights fills
      {R"({"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
           "num_local_experts": 128, "experts_per_token": 4, "num_experts_per_tok": 4,
           "hidden_act": "silu", "quantization_config": {"quant_method": "mxfp4"}})",
       {"swigluoai needs a swiglu_limit"}},
      {R"({"model_type": "gpt_oss", "hidden_size": 2896, "intermediate_size": 2880,
           "num_local_experts": 128, "experts_per_token": 4, "swiglu_limit": 7.0})",
       {"hidden_size = 2896", "multiple of 32", "2912"}},
      // ERNIE-4.5-VL: experts of two sizes
      {R"({"model_type": "ernie4_5_moe_vl", "hidden_size": 2560, "moe_num_experts": [64, 64],
           "moe_intermediate_size": [1536, 512], "moe_k": 6})",
       {"moe_intermediate_size holds 1536 and 512"}},
      // LongCat-Flash: experts that copy their input
      {R"({"model_type": "longcat_flash", "hidden_size": 6144, "expert_ffn_hidden_size": 2048,
           "ffn_hidden_size": 12288, "n_routed_experts": 512, "moe_topk": 12,
           "zero_expert_num": 256, "zero_expert_type": "identity"})",
       {"zero_expert_num = 256"}},
  };
  for (const auto& [text, parts] : rows) {
    const TempDir dir;
    expect_error(ErrorCode::kUnsupported, parts, [&, config = text] { (void)read(dir, config); });
  }
}

}  // namespace
}  // namespace sluice
