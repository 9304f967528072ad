// What config.json says and the tensors do not bear out. The tensors decide.
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/checkpoint_impl.h"
#include "checkpoint/formats/module_match.h"
#include "core/fail.h"

namespace sluice {
namespace {

using Warnings = std::vector<CheckpointWarning>;

bool is_prediction(const TensorRef& tensor) {
  const std::string& name = tensor.entry.name;
  return name.starts_with("mtp.") || name.find(".mtp.") != std::string::npos ||
         name.find("nextn") != std::string::npos;
}

void check_prediction_layers(const CheckpointData& data, Warnings& out) {
  const ModelConfig& config = data.config;
  if (config.num_prediction_layers == 0 || config.num_layers == 0) return;
  const bool has_layer = data.index.layers.rbegin()->first >= config.num_layers;
  if (has_layer || std::ranges::any_of(data.index.others, is_prediction)) return;
  out.push_back({.tensor = "config.json: num_nextn_predict_layers",
                 .text = fmt::format("{} prediction layers are announced, but the files have no "
                                     "layer {}",
                                     config.num_prediction_layers, config.num_layers),
                 .kind = "no-prediction-layer"});
}

/// Layers that the config has with routed experts, and the files without.
void check_missing_layers(const CheckpointData& data, Warnings& out) {
  const std::vector<int> expected = data.config.expected_layers();
  std::vector<int> missing;
  for (const int layer : expected) {
    if (!data.index.layers.contains(layer)) missing.push_back(layer);
  }
  if (missing.empty()) return;
  constexpr std::size_t kShown = 3;
  std::string list;
  for (std::size_t i = 0; i < std::min(missing.size(), kShown); ++i) {
    list += (i == 0 ? "" : ", ") + std::to_string(missing[i]);
  }
  if (missing.size() > kShown) list += fmt::format(" and {} more", missing.size() - kShown);
  const bool is_fused =
      std::ranges::any_of(missing, [&](int layer) { return data.index.fused.contains(layer); });
  out.push_back(
      {.tensor = "config.json",
       .text = fmt::format(
           "of its {} layers with routed experts, the files have {}; "
           "missing: {}{}",
           expected.size(), expected.size() - missing.size(), list,
           is_fused || !data.index.unread.empty() ? data.index.hint(missing.front()) : ""),
       .kind = "missing-layers",
       .count = static_cast<int>(missing.size())});
}

/// "...experts.0.gate_proj" of the layer's first expert, if its weight is as the format has it.
std::string quantized_module(const CheckpointData& data, const LayerTensors& layer) {
  const MatrixLayout gate = matrix_layouts(data.config.geometry)[0];
  const PartSpec weight = data.format->parts(gate)[0];
  const TensorRef* const tensor = layer.experts.front().find(weight.name);
  if (!tensor || std::ranges::find(weight.dtypes, tensor->entry.dtype) == weight.dtypes.end()) {
    return {};
  }
  const std::string& name = tensor->entry.name;
  return name.substr(0, name.rfind('.'));
}

/// quantized_module() of each layer that has one; none if the experts are floats.
std::vector<std::string> quantized_modules(const CheckpointData& data) {
  std::vector<std::string> modules;
  if (!data.format->weight_format()) return modules;
  for (const auto& [layer, tensors] : data.index.layers) {
    std::string module = quantized_module(data, tensors);
    if (!module.empty()) modules.push_back(std::move(module));
  }
  return modules;
}

/// One line, with the first entry and layer: a list may have hundreds of both.
void check_exclusions(const CheckpointData& data, const std::vector<std::string>& modules,
                      Warnings& out) {
  for (const std::string& entry : data.config.quantization.exclusions) {
    const auto at = std::ranges::find_if(
        modules, [&](const std::string& module) { return is_excluded(entry, module); });
    if (at == modules.end()) continue;
    out.push_back({.tensor = "config.json: quantization_config",
                   .text = fmt::format("the exclusion '{}' covers {}, which is quantized all the "
                                       "same; it is read as it is stored",
                                       entry, *at),
                   .kind = "excluded-experts"});
    return;
  }
}

bool may_target(const QuantizationGroup& group, const std::string& module) {
  return group.targets.empty() ||
         std::ranges::any_of(group.targets, [&](const std::string& target) {
           return sluice::may_target(target, module);
         });
}

/// compressed-tensors says which modules are quantized. One line, with the first layer's.
void check_targets(const CheckpointData& data, const std::vector<std::string>& modules,
                   Warnings& out) {
  const std::vector<QuantizationGroup>& groups = data.config.quantization.groups;
  if (groups.empty()) return;
  const auto at = std::ranges::find_if(modules, [&](const std::string& module) {
    return std::ranges::none_of(groups, [&](const auto& g) { return may_target(g, module); });
  });
  if (at == modules.end()) return;
  out.push_back({.tensor = "config.json: quantization_config",
                 .text = fmt::format("no targets of config_groups ('{}') cover {}, which is "
                                     "quantized all the same; it is read as it is stored",
                                     fmt::join(groups.front().targets, "', '"), *at),
                 .kind = "untargeted-experts"});
}

void check_unknown_keys(const CheckpointData& data, Warnings& out) {
  if (data.unknown_quantization_keys.empty()) return;
  out.push_back({.tensor = "config.json: quantization_config",
                 .text = fmt::format("keys that are not known, taken to say nothing of the "
                                     "experts' weights: {}",
                                     fmt::join(data.unknown_quantization_keys, ", ")),
                 .kind = "unknown-keys"});
}

/// Families whose experts are matrices gate, up and down, with an activation that
/// activation_config.h reads. Names of their members begin like this.
constexpr std::array<std::string_view, 26> kFamilies = {
    "bailing_", "deepseek",   "dots",    "ernie4_5", "exaone_moe", "gigachat", "glm",
    "gpt_oss",  "granitemoe", "hunyuan", "hy_v",     "jamba",      "kimi",     "ling",
    "llama4",   "longcat",    "mimo_",   "minimax",  "mixtral",    "moonshot", "olmoe",
    "phimoe",   "qwen2_moe",  "qwen3",   "solar_",   "step3"};

bool is_known_type(const std::string& type) {
  const std::vector<std::string> presets = preset_names();
  return std::ranges::find(presets, type) != presets.end() ||
         std::ranges::any_of(kFamilies, [&](std::string_view f) { return type.starts_with(f); });
}

/// The class Ernie4_5_MoeForCausalLM is of the family ernie4_5: without case and underscores.
bool is_known_class(const std::string& name) {
  const auto bare = [](std::string_view text) {
    std::string result;
    for (const char c : text) {
      if (c != '_') result += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
    return result;
  };
  return std::ranges::any_of(kFamilies,
                             [&](std::string_view f) { return bare(name).starts_with(bare(f)); });
}

/// The same words mean other functions in other models, so one that nobody knows is worth a line.
/// `architectures` names the code, and may be the only name there is.
void check_model(const CheckpointData& data, Warnings& out) {
  const std::string& type = data.config.language_type;
  const std::vector<std::string>& classes = data.config.architectures;
  const auto warn = [&](const char* key, const std::string& name) {
    out.push_back({.tensor = fmt::format("config.json: {}", key),
                   .text = fmt::format("'{}' is not known; its experts are taken to be gate, up "
                                       "and down with the activation {}",
                                       name, to_string(data.config.geometry.activation)),
                   .kind = "unknown-model"});
  };
  if (!type.empty() && !is_known_type(type)) {
    warn("model_type", type);
  } else if (!classes.empty() && std::ranges::none_of(classes, is_known_class)) {
    warn("architectures", classes.front());
  }
}

/// A layer multiplies its experts' outputs by the router's weights. Llama 4 does that to their
/// inputs, whatever config.json says, which is another function.
void check_router_weights(const CheckpointData& data, Warnings& out) {
  const std::string& type = data.config.language_type;
  if (!type.starts_with("llama4")) return;
  out.push_back({.tensor = "config.json: model_type",
                 .text = fmt::format("models of type '{}' multiply the experts' inputs by the "
                                     "router's weights, and a layer their outputs: hand over x "
                                     "times them, and weights of 1",
                                     type),
                 .kind = "weights-on-inputs"});
}

}  // namespace

std::vector<CheckpointWarning> config_warnings(const CheckpointData& data) {
  Warnings result = data.config.warnings;
  check_missing_layers(data, result);
  check_prediction_layers(data, result);
  const std::vector<std::string> modules = quantized_modules(data);
  check_exclusions(data, modules, result);
  check_targets(data, modules, result);
  check_unknown_keys(data, result);
  check_model(data, result);
  check_router_weights(data, result);
  return result;
}

}  // namespace sluice
