#include "checkpoint/config_keys.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <initializer_list>
#include <string>
#include <unordered_map>

namespace sluice {
namespace {

using Kind = ConfigKeyKind;

struct Row {
  Kind kind;
  std::string_view names;  ///< Separated by white space.
};

constexpr Row kTable[] = {
    {Kind::kHidden, "hidden_size"},
    {Kind::kLatent, "routed_expert_hidden_size moe_latent_size"},
    {Kind::kIntermediate,
     "moe_intermediate_size moe_ffn_hidden_size expert_ffn_hidden_size expert_intermediate_size "
     "routed_expert_intermediate_size"},
    {Kind::kDense, "intermediate_size"},
    {Kind::kNumExperts,
     "n_routed_experts num_experts num_local_experts moe_num_experts num_routed_experts"},
    {Kind::kNumTopk,
     "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_router_topk moe_k "
     "num_selected_experts experts_per_token top_k_experts num_activated_experts"},
    {Kind::kScale,
     "routed_scaling_factor moe_routed_scaling_factor moe_router_topk_scaling_factor "
     "moe_router_scaling_factor router_scaling_factor route_scale"},
    {Kind::kNumLayers, "num_hidden_layers"},
    {Kind::kNumPrediction,
     "num_nextn_predict_layers num_mtp_layers num_mtp_modules mtp_num_hidden_layers "
     "mtp_num_layers num_nextn_layers"},
    {Kind::kFirstMoe, "first_k_dense_replace moe_layer_start_index"},
    {Kind::kLayerStep,
     "moe_layer_freq decoder_sparse_step interleave_moe_layer_step moe_layer_interval"},
    {Kind::kDenseLayers, "mlp_only_layers"},
    {Kind::kLayerTypes, "mlp_layer_types"},
    {Kind::kLayerPattern,
     "moe_layers moe_layers_enum moe_layer_end_index layers_block_type block_type "
     "hybrid_override_pattern expert_layer_period expert_layer_offset"},
    {Kind::kModelType, "model_type"},
    {Kind::kArchitectures, "architectures"},
    {Kind::kLanguage, "text_config language_config llm_config"},
    {Kind::kQuantization, "quantization_config"},
    {Kind::kExpertType, "expert_dtype"},
    // Biases, experts that are not matrices, other precisions, sizes that differ by layer.
    {Kind::kMustBeOff,
     "mlp_bias use_bias use_mlp_bias moe_bias moe_use_bias expert_bias experts_bias "
     "use_experts_bias add_bias_linear ffn_bias zero_expert_num zero_expert_type "
     "n_zero_experts block_configs moe_layer_overrides compression_config "
     "num_experts_per_layer moe_intermediate_sizes apply_router_weight_on_input "
     "moe_apply_router_weight_on_input per_layer_config"},
    // Routing: the caller hands over expert numbers and weights.
    {Kind::kIrrelevant,
     "scoring_func topk_method norm_topk_prob moe_renormalize renormalize n_group topk_group "
     "num_expert_group num_limited_groups moe_router_activation_func moe_router_dtype "
     "moe_router_num_groups moe_router_topk_limited_devices moe_router_enable_expert_bias "
     "moe_router_use_sigmoid moe_router_load_balancing_type moe_router_pre_softmax "
     "moe_router_score_function moe_router_bias_update_rate router_aux_loss_coef "
     "router_jitter_noise router_z_loss_coef router_dtype router_bias router_type "
     "output_router_logits aux_loss_alpha seq_aux use_routing_bias use_expert_bias "
     "use_moe_router_bias moe_use_aux_free moe_use_aux_free_bias moe_gate_type moe_gate "
     "moe_gate_act moe_norm_min moe_aux_loss_coeff moe_dropout_prob moe_group moe_group_experts "
     "moe_capacity moe_world_size score_function scoring_function gate_type "
     "use_grouped_topk moe_use_grouped_topk num_hash_layers n_hash_layers hash_layers "
     "moe_router_group_topk use_router_weight_scaling use_qk_norm_router moe_router_fp32 "
     "need_fp32_gate use_moe moe_multimodal_type router_n_groups expert_selection_fn "
     "router_hidden_size moe_router_logit_softcapping route_norm"},
    // Shared experts, dense layers and what lies around the experts.
    {Kind::kIrrelevant,
     "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts "
     "shared_expert_intermediate_size moe_shared_expert_intermediate_size "
     "shared_intermediate_size share_expert_dim share_q_dim share_expert_gate "
     "moe_shared_expert_gate shared_expert_rank shared_expert_gate use_shared_expert "
     "intermediate_size_mlp dense_intermediate_size ffn_hidden_size "
     "latent_moe_use_norm use_mixed_mlp_moe moe_layer_recompute ep_size moe_ep_size "
     "moe_implementation experts_implementation _experts_implementation moe_backend "
     "layer_types is_moe swiglu_limits_shared share_expert_swiglu_limit_list "
     "shared_experts_intermediate_size shared_expert_combination_strategy "
     "enable_moe_fp32_combine mlp_alpha_factor mlp_beta_factor"},
    // Attention, positions, state spaces.
    {Kind::kIrrelevant,
     "num_attention_heads num_key_value_heads head_dim attention_bias attention_dropout "
     "attention_chunk_size attention_method attn_implementation _attn_implementation "
     "attn_temperature_tuning attn_scale attn_output_gate attn_type_list attention_value_scale "
     "attention_other_setting attention_types attention_type attention_softmax_in_fp32 "
     "floor_scale sliding_window sliding_window_pattern sliding_window_size use_sliding_window "
     "max_window_layers full_attention_interval full_attention_idxs kv_lora_rank q_lora_rank "
     "o_lora_rank o_groups qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim "
     "mla_use_nope mla_scale_q_lora mla_scale_kv_lora qkv_bias use_qkv_bias use_qk_norm qk_norm "
     "qk_norm_type use_qk_l2_norm qk_layernorm index_head_dim index_n_heads index_topk "
     "index_topk_freq index_topk_pattern index_skip_topk_offset index_share_for_mtp_iteration "
     "indexer_rope_interleave indexer_types compress_ratios compress_rope_theta "
     "linear_attn_config linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads "
     "linear_num_value_heads linear_value_head_dim mamba_ssm_dtype mamba_d_state mamba_d_conv "
     "mamba_hidden_act log_scaling_alpha log_scaling_n_floor time_step_limit "
     "mamba_expand mamba_dt_rank mamba_conv_bias mamba_proj_bias use_mamba_kernels use_mambapy "
     "use_associative_scan attn_layer_period attn_layer_offset sparse_attention_config "
     "rope_theta rope_scaling rope_parameters rope_interleave rope_type rope_local_base_freq "
     "rope_ratio rope_3d rotary_dim rotary_pct rotary_emb_base partial_rotary_factor "
     "rope_theta_swa no_rope_layers no_rope_layer_interval nope_layer_interval "
     "max_position_embeddings original_max_position_embeddings max_sequence_length "
     "model_max_length "
     "initial_context_length position_embedding_type use_rope num_attention_groups "
     "num_attention_heads_swa swa_num_attention_heads swa_num_key_value_heads swa_head_dim "
     "swa_v_head_dim swa_rope_theta hybrid_layer_pattern add_swa_attention_sink_bias "
     "add_full_attention_sink_bias attn_sink use_attn_sink yoco_layers freq_allocation "
     "hc_eps hc_mult hc_sinkhorn_iters"},
    // Norms, embeddings, vocabulary, tokenizer, heads.
    {Kind::kIrrelevant,
     "rms_norm_eps layer_norm_eps layernorm_epsilon norm_eps norm_epsilon norm_type "
     "use_gemma_norm use_rmsnorm layernorm_attention_alpha layernorm_attention_beta "
     "layernorm_full_attention_alpha layernorm_full_attention_beta "
     "layernorm_linear_attention_alpha "
     "layernorm_linear_attention_beta layernorm_mlp_alpha layernorm_mlp_beta postnorm "
     "zero_centered use_sandwich_norm vocab_size vocab_size_per_layer_input "
     "tie_word_embeddings tie_encoder_decoder embedding_dropout embd_pdrop resid_pdrop "
     "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id "
     "mask_token_id decoder_start_token_id tokenizer_class output_vocab_size "
     "final_logit_softcapping lm_head_bias z_loss_coef initializer_range initializer_factor"},
    // Other senses than language.
    {Kind::kIrrelevant,
     "vision_config visual_config audio_config video_config projector_config speech_config "
     "vision_start_token_id vision_end_token_id vision_token_id image_token_id video_token_id "
     "ignore_index image_token_index video_token_index image_start_token_id image_end_token_id "
     "video_start_token_id video_end_token_id media_placeholder_token_id boi_token_index "
     "eoi_token_index image_seq_length image_grid_pinpoints projector_hidden_act "
     "multimodal_projector_bias vision_feature_layer vision_feature_select_strategy "
     "use_unified_vision_chunk video_placeholder im_patch_id img_token_compression_config "
     "process_image_mode projector_hidden_size use_im_start_end"},
    // Prediction layers' and drafts' own matters.
    {Kind::kIrrelevant,
     "mtp_use_dedicated_embeddings mtp_loss_factor mtp_loss_scaling_factor "
     "mtp_transformer_layers mtp_type multi_token_prediction use_mtp nextn_layers "
     "dspark_config dspark_block_size draft_vocab_size eagle_config"},
    // Where the file comes from, training and generation.
    {Kind::kIrrelevant,
     "auto_map transformers_version torch_dtype dtype use_cache pretraining_tp "
     "_name_or_path name_or_path _commit_hash is_encoder_decoder is_decoder pruned_heads "
     "add_cross_attention cross_attention_hidden_size chunk_size_feed_forward "
     "output_attentions output_hidden_states return_dict return_dict_in_generate torchscript "
     "use_bfloat16 tf_legacy_loss finetuning_task id2label label2id problem_type prefix "
     "task_specific_params num_labels classifier_dropout attn_pdrop hidden_dropout "
     "hidden_dropout_prob attention_probs_dropout_prob dropout min_length max_length do_sample "
     "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p "
     "typical_p repetition_penalty length_penalty no_repeat_ngram_size "
     "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
     "forced_bos_token_id forced_eos_token_id remove_invalid_values "
     "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
     "sluice_synthetic is_causal activation_dropout use_flash_attention unsloth_fixed "
     "unsloth_version "
     "swap_weights_dtype scale_fmt inference_dtype use_unit_offset "
     "fuse_rms_norm compressed use_parallel_residual ignored_layers tensor_parallel_degree "
     "fuse_attention_qkv fuse_attention_ffn fuse_linear fuse_rope fuse_softmax_mask "
     "recompute sequence_parallel enable_delay_scale_loss max_model_len"},
};

using KeyMap = std::unordered_map<std::string_view, Kind>;

KeyMap make_key_map() {
  KeyMap map;
  for (const Row& row : kTable) {
    std::string_view rest = row.names;
    while (!rest.empty()) {
      const std::size_t end = std::min(rest.find(' '), rest.size());
      if (end > 0) map.emplace(rest.substr(0, end), row.kind);
      rest.remove_prefix(std::min(end + 1, rest.size()));
    }
  }
  return map;
}

/// `hidden_act` and whatever else says how gate and up meet.
bool is_activation(std::string_view key) {
  return key.find("swiglu") != std::string_view::npos || key.starts_with("activation_") ||
         key.starts_with("hidden_act") || key == "mlp_hidden_act" || key == "activation" ||
         key == "moe_hidden_act" || key == "act_fn";
}

bool has_any(std::string_view key, std::initializer_list<std::string_view> words) {
  return std::ranges::any_of(
      words, [&](std::string_view word) { return key.find(word) != std::string_view::npos; });
}

}  // namespace

ConfigKeyKind config_key_kind(std::string_view key) {
  static const KeyMap map = make_key_map();
  if (const auto at = map.find(key); at != map.end()) return at->second;
  return is_activation(key) ? Kind::kActivation : Kind::kUnknown;
}

std::string config_key_names(ConfigKeyKind kind) {
  std::string list;
  for (const Row& row : kTable) {
    if (row.kind != kind) continue;
    for (const char c : row.names) list += c == ' ' ? std::string(", ") : std::string(1, c);
  }
  return list;
}

bool is_suspicious(std::string_view key) {
  std::string lower(key);
  std::ranges::transform(lower, lower.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (has_any(lower, {"expert", "moe", "router", "routed", "ffn", "mlp", "feed_forward", "glu",
                      "activation", "act_fn", "hidden_act"})) {
    return true;
  }
  // Attention, positions and other senses have scales, biases and latents of their own.
  if (has_any(lower, {"attn",   "attention", "rope",    "rotary", "vision", "image", "audio",
                      "video",  "index",     "softmax", "logit",  "embed",  "norm",  "kv_",
                      "q_lora", "qk",        "conv",    "mamba",  "ssm",    "loss",  "mla"})) {
    return false;
  }
  // What bounds a value, and which half of gate and up comes first.
  return has_any(lower, {"scale",       "scaling",   "bias",      "latent",    "clamp",
                         "clip_",       "limit",     "softcap",   "gate_up",   "up_gate",
                         "gate_first",  "up_first",  "gate_proj", "up_proj",   "down_proj",
                         "linear_unit", "nonlinear", "act_func",  "interleav", "transpose"});
}

bool names_function(std::string_view value) {
  std::string lower(value);
  std::ranges::transform(lower, lower.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (lower == "\"situ\"") return true;
  return lower.starts_with('"') && has_any(lower, {"\"gelu", "_gelu", "\"relu", "_relu", "\"geglu",
                                                   "\"reglu", "\"mish", "\"swigluoai"});
}

bool is_off(std::string_view value) {
  constexpr std::array<std::string_view, 9> kOff = {"null", "false", "0",        "0.0",     "[]",
                                                    "{}",   "\"\"",  "\"none\"", "\"None\""};
  return std::ranges::find(kOff, value) != kOff.end();
}

std::string shown_value(std::string_view value) {
  constexpr std::size_t kMaxLength = 60;
  return value.size() <= kMaxLength ? std::string(value)
                                    : std::string(value.substr(0, kMaxLength)) + "...";
}

}  // namespace sluice
