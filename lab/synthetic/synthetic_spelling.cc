#include "synthetic/synthetic_spelling.h"

#include <array>
#include <utility>

#include "core/fail.h"
#include "synthetic/synthetic_formats.h"

namespace sluice {
namespace {

using Json = nlohmann::ordered_json;

/// How a family's config.json says which layers have no experts.
enum class DenseKey { kFirst, kList, kNone };

struct Spelling {
  const char* name;
  const char* prefix;
  const char* container;
  bool has_numbered_stems;  // w1, w3, w2
  bool is_nested;           // Keys in text_config.
  const char* model_type;   // Null: the geometry's name.
  const char* num_experts;
  const char* num_topk;
  DenseKey dense;
};

constexpr std::array kSpellings = {
    Spelling{"deepseek", "model.layers.", ".mlp.experts.", false, false, nullptr,
             "n_routed_experts", "num_experts_per_tok", DenseKey::kFirst},
    Spelling{"glm-5", "model.layers.", ".mlp.experts.", false, false, "glm_moe_dsa",
             "n_routed_experts", "num_experts_per_tok", DenseKey::kFirst},
    Spelling{"deepseek-v4", "layers.", ".ffn.experts.", true, false, "deepseek_v4",
             "n_routed_experts", "num_experts_per_tok", DenseKey::kNone},
    Spelling{"kimi-k2.5", "language_model.model.layers.", ".mlp.experts.", false, true, "kimi_k2",
             "n_routed_experts", "num_experts_per_tok", DenseKey::kFirst},
    Spelling{"kimi-k3", "language_model.model.layers.", ".block_sparse_moe.experts.", true, true,
             "kimi_linear", "num_experts", "num_experts_per_token", DenseKey::kFirst},
    Spelling{"qwen3", "model.layers.", ".mlp.experts.", false, false, "qwen3_moe", "num_experts",
             "num_experts_per_tok", DenseKey::kList},
    Spelling{"gpt-oss", "model.layers.", ".mlp.experts.", false, false, "gpt_oss",
             "num_local_experts", "num_experts_per_tok", DenseKey::kNone},
    Spelling{"qwen3.8", "model.language_model.layers.", ".mlp.experts.", false, true,
             "qwen3_5_moe_text", "num_experts", "num_experts_per_tok", DenseKey::kList},
};

const Spelling& spelling_of(const SyntheticCheckpoint& spec) {
  std::string known;
  for (const Spelling& s : kSpellings) {
    if (spec.spelling == s.name) return s;
    known += std::string(known.empty() ? "" : ", ") + s.name;
  }
  fail(ErrorCode::kInvalidArgument, "spelling '{}' is none of: {}", spec.spelling, known);
}

/// What a preset's model is published with, beyond its sizes.
struct Published {
  const char* preset;
  const char* format;
  const char* spelling;
  DType scale_dtype = DType::kFloat32;
  bool has_unit_input_scales = false;
  int first_layer = 3;  // With experts.
};

constexpr std::array kPublished = {
    Published{"kimi-k2-int4", "kimi-int4", "deepseek", DType::kBFloat16},
    Published{"kimi-k2.5", "kimi-int4", "kimi-k2.5", DType::kBFloat16},
    Published{"kimi-k3", "kimi-int4", "kimi-k3", DType::kBFloat16},
    Published{"kimi-k3-mxfp4", "kimi-mxfp4", "kimi-k3", DType::kFloat8E8M0},
    Published{"glm-5", "w4afp8", "glm-5", DType::kBFloat16, true},
    Published{.preset = "deepseek-v4-flash",
              .format = "w4afp8",
              .spelling = "deepseek-v4",
              .first_layer = 0},
    Published{.preset = "deepseek-v4-pro",
              .format = "w4afp8",
              .spelling = "deepseek-v4",
              .first_layer = 0},
    Published{.preset = "deepseek-v4-flash-mxfp4",
              .format = "deepseek-fp4",
              .spelling = "deepseek-v4",
              .scale_dtype = DType::kFloat8E8M0,
              .first_layer = 0},
    Published{.preset = "deepseek-v4-pro-mxfp4",
              .format = "deepseek-fp4",
              .spelling = "deepseek-v4",
              .scale_dtype = DType::kFloat8E8M0,
              .first_layer = 0},
    Published{"qwen3.8", "compressed-tensors", "qwen3.8", DType::kBFloat16},
    Published{"qwen3-235b", "w4afp8", "qwen3"},
    Published{"qwen3-30b", "w4afp8", "qwen3"},
    Published{.preset = "gpt-oss-120b",
              .format = "gpt-oss",
              .spelling = "gpt-oss",
              .scale_dtype = DType::kFloat8E8M0,
              .first_layer = 0},
    Published{.preset = "gpt-oss-20b",
              .format = "gpt-oss",
              .spelling = "gpt-oss",
              .scale_dtype = DType::kFloat8E8M0,
              .first_layer = 0},
};

void add_dense_layers(const SyntheticCheckpoint& spec, DenseKey key, Json& model) {
  switch (key) {
    case DenseKey::kFirst:
      model["first_k_dense_replace"] = spec.first_layer;
      return;
    case DenseKey::kList:
      model["decoder_sparse_step"] = 1;
      model["mlp_only_layers"] = Json::array();
      for (int l = 0; l < spec.first_layer; ++l) model["mlp_only_layers"].push_back(l);
      return;
    case DenseKey::kNone:
      return;
  }
}

/// config.json of the "deepseek" spelling has never named SwiGLU, and it is part of
/// Checkpoint::identity().
void add_activation(const ActivationFn& fn, bool names_swiglu, Json& model) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      if (names_swiglu) model["hidden_act"] = "silu";
      return;
    case ActivationKind::kSwigluLimit:
      model["hidden_act"] = "silu";
      model["swiglu_limit"] = fn.limit;
      return;
    case ActivationKind::kSitu:
      model["hidden_act"] = "situ";
      model["activation_situ_beta"] = fn.beta;
      model["activation_situ_linear_beta"] = fn.linear_beta;
      return;
    case ActivationKind::kSwigluOai:  // MiniMax-M3's keys; gpt-oss leaves alpha to its model type.
      model["hidden_act"] = "swigluoai";
      model["swiglu_alpha"] = fn.alpha;
      model["swiglu_limit"] = fn.limit;
      return;
  }
  fail(ErrorCode::kInternal, "activation {} does not exist", static_cast<int>(fn.kind));
}

/// The language model's own keys.
Json model_keys(const SyntheticCheckpoint& spec, const Spelling& spelling) {
  const ModelGeometry& g = spec.geometry;
  Json model = {{"model_type", spelling.model_type ? spelling.model_type : g.name.c_str()}};
  if (spec.spelling == "kimi-k3") {
    // The experts' inputs are half as wide as the model.
    model["hidden_size"] = 2 * g.token_width();
    model["routed_expert_hidden_size"] = g.token_width();
  } else {
    model["hidden_size"] = g.token_width();
  }
  const bool is_gpt_oss = spec.spelling == "gpt-oss";
  model[is_gpt_oss ? "intermediate_size" : "moe_intermediate_size"] = g.inner_width();
  model[spelling.num_experts] = g.num_experts;
  model[spelling.num_topk] = g.num_topk;
  model["routed_scaling_factor"] = g.routed_scaling_factor;
  add_dense_layers(spec, spelling.dense, model);
  model["num_hidden_layers"] = spec.first_layer + spec.num_layers;
  if (is_gpt_oss) {
    model["experts_per_token"] = g.num_topk;
    model["hidden_act"] = "silu";
    model["swiglu_limit"] = g.activation.limit;
  } else {
    add_activation(g.activation, spec.spelling != "deepseek", model);
  }
  return model;
}

}  // namespace

std::vector<std::string> synthetic_spelling_names() {
  std::vector<std::string> names;
  for (const Spelling& s : kSpellings) names.emplace_back(s.name);
  return names;
}

SyntheticCheckpoint synthetic_preset(const std::string& preset) {
  SyntheticCheckpoint spec{.geometry = preset_geometry(preset)};
  for (const Published& p : kPublished) {
    if (preset != p.preset) continue;
    spec.format = p.format;
    spec.spelling = p.spelling;
    spec.scale_dtype = p.scale_dtype;
    spec.with_unit_input_scales = p.has_unit_input_scales;
    spec.first_layer = p.first_layer;
  }
  return spec;
}

void check_synthetic_spelling(const SyntheticCheckpoint& spec) {
  Json unused;
  (void)spelling_of(spec);
  const ActivationFn& fn = spec.geometry.activation;
  check_argument(
      spec.spelling != "gpt-oss" || (fn.kind == ActivationKind::kSwigluOai && fn.alpha == 1.702f),
      "spelling gpt-oss has the activation swiglu-oai:alpha=1.702, not {}", to_string(fn));
  add_activation(spec.geometry.activation, true, unused);
}

std::string synthetic_tensor_name(const SyntheticCheckpoint& spec, int layer, int expert,
                                  const std::string& part) {
  const Spelling& spelling = spelling_of(spec);
  std::string own = part;
  if (spelling.has_numbered_stems) {
    for (const auto& [words, number] :
         {std::pair{"gate_proj", "w1"}, {"up_proj", "w3"}, {"down_proj", "w2"}}) {
      if (const std::string stem = words; part.starts_with(stem + ".")) {
        own = number + part.substr(stem.size());
      }
    }
  }
  const std::string number = expert < 0 ? "" : std::to_string(expert) + ".";
  return spelling.prefix + std::to_string(layer) + spelling.container + number + own;
}

Json synthetic_model_config(const SyntheticCheckpoint& spec) {
  const Spelling& spelling = spelling_of(spec);
  Json config = model_keys(spec, spelling);
  if (spelling.is_nested) config = {{"model_type", spec.spelling}, {"text_config", config}};
  if (auto quantization = synthetic_quantization_config(spec); !quantization.is_null()) {
    config["quantization_config"] = std::move(quantization);
  }
  if (spec.format == "deepseek-fp4") config["expert_dtype"] = "fp4";
  config["sluice_synthetic"] = {{"seed", spec.seed}};
  return config;
}

}  // namespace sluice
