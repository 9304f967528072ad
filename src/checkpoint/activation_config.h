// activation_config.h - the activation function of each layer, from the keys of config.json.
//
//   hidden_act and its other names       silu (swish, swiglu), swigluoai or situ; absent: silu
//   swiglu_limit, swiglu_limits          for all layers, or a list by layer; 0 or null: no limit
//   swiglu_alpha, swiglu_beta            of swigluoai; beta is what up is raised by, and must be 1
//   activation_situ_beta, .._linear_beta of situ
//
// Models use the same words for different functions, so the model type counts too:
//
//   gpt_oss           silu means swigluoai with alpha 1.702 (its config.json has no key for alpha)
//   deepseek*, glm*   a limit acts before SiLU: kSwigluLimit
//   any other         a limit with silu is refused; of step3p* and bailing* (Ling) it is known to
//                     act after SiLU, which is another function
//
// Every key here that is not understood is refused with its value, unless it is off.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/config_fields.h"
#include "sluice/activation.h"

namespace sluice {

struct LayerActivations {
  std::vector<ActivationFn> by_layer;  ///< One for each layer, or a single one for all.
  std::string list_key;                ///< The key that holds a list by layer; empty: none does.
  std::string file;

  /// Throws: kUnsupported for a layer behind the end of the list.
  [[nodiscard]] const ActivationFn& of(int layer) const;
};

/// Throws: kUnsupported (a function that is not there, a key that is not understood, two keys that
/// contradict each other, a list that is shorter than `num_layers`, where 0 is not known, a value
/// of the wrong kind or out of range).
[[nodiscard]] LayerActivations read_activations(const ConfigFields& fields, int num_layers);

}  // namespace sluice
