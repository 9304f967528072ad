#include "checkpoint/model_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "checkpoint/config_fields.h"
#include "checkpoint/file_kind.h"
#include "core/fail.h"
#include "core/regular_file.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

using Kind = ConfigKeyKind;

/// Widths are multiples of this, the smallest group of weights. Those between the groups of
/// activations are padded with zeros; what a format's own groups need, check_widths() says.
constexpr int kWidthUnit = 32;
/// Far above any model there is; small enough that products of two sizes fit 64 bits.
constexpr int kMaxSize = 1 << 20;

/// A value and the key that gave it.
struct Named {
  std::string key;
  int value = 0;
};

Named checked(const ConfigFields& fields, const std::string& key, const ConfigNumbers& numbers,
              int low) {
  if (numbers.values.empty()) {
    fail(ErrorCode::kUnsupported, "{}: {} = [], which is no number", fields.file, key);
  }
  const std::uint64_t value = numbers.values.front();
  for (const std::uint64_t other : numbers.values) {
    if (other == value) continue;
    fail(ErrorCode::kUnsupported,
         "{}: {} holds {} and {}; experts of different sizes in one model are not supported",
         fields.file, key, value, other);
  }
  if (value < static_cast<std::uint64_t>(low)) {
    fail(ErrorCode::kUnsupported, "{}: {} = {} is outside [{}, {}]", fields.file, key, value, low,
         kMaxSize);
  }
  if (value > kMaxSize) {
    fail(ErrorCode::kUnsupported, "{}: {} = {} is above {}, the largest supported", fields.file,
         key, value, kMaxSize);
  }
  return {key, static_cast<int>(value)};
}

/// The same number may have several names; those that are present must agree.
std::optional<Named> agreed(const ConfigFields& fields, Kind kind, int low) {
  const auto at = fields.numbers.find(kind);
  if (at == fields.numbers.end()) return std::nullopt;
  std::optional<Named> found;
  for (const auto& [key, numbers] : at->second) {
    const Named here = checked(fields, key, numbers, low);
    if (found && found->value != here.value) {
      fail(ErrorCode::kUnsupported, "{}: {} = {} contradicts {} = {}", fields.file, here.key,
           here.value, found->key, found->value);
    }
    if (!found) found = here;
  }
  return found;
}

Named required(const ConfigFields& fields, Kind kind, const char* what) {
  if (const auto found = agreed(fields, kind, 1)) return *found;
  std::string unknown;  // One of them may be an object that has the key.
  for (const std::string& key : fields.unknown) unknown += (unknown.empty() ? "" : ", ") + key;
  fail(ErrorCode::kUnsupported, "{}: no key gives {}; the names known are {}{}", fields.file, what,
       config_key_names(kind),
       unknown.empty() ? "" : "; keys that are not known, nor looked into: " + unknown);
}

int next_multiple(int value, int unit) {
  return (value + unit - 1) / unit * unit;
}

[[noreturn]] void refuse_width(const std::string& file, const Named& named, int unit,
                               std::string_view whose) {
  fail(ErrorCode::kUnsupported,
       "{}: {} = {} is not a multiple of {}, as {} need it; pad the experts' tensors with zero "
       "channels to {}",
       file, named.key, named.value, unit, whose, next_multiple(named.value, unit));
}

Named width(const ConfigFields& fields, const Named& named) {
  if (named.value % kWidthUnit != 0) refuse_width(fields.file, named, kWidthUnit, "scales");
  return named;
}

/// Width of the experts' inputs and outputs.
Named hidden_width(const ConfigFields& fields, ModelConfig& config) {
  const Named hidden = required(fields, Kind::kHidden, "the width");
  const std::optional<Named> latent = agreed(fields, Kind::kLatent, 1);
  if (!latent) return width(fields, hidden);
  config.warnings.push_back(
      {.tensor = "config.json: " + latent->key,
       .text = fmt::format("latent: {} of {}; the experts see the narrow rows, and projecting the "
                           "model's to them and back is the caller's",
                           latent->value, hidden.value),
       .kind = "latent-width",
       .is_note = true});
  return width(fields, *latent);
}

/// The experts' own width, or that of dense layers in models that have no others (Mixtral).
Named intermediate_width(const ConfigFields& fields) {
  if (const auto own = agreed(fields, Kind::kIntermediate, 1)) return width(fields, *own);
  if (const auto dense = agreed(fields, Kind::kDense, 1)) return width(fields, *dense);
  fail(ErrorCode::kUnsupported, "{}: no key gives the experts' width; the names known are {}, {}",
       fields.file, config_key_names(Kind::kIntermediate), config_key_names(Kind::kDense));
}

float scaling_factor(const ConfigFields& fields) {
  std::optional<std::pair<std::string, double>> found;
  for (const auto& [key, factor] : fields.scales) {
    if (!(factor > 0) || !std::isfinite(static_cast<float>(factor))) {
      fail(ErrorCode::kUnsupported, "{}: {} = {} is not a positive float32", fields.file, key,
           factor);
    }
    if (found && found->second != factor) {
      fail(ErrorCode::kUnsupported, "{}: {} = {} contradicts {} = {}", fields.file, key, factor,
           found->first, found->second);
    }
    found = {key, factor};
  }
  return found ? static_cast<float>(found->second) : 1.0f;
}

/// Configs of DeepSeek have a factor from V2 on.
void note_missing_factor(const ConfigFields& fields, ModelConfig& config) {
  constexpr std::string_view kFamily = "deepseek_v";
  const std::string& type = fields.model_type;
  const bool has_key = type.starts_with(kFamily) && type.size() > kFamily.size() &&
                       type[kFamily.size()] >= '2' && type[kFamily.size()] <= '9';
  if (!has_key || !fields.scales.empty()) return;
  config.warnings.push_back(
      {.tensor = "config.json",
       .text = fmt::format("no routed_scaling_factor, which {} defines; taken as 1", type),
       .kind = "no-scaling-factor",
       .is_note = true});
}

void read_geometry(const ConfigFields& fields, ModelConfig& config) {
  const Named experts = required(fields, Kind::kNumExperts, "the number of routed experts");
  const Named topk = required(fields, Kind::kNumTopk, "the experts per token");
  config.geometry = {.name = fields.model_type.empty() ? "unnamed" : fields.model_type,
                     .num_experts = experts.value,
                     .num_topk = topk.value,
                     .routed_scaling_factor = scaling_factor(fields)};
  note_missing_factor(fields, config);
  const Named hidden = hidden_width(fields, config), inner = intermediate_width(fields);
  config.geometry.set_widths(hidden.value, inner.value);
  config.hidden_key = hidden.key, config.intermediate_key = inner.key;
  if (topk.value > experts.value) {
    fail(ErrorCode::kUnsupported, "{}: {} = {} is above the {} experts there are", fields.file,
         topk.key, topk.value, experts.value);
  }
}

std::vector<int> small_numbers(const ConfigFields& fields, const std::string& key,
                               const ConfigNumbers& numbers) {
  std::vector<int> result;
  for (const std::uint64_t value : numbers.values) {
    if (value > kMaxSize) {
      fail(ErrorCode::kUnsupported, "{}: {} holds {}, above {}", fields.file, key, value, kMaxSize);
    }
    result.push_back(static_cast<int>(value));
  }
  return result;
}

/// Which layers should have experts. The files decide; what differs from this is a warning.
void read_layers(const ConfigFields& fields, ModelConfig& config) {
  config.layer_types = fields.layer_types;
  config.has_layer_pattern = fields.has_layer_pattern;
  const auto value = [&](Kind kind, int low) {
    const auto found = agreed(fields, kind, low);
    return found ? found->value : 0;
  };
  config.num_layers = value(Kind::kNumLayers, 1);
  config.num_prediction_layers = value(Kind::kNumPrediction, 0);
  config.first_k_dense_replace = value(Kind::kFirstMoe, 0);
  if (const auto at = fields.numbers.find(Kind::kLayerStep); at != fields.numbers.end()) {
    const auto& [key, numbers] = *at->second.begin();
    config.step_key = key;
    config.layer_step = small_numbers(fields, key, numbers);
    config.is_step_list = numbers.is_list;
    if (!numbers.is_list && config.layer_step.front() == 0) {
      fail(ErrorCode::kUnsupported, "{}: {} = 0 is outside [1, {}]", fields.file, key, kMaxSize);
    }
  }
  if (const auto at = fields.numbers.find(Kind::kDenseLayers); at != fields.numbers.end()) {
    const auto& [key, numbers] = *at->second.begin();
    config.dense_layers = small_numbers(fields, key, numbers);
  }
}

/// The geometry has that of the first layer with experts, as far as the config tells.
void read_layer_activations(const ConfigFields& fields, ModelConfig& config) {
  config.activations = read_activations(fields, config.num_layers);
  int first = 0;
  while (first + 1 < config.num_layers && !config.dense_reason(first).empty()) ++first;
  config.geometry.activation = config.activations.of(first);
}

void warn_of_unknown(const ConfigFields& fields, ModelConfig& config) {
  if (fields.unknown.empty()) return;
  std::string list;
  for (const std::string& key : fields.unknown) list += (list.empty() ? "" : ", ") + key;
  config.warnings.push_back(
      {.tensor = "config.json",
       .text =
           fmt::format("keys that are not known, taken to say nothing of routed experts: {}", list),
       .kind = "unknown-keys"});
}

}  // namespace

std::string ModelConfig::dense_reason(int layer) const {
  if (layer < first_k_dense_replace) {
    return fmt::format("first_k_dense_replace = {}", first_k_dense_replace);
  }
  if (std::ranges::find(dense_layers, layer) != dense_layers.end()) {
    return fmt::format("mlp_only_layers holds {}", layer);
  }
  const auto at = static_cast<std::size_t>(layer);
  if (at < layer_types.size() && layer_types[at] != "sparse") {
    return fmt::format("mlp_layer_types [{}] = {}", layer, layer_types[at]);
  }
  if (is_step_list) {
    if (at >= layer_step.size() || layer_step[at] != 0) return {};
    return fmt::format("{} [{}] = 0", step_key, layer);
  }
  if (layer_step.empty() || layer_step.front() <= 1) return {};
  // moe_layer_freq counts from layer 0, the others from layer 1.
  const int step = layer_step.front(), position = step_key == "moe_layer_freq" ? layer : layer + 1;
  return position % step == 0 ? std::string() : fmt::format("{} = {}", step_key, step);
}

std::vector<int> ModelConfig::expected_layers() const {
  std::vector<int> layers;
  for (int l = 0; l < num_layers && !has_layer_pattern; ++l) {
    if (dense_reason(l).empty()) layers.push_back(l);
  }
  return layers;
}

ModelConfig parse_model_config(const ConfigText& text, const std::optional<ConfigText>& algo) {
  ModelConfig config;
  config.text = text.text;
  check_is_json(text.text, text.name);
  ConfigFields fields = read_config_fields(text.text, text.name);
  if (algo) {
    check_is_json(algo->text, algo->name);
    read_algo_config(algo->text, algo->name, fields.quantization);
    config.text += algo->text;
  }
  read_geometry(fields, config);
  read_layers(fields, config);
  read_layer_activations(fields, config);
  warn_of_unknown(fields, config);
  config.language_type = fields.language_type;
  config.architectures = fields.architectures;
  config.quantization = std::move(fields.quantization);
  // DeepSeek-V4.1 has the key in its quantization_config.
  if (config.quantization.expert_type.empty()) {
    config.quantization.expert_type = std::move(fields.expert_type);
    config.quantization.expert_key = "expert_dtype";
  } else if (!fields.expert_type.empty() && fields.expert_type != config.quantization.expert_type) {
    fail(ErrorCode::kUnsupported,
         "{}: expert_dtype = '{}', but quantization_config.expert_dtype = '{}'", text.name,
         fields.expert_type, config.quantization.expert_type);
  }
  return config;
}

void check_widths(const ModelConfig& config, std::string_view format, int group_size) {
  const ModelGeometry& g = config.geometry;
  for (const Named& named : {Named{config.hidden_key, g.token_width()},
                             Named{config.intermediate_key, g.inner_width()}}) {
    if (named.value % group_size == 0) continue;
    refuse_width(config.quantization.file, named, group_size, fmt::format("{}'s scales", format));
  }
}

ModelConfig read_model_config(const std::filesystem::path& file) {
  const auto algo_file = file.parent_path() / "hf_quant_config.json";
  const std::string text = read_text(file);
  std::error_code ignored;
  if (!std::filesystem::exists(algo_file, ignored)) {
    return parse_model_config({.text = text, .name = file.string()}, std::nullopt);
  }
  const std::string algo = read_text(algo_file);
  return parse_model_config({.text = text, .name = file.string()},
                            ConfigText{.text = algo, .name = algo_file.string()});
}

}  // namespace sluice
