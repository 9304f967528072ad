#include "config_meaning.h"

#include <algorithm>
#include <cctype>
#include <initializer_list>
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
      if (!value.is_null()) sum[key] = value;
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
  if (value.is_null() || (value.is_boolean() && !value.get<bool>())) return true;
  if (value.is_number()) return value.get<double>() == 0;
  if (value.is_string()) return value == "" || value == "none" || value == "None";
  return std::all_of(value.begin(), value.end(), is_off);
}

/// True if the key gives this number, to all layers or in a list to one of them.
bool gives(const Json& config, const char* key, float number) {
  const Json* const value = member(config, key);
  if (!value) return false;
  const Json list = value->is_array() ? *value : Json::array({*value});
  return std::any_of(list.begin(), list.end(), [&](const Json& one) {
    return one.is_number() && static_cast<float>(one.get<double>()) == number;
  });
}

/// A list by layer with layers that have no limit.
bool is_off_in_places(const Json& value) {
  return value.is_array() && std::any_of(value.begin(), value.end(), is_off);
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
  return hidden && (latent ? latent : hidden) == g.hidden &&
         (own ? own : dense) == g.intermediate && experts == g.num_experts && topk == g.num_topk &&
         g.hidden % 128 == 0 && g.intermediate % 128 == 0 && g.num_topk <= g.num_experts;
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
/// parameters.
bool activation_agrees(const Json& config, const ActivationFn& fn) {
  switch (fn.kind) {
    case ActivationKind::kSwiglu:
      for (const auto& [key, value] : config.items()) {
        if (is_activation_key(key) && value != "silu" && !is_off(value) &&
            !is_off_in_places(value)) {
          return false;
        }
      }
      return true;
    case ActivationKind::kSwigluLimit:
    case ActivationKind::kSwigluOai:
      return gives(config, "swiglu_limit", fn.limit) || gives(config, "swiglu_limits", fn.limit);
    case ActivationKind::kSitu:
      return gives(config, "activation_situ_beta", fn.beta) &&
             gives(config, "activation_situ_linear_beta", fn.linear_beta);
  }
  return false;
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

}  // namespace

bool means_the_same(const Texts& texts, const ModelConfig& config) {
  const Json whole = Json::parse(texts.config, nullptr, false);
  if (whole.is_discarded()) return has_exponent(texts.config);
  const Json keys = flat(whole);
  return sizes_agree(keys, config.geometry) &&
         factor_agrees(keys, config.geometry.routed_scaling_factor) && layers_agree(keys, config) &&
         activation_agrees(keys, config.geometry.activation) && nothing_else_is_on(whole) &&
         descriptions_agree(whole);
}

bool is_declared(const Texts& texts, const Format& format) {
  const Json whole = Json::parse(texts.config, nullptr, false);
  const Json algo_file = Json::parse(texts.algo.empty() ? "{}" : texts.algo, nullptr, false);
  if (whole.is_discarded() || algo_file.is_discarded()) {
    return has_exponent(texts.config + texts.algo);
  }
  const Json quantization = quantization_of(whole);
  const std::string method = text_of(quantization, "quant_method");
  const Json* const inner = member(algo_file, "quantization");
  const std::string algo = inner ? text_of(*inner, "quant_algo") : std::string();
  const std::string name(format.name());
  if (name == "w4afp8") return method == name || (method.empty() && algo == "MIXED_PRECISION");
  if (name == "compressed-tensors") {
    return method == name && has_int4_group(quantization, format.group_size());
  }
  if (name == "angelslim") return method == "w4a8_awq";
  if (name == "modelopt-w4a8-awq") {
    return algo == "W4A8_AWQ" || text_of(quantization, "quant_algo") == "W4A8_AWQ";
  }
  if (name == "fp8-block") return method == "fp8";
  return name == "bf16" && method.empty() && algo.empty();
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
