// config_keys.h - what Sluice knows of the keys of config.json, as a table.
//
//   key --config_key_kind()--> kCount, kScale, ... : read      (config_fields.cc, model_config.cc)
//                              kMustBeOff          : refused unless it is off
//                              kIrrelevant         : says nothing of routed experts
//                              kUnknown            : is_suspicious()? refused : a warning
//
// The table holds exact names: a key that would change results must not pass because it looks like
// one that does not.
#pragma once

#include <string>
#include <string_view>

namespace sluice {

enum class ConfigKeyKind {
  kHidden,         ///< Width of the model.
  kLatent,         ///< Width of the routed experts' inputs, where it is not the model's.
  kIntermediate,   ///< Width between gate, up and down.
  kDense,          ///< Width of dense layers: the experts' too, where no key gives theirs.
  kNumExperts,     ///< Routed experts of a layer.
  kNumTopk,        ///< Experts per token.
  kScale,          ///< Factor of the routed experts' sum.
  kNumLayers,      ///< Layers without those that only predict.
  kNumPrediction,  ///< Layers that only predict (MTP), behind the others.
  kFirstMoe,       ///< Dense layers at the beginning.
  kLayerStep,      ///< `moe_layer_freq`, `decoder_sparse_step`: a number, or a list of 0 and 1.
  kDenseLayers,    ///< A list of layers without experts.
  kLayerTypes,     ///< `mlp_layer_types`: "sparse" (with experts) or "dense", by layer.
  kLayerPattern,   ///< Says which layers have experts in a way that is not read.
  kActivation,     ///< `hidden_act` and what belongs to it.
  kMustBeOff,      ///< Would change results; must be null, false, 0, "none" or empty.
  kModelType,      ///< A name.
  kArchitectures,  ///< A list of names, of classes of code.
  kLanguage,       ///< An object: the language model's own config.
  kQuantization,   ///< quantization_config
  kExpertType,     ///< `expert_dtype`: DeepSeek-V4's experts beside fp8, "fp4" or "fp8".
  kIrrelevant,
  kUnknown,
};

[[nodiscard]] ConfigKeyKind config_key_kind(std::string_view key);

/// "n_routed_experts, num_experts, ...": the keys of a kind, for messages.
[[nodiscard]] std::string config_key_names(ConfigKeyKind kind);

/// True if the name of an unknown key sounds as though routed experts depended on it.
[[nodiscard]] bool is_suspicious(std::string_view key);

/// True of a JSON value that is the name of an activation other than SiLU: "gelu_pytorch_tanh".
[[nodiscard]] bool names_function(std::string_view value);

/// True of a JSON value that switches nothing on: null, false, 0, empty, "none".
[[nodiscard]] bool is_off(std::string_view value);
/// A JSON value for messages; long ones are cut.
[[nodiscard]] std::string shown_value(std::string_view value);

}  // namespace sluice
