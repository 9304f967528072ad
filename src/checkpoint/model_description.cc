// A model by its config.json alone: the same reading as a checkpoint's, and the same verdicts.
#include <algorithm>

#include "checkpoint/formats/format.h"
#include "checkpoint/model_config.h"
#include "sluice/checkpoint.h"

namespace sluice {
namespace {

/// The gate of one expert as every format calls it. Formats decide by what the config declares; of
/// tensors they ask for the first one's name and dtype.
TensorIndex usual_names(const QuantizationConfig& config) {
  const bool is_declared = config.is_present || !config.algo.empty();
  const struct {
    const char *part, *dtype;
  } tensors[] = {{"gate_proj.weight", is_declared ? "I8" : "BF16"},
                 {"gate_proj.weight_packed", "I32"}};
  TensorIndex index;
  ExpertTensors& expert = index.layers[0].experts.emplace_back();
  for (const auto& [part, dtype] : tensors) {
    TensorRef tensor;
    tensor.entry.name = index.spelling.name(0, 0, part);
    tensor.entry.dtype = dtype;
    expert.parts.push_back({.name = part, .tensor = std::move(tensor)});
  }
  return index;
}

}  // namespace

ModelDescription describe_model(const std::filesystem::path& config_file) {
  ModelConfig config = read_model_config(config_file);
  const TensorIndex index = usual_names(config.quantization);
  const Recognised found =
      recognise({.config = config.quantization, .index = index, .geometry = config.geometry});
  check_widths(config, found.format->name(), found.format->group_size());
  ModelDescription model{.geometry = std::move(config.geometry),
                         .moe_layers = config.expected_layers(),
                         .activations = {},
                         .warnings = std::move(config.warnings)};
  model.geometry.group_size = found.format->group_size();
  model.geometry.has_bias = found.format->has_bias();
  if (const auto own = found.format->weight_format()) model.geometry.weight_format = *own;
  const auto add = [&](const ActivationFn& fn) {
    if (std::ranges::find(model.activations, fn) == model.activations.end()) {
      model.activations.push_back(fn);
    }
  };
  for (const int layer : model.moe_layers) add(config.activations.of(layer));
  if (model.moe_layers.empty()) std::ranges::for_each(config.activations.by_layer, add);
  return model;
}

}  // namespace sluice
