// model_config.h - what config.json and hf_quant_config.json say about a checkpoint.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/activation_config.h"
#include "checkpoint/formats/quantization_config.h"
#include "sluice/checkpoint.h"

namespace sluice {

/// A file in memory; `name` is for messages.
struct ConfigText {
  std::string_view text;
  std::string name;
};

struct ModelConfig {
  ModelGeometry geometry;
  std::string hidden_key, intermediate_key;  ///< Which keys gave the experts' widths.
  int num_layers = 0;                        ///< 0 if not given.
  int num_prediction_layers = 0;             ///< Announced behind the others (MTP).
  int first_k_dense_replace = 0;             ///< Layers below this have no routed experts.
  LayerActivations activations;
  QuantizationConfig quantization;
  std::string language_type;  ///< model_type of the language model; empty if not given.
  std::vector<std::string> architectures;   ///< Of the language model; empty if not given.
  std::vector<CheckpointWarning> warnings;  ///< `tensor` is "config.json: KEY".
  std::string text;  ///< The bytes of the files read, for Checkpoint::identity().

  /// Why the config has a layer below num_layers without routed experts: "decoder_sparse_step = 2";
  /// empty if it expects them there.
  [[nodiscard]] std::string dense_reason(int layer) const;
  /// The layers that should have routed experts, ascending; empty if the config does not tell.
  [[nodiscard]] std::vector<int> expected_layers() const;

  /// Keys of which layers have experts, as written.
  std::string step_key;         ///< "moe_layer_freq" or one of its kin; empty if there is none.
  std::vector<int> layer_step;  ///< One number, or 0 and 1 by layer.
  bool is_step_list = false;
  std::vector<int> dense_layers;         ///< mlp_only_layers
  std::vector<std::string> layer_types;  ///< mlp_layer_types
  bool has_layer_pattern = false;        ///< A key says more, in a way that is not read.
};

/// `algo` is hf_quant_config.json, where there is one. Throws: kCorruptFile (not JSON),
/// kUnsupported (a field of the wrong kind or of no sense, a size or key that is not handled, a
/// size that no known key gives, two fields that contradict each other). The geometry's group_size
/// is for the format to say.
[[nodiscard]] ModelConfig parse_model_config(const ConfigText& config,
                                             const std::optional<ConfigText>& algo);

/// parse_model_config() of `file`, a model's config.json, and of the hf_quant_config.json beside
/// it. Throws: the same, and kIo (no such file).
[[nodiscard]] ModelConfig read_model_config(const std::filesystem::path& file);

/// That weights in groups of `group_size`, as `format` has them, fill the model's own widths.
/// Throws: kUnsupported naming key, value and unit.
void check_widths(const ModelConfig& config, std::string_view format, int group_size);

}  // namespace sluice
