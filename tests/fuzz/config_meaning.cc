#include "config_meaning.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

namespace sluice::fuzz {
namespace {

using Json = nlohmann::ordered_json;
using Names = std::initializer_list<const char*>;

/// nlohmann refuses numbers beyond double's range, which the readers may skip.
bool has_exponent(const std::string& text) {
  for (std::size_t i = 1; i < text.size(); ++i) {
    if ((text[i] == 'e' || text[i] == 'E') &&
        std::isdigit(static_cast<unsigned char>(text[i - 1]))) {
      return true;
    }
  }
  return false;
}

const Json* member(const Json& object, const std::string& key) {
  if (!object.is_object()) return nullptr;
  const auto at = object.find(key);
  return at == object.end() || at->is_null() ? nullptr : &*at;
}

std::string text_of(const Json& object, const std::string& key) {
  const Json* const value = member(object, key);
  return value && value->is_string() ? value->get<std::string>() : std::string();
}

/// The whole, and the configs of language models in it.
std::vector<const Json*> objects_of(const Json& whole) {
  std::vector<const Json*> objects = {&whole};
  if (!whole.is_object()) return objects;
  for (const auto& [key, value] : whole.items()) {
    const bool is_language =
        key == "text_config" || key == "language_config" || key == "llm_config";
    if (is_language && value.is_object()) objects.push_back(&value);
  }
  return objects;
}

/// Key by key, what lies deeper counts.
Json flat(const Json& whole) {
  Json sum = Json::object();
  for (const Json* object : objects_of(whole)) {
    for (const auto& [key, value] : object->items()) {
      // An empty name is none.
      const bool is_name = key == "model_type" || key == "expert_dtype";
      if (!value.is_null() && !(is_name && value == "")) sum[key] = value;
    }
  }
  return sum;
}

/// The one number that all of these keys give; empty if there are none, -1 if they do not agree.
std::optional<double> number(const Json& config, Names names) {
  std::optional<double> found;
  for (const char* const name : names) {
    const Json* const value = member(config, name);
    if (!value) continue;
    for (const Json& one : value->is_array() ? *value : Json::array({*value})) {
      if (!one.is_number()) return -1;
      if (found && *found != one.get<double>()) return -1;
      found = one.get<double>();
    }
    if (!found) return -1;  // An empty list.
  }
  return found;
}

bool is_off(const Json& value) {
  if (value.is_null()) return true;
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) return value.get<double>() == 0;
  if (value.is_string()) return value == "" || value == "none" || value == "None";
  return std::all_of(value.begin(), value.end(), is_off);
}

/// What the key gives a layer, as a number for all or in a list: 0 if that is nothing, NaN, which
/// equals no parameter, if it is no number.
float given_to(const Json& config, const char* key, std::size_t layer) {
  const Json* value = member(config, key);
  if (value && value->is_array()) value = layer < value->size() ? &(*value)[layer] : nullptr;
  if (!value || is_off(*value)) return 0;
  return value->is_number() ? static_cast<float>(value->get<double>())
                            : std::numeric_limits<float>::quiet_NaN();
}

/// The limit of a layer under either name; NaN if one is no number.
float limit_of(const Json& config, std::size_t layer) {
  const float one = given_to(config, "swiglu_limit", layer);
  const float other = given_to(config, "swiglu_limits", layer);
  return std::isnan(one) || std::isnan(other) ? std::numeric_limits<float>::quiet_NaN()
                                              : std::max(one, other);
}

bool is_limit(const std::string& key) {
  return key == "swiglu_limit" || key == "swiglu_limits";
}

bool sizes_agree(const Json& config, const ModelGeometry& g) {
  const auto hidden = number(config, {"hidden_size"});
  const auto latent = number(config, {"routed_expert_hidden_size", "moe_latent_size"});
  const auto own =
      number(config, {"moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size",
                      "expert_intermediate_size", "routed_expert_intermediate_size"});
  const auto dense = number(config, {"intermediate_size"});
  const auto experts = number(config, {"n_routed_experts", "num_experts", "num_local_experts",
                                       "moe_num_experts", "num_routed_experts"});
  const auto topk = number(config, {"num_experts_per_tok", "num_experts_per_token", "moe_topk",
                                    "moe_top_k", "moe_router_topk", "moe_k", "num_selected_experts",
                                    "experts_per_token", "top_k_experts", "num_activated_experts"});
  const auto is_padded = [](int width, int padded) {
    return width % 32 == 0 && padded % 128 == 0 && padded >= width && padded - width < 128;
  };
  return hidden && (latent ? latent : hidden) == g.token_width() &&
         (own ? own : dense) == g.inner_width() && experts == g.num_experts && topk == g.num_topk &&
         is_padded(g.token_width(), g.hidden) && is_padded(g.inner_width(), g.intermediate) &&
         g.num_topk <= g.num_experts;
}

bool factor_agrees(const Json& config, float factor) {
  const auto found = number(config, {"routed_scaling_factor", "moe_routed_scaling_factor",
                                     "moe_router_topk_scaling_factor", "moe_router_scaling_factor",
                                     "router_scaling_factor"});
  return static_cast<float>(found.value_or(1)) == factor;
}

bool layers_agree(const Json& config, const ModelConfig& read) {
  return number(config, {"num_hidden_layers"}).value_or(0) == read.num_layers &&
         number(config, {"first_k_dense_replace", "moe_layer_start_index"}).value_or(0) ==
             read.first_k_dense_replace &&
         number(config, {"num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules",
                         "mtp_num_hidden_layers", "mtp_num_layers", "num_nextn_layers"})
                 .value_or(0) == read.num_prediction_layers;
}

bool is_activation_key(const std::string& key) {
  return key.starts_with("swiglu_") || key.starts_with("hidden_act") ||
         (key.starts_with("activation_") && key != "activation_dropout") ||
         key == "mlp_hidden_act" || key == "moe_hidden_act" || key == "act_fn" ||
         key == "activation";
}

/// Of one layer: plain SwiGLU must be all there is for it; the others must be declared, with these
/// parameters and no others.
bool activation_agrees(const Json& config, std::size_t layer, const ActivationFn& fn) {
  if (fn.limit != limit_of(config, layer)) return false;
  const bool is_gpt_oss = text_of(config, "model_type") == "gpt_oss";
  for (const auto& [key, value] : config.items()) {
    if (!is_activation_key(key) || is_off(value) || is_limit(key)) continue;
    const bool is_plain =
        fn.kind == ActivationKind::kSwiglu || fn.kind == ActivationKind::kSwigluLimit || is_gpt_oss;
    const bool is_own_number =
        (fn.kind == ActivationKind::kSwigluOai && key == "swiglu_alpha") ||
        (fn.kind == ActivationKind::kSwigluOai && key == "swiglu_beta" && value == 1) ||
        (fn.kind == ActivationKind::kSitu && key.starts_with("activation_situ_"));
    const bool is_own_name = fn.kind == ActivationKind::kSitu        ? value == "situ"
                             : fn.kind == ActivationKind::kSwigluOai ? value == "swigluoai"
                                                                     : false;
    if (!is_own_number && !is_own_name && !(is_plain && value == "silu")) return false;
  }
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
    case ActivationKind::kSwigluLimit:
      return !is_gpt_oss;
    case ActivationKind::kSwigluOai:
      return fn.limit > 0 && (given_to(config, "swiglu_alpha", layer) == fn.alpha ||
                              (is_gpt_oss && fn.alpha == 1.702f));
    case ActivationKind::kSitu:
      return given_to(config, "activation_situ_beta", layer) == fn.beta &&
             given_to(config, "activation_situ_linear_beta", layer) == fn.linear_beta;
  }
  return false;
}

/// Of every layer, as far as anyone counts; and of the layer that stands in the geometry.
bool activations_agree(const Json& config, const ModelConfig& read) {
  constexpr int kMostLayers = 128;
  bool is_geometry_one_of_them = false;
  for (int layer = 0; layer < std::clamp(read.num_layers, 1, kMostLayers); ++layer) {
    const ActivationFn& fn = read.activations.of(layer);
    if (!activation_agrees(config, static_cast<std::size_t>(layer), fn)) return false;
    is_geometry_one_of_them |= fn == read.geometry.activation;
  }
  return is_geometry_one_of_them;
}

/// Keys that would change results, and some that sound so and that nobody knows.
bool nothing_else_is_on(const Json& whole) {
  for (const Json* object : objects_of(whole)) {
    for (const char* const key :
         {"mlp_bias", "use_bias", "use_mlp_bias", "moe_bias", "moe_use_bias", "expert_bias",
          "experts_bias", "use_experts_bias", "add_bias_linear", "ffn_bias", "zero_expert_num",
          "zero_expert_type", "n_zero_experts", "block_configs", "moe_layer_overrides",
          "compression_config", "num_experts_per_layer", "moe_intermediate_sizes",
          "apply_router_weight_on_input"}) {
      if (const Json* const value = member(*object, key); value && !is_off(*value)) return false;
    }
    for (const char* const key : {"moe_new", "gate_scale", "up_clamp", "expert_new", "mlp_new"}) {
      if (member(*object, key)) return false;
    }
  }
  return true;
}

/// What says how the weights are quantized; the deepest counts. Null if nothing does.
Json quantization_of(const Json& whole) {
  Json found;
  for (const Json* object : objects_of(whole)) {
    const Json* const own = member(*object, "quantization_config");
    if (own && own->is_object()) found = *own;
  }
  return found;
}

/// Keys that would change what codes mean, of the whole and of the experts' weights: off, or as the
/// formats have it.
bool weights_are_plain(const Json& object, const Format& format) {
  for (const char* const key : {"zero_point", "desc_act", "online_hadamard", "weight_rotation"}) {
    if (const Json* const value = member(object, key); value && !is_off(*value)) return false;
  }
  const Json* const symmetric = member(object, "symmetric");
  if (symmetric && symmetric->dump() != "true" && symmetric->dump() != "1") return false;
  const Json* const bits = member(object, "bits");
  if (!bits) return true;
  const bool is_fp8 = format.name() == "fp8-block";
  return bits->dump() == "4" ? !is_fp8
                             : bits->dump() == "8" && (is_fp8 || format.name() == "deepseek-fp4");
}

/// Two descriptions may differ in what only one of them says.
bool descriptions_agree(const Json& whole) {
  std::string method;
  for (const Json* object : objects_of(whole)) {
    const Json* const own = member(*object, "quantization_config");
    const std::string here = own ? text_of(*own, "quant_method") : std::string();
    if (!method.empty() && !here.empty() && here != method) return false;
    if (!here.empty()) method = here;
  }
  return true;
}

/// True if some group of config_groups is symmetric INT4 in groups of `group_size`, packed.
bool has_int4_group(const Json& quantization, int group_size) {
  const Json* const groups = member(quantization, "config_groups");
  if (!groups || !groups->is_object()) return false;
  for (const auto& [name, group] : groups->items()) {
    const Json* const weights = member(group, "weights");
    if (!weights) continue;
    const std::string own = text_of(group, "format");
    const Json* const symmetric = member(*weights, "symmetric");
    if (number(*weights, {"num_bits"}) == 4 && number(*weights, {"group_size"}) == group_size &&
        text_of(*weights, "type") == "int" && text_of(*weights, "strategy") == "group" &&
        symmetric && *symmetric == true &&
        (own.empty() ? text_of(quantization, "format") : own) == "pack-quantized") {
      return true;
    }
  }
  return false;
}

/// True if some group of config_groups is MXFP4 by its container and its numbers.
bool has_mxfp4_group(const Json& quantization) {
  const Json* const groups = member(quantization, "config_groups");
  if (!groups || !groups->is_object()) return false;
  for (const auto& [name, group] : groups->items()) {
    const Json* const weights = member(group, "weights");
    if (!weights) continue;
    const std::string own = text_of(group, "format");
    if (number(*weights, {"num_bits"}) == 4 && number(*weights, {"group_size"}) == 32 &&
        text_of(*weights, "type") == "float" && text_of(*weights, "strategy") == "group" &&
        (own.empty() ? text_of(quantization, "format") : own) == "mxfp4-pack-quantized") {
      return true;
    }
  }
  return false;
}

/// In which type the experts are, in one of two places or in both; "two" if these differ.
std::string expert_type(const Json& whole, const Json& quantization) {
  const std::string own = text_of(quantization, "expert_dtype");
  const std::string beside = text_of(flat(whole), "expert_dtype");
  if (!own.empty() && !beside.empty() && own != beside) return "two";
  return own.empty() ? beside : own;
}

/// Whether experts of this format may be said to be of `type`.
bool is_type_of(const std::string& type, const Format& format) {
  if (type.empty()) return true;
  if (format.name() == "fp8-block") return type == "fp8";
  return format.weight_format() == WeightFormat::kMxfp4 && type == "fp4";
}

}  // namespace

bool means_the_same(const Texts& texts, const ModelConfig& config) {
  const Json whole = Json::parse(texts.config, nullptr, false);
  if (whole.is_discarded()) return has_exponent(texts.config);
  const Json keys = flat(whole);
  return sizes_agree(keys, config.geometry) &&
         factor_agrees(keys, config.geometry.routed_scaling_factor) && layers_agree(keys, config) &&
         activations_agree(keys, config) && nothing_else_is_on(whole) && descriptions_agree(whole);
}

/// Groups of `group_size` weights must fill the experts' widths.
static bool widths_fit(const Texts& texts, int group_size) {
  const Json keys = flat(Json::parse(texts.config, nullptr, false));
  const auto latent = number(keys, {"routed_expert_hidden_size", "moe_latent_size"});
  const auto own =
      number(keys, {"moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size",
                    "expert_intermediate_size", "routed_expert_intermediate_size"});
  for (const auto& width : {latent ? latent : number(keys, {"hidden_size"}),
                            own ? own : number(keys, {"intermediate_size"})}) {
    if (std::fmod(width.value_or(0), group_size) != 0) return false;
  }
  return true;
}

bool is_declared(const Texts& texts, const Format& format) {
  const Json whole = Json::parse(texts.config, nullptr, false);
  const Json algo_file = Json::parse(texts.algo.empty() ? "{}" : texts.algo, nullptr, false);
  if (whole.is_discarded() || algo_file.is_discarded()) {
    return has_exponent(texts.config + texts.algo);
  }
  if (!widths_fit(texts, format.group_size())) return false;
  const Json quantization = quantization_of(whole);
  const std::string method = text_of(quantization, "quant_method");
  const Json* const inner = member(algo_file, "quantization");
  for (const Json* object : objects_of(whole)) {
    const Json* const own = member(*object, "quantization_config");
    if (own && !weights_are_plain(*own, format)) return false;
  }
  if (inner && !weights_are_plain(*inner, format)) return false;
  const std::string algo = inner ? text_of(*inner, "quant_algo") : std::string();
  const std::string name(format.name());
  // Both files may say it, under one or two names; what is not said is 128.
  auto group = number(quantization, {"group_size", "weight_group_size"});
  if (const auto other = inner ? number(*inner, {"group_size"}) : std::nullopt) {
    if (group && *group != *other) return false;
    group = other;
  }
  const std::string type = expert_type(whole, quantization);
  if (!is_type_of(type, format)) return false;
  const bool is_group_ours = group.value_or(128) == format.group_size();
  if (name == "w4afp8") {
    return (method == name || (method.empty() && algo == "MIXED_PRECISION")) && is_group_ours;
  }
  if (name == "compressed-tensors") {
    return method == name && (format.weight_format() == WeightFormat::kMxfp4
                                  ? has_mxfp4_group(quantization)
                                  : has_int4_group(quantization, format.group_size()));
  }
  if (name == "gpt-oss") return method == "mxfp4" && format.has_bias();
  if (name == "angelslim") return method == "w4a8_awq" && is_group_ours;
  if (name == "modelopt-w4a8-awq") {
    return (algo == "W4A8_AWQ" || text_of(quantization, "quant_algo") == "W4A8_AWQ") &&
           is_group_ours;
  }
  if (name == "deepseek-fp4") return method == "fp8" && type == "fp4";
  if (name == "fp8-block") return method == "fp8";
  return name == "bf16" && method.empty() && algo.empty();
}

bool may_be_corrupt(const Texts& texts) {
  const auto is_sound = [](const std::string& text) {
    const Json json = Json::parse(text, nullptr, false);
    return json.is_object();
  };
  return !is_sound(texts.config) || (!texts.algo.empty() && !is_sound(texts.algo));
}

bool means_the_same(const Texts& texts, const WeightMap& map) {
  const Json whole = Json::parse(texts.index, nullptr, false);
  if (whole.is_discarded()) return has_exponent(texts.index);
  const Json* const own = member(whole, "weight_map");
  if (!own || !own->is_object() || own->size() != map.size()) return false;
  for (const auto& [tensor, file] : own->items()) {
    const auto at = map.find(tensor);
    if (at == map.end() || file != at->second.file) return false;
    if (at->second.file.find('/') != std::string::npos) return false;
  }
  return true;
}

}  // namespace sluice::fuzz
