#include "checkpoint/activation_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <set>
#include <string_view>

#include "checkpoint/json_reader.h"
#include "core/fail.h"

namespace sluice {
namespace {

using Json = JsonReader::Kind;

/// Functions as models name them.
enum class FunctionName { kSilu, kSwigluOai, kSitu };

constexpr std::array<std::string_view, 8> kFunctionKeys = {
    "hidden_act", "hidden_activation", "mlp_hidden_act",      "moe_hidden_act",
    "act_fn",     "activation",        "activation_function", "activation_func"};

/// gpt-oss has no key for it; its model code does.
constexpr float kGptOssAlpha = 1.702f;

/// Where a limit acts, by the beginning of the model type.
constexpr std::array<std::string_view, 3> kBeforeSilu = {"deepseek", "glm", "hy_v4"};
constexpr std::array<std::string_view, 2> kAfterSilu = {"step3p", "bailing"};
/// Whose model code has a limit where config.json has no key for it.
constexpr std::array<std::string_view, 5> kLimitByDefault = {"deepseek_v4", "glm5_next", "hy_v4",
                                                             "minimax_m3", "openai_privacy_filter"};

/// Whose model code has another function than SiLU where config.json names none.
constexpr std::array<std::string_view, 4> kNotSiluByDefault = {"gemma4", "diffusion_gemma", "grok",
                                                               "nemotron_h"};

template <class List>
bool begins_with_any(std::string_view text, const List& list) {
  return std::ranges::any_of(list, [&](std::string_view one) { return text.starts_with(one); });
}

std::optional<FunctionName> function_named(std::string_view name) {
  if (name == "silu" || name == "swish" || name == "swiglu") return FunctionName::kSilu;
  if (name == "swigluoai") return FunctionName::kSwigluOai;
  if (name == "situ") return FunctionName::kSitu;
  return std::nullopt;
}

/// A limit for each layer, or a single one for all; 0: none.
struct Limits {
  std::string key;
  std::vector<float> values = {0};
  bool is_list = false;

  [[nodiscard]] bool any() const {
    return std::ranges::any_of(values, [](float value) { return value > 0; });
  }
};

/// The keys of one config.json, each read at most once. What is left over is refused.
class ActivationKeys {
 public:
  explicit ActivationKeys(const ConfigFields& fields) : fields_(fields) {}

  [[nodiscard]] FunctionName function() {
    std::string first;
    std::optional<FunctionName> found;
    for (const std::string_view key : kFunctionKeys) {
      const std::string* const value = take(key);
      if (value == nullptr || (key != "hidden_act" && is_off(*value))) continue;
      JsonReader json = reader(key, *value);
      require_kind(json, Json::kString, "a name", key, fields_.file);
      const std::string name = json.string();
      const std::optional<FunctionName> here = function_named(name);
      if (!here) refuse(key, name, "is not silu, swigluoai or situ, the functions there are");
      if (found && *found != *here) {
        fail(ErrorCode::kUnsupported, "{}: {} = {} contradicts {}", fields_.file, key, name, first);
      }
      found = here;
      first = fmt::format("{} = {}", key, name);
    }
    if (!found && begins_with_any(fields_.language_type, kNotSiluByDefault)) {
      fail(ErrorCode::kUnsupported,
           "{}: hidden_act is not given, and models of type '{}' then have another function than "
           "silu by their own code: name it",
           fields_.file, fields_.language_type);
    }
    return found.value_or(FunctionName::kSilu);
  }

  /// swiglu_limit or swiglu_limits.
  [[nodiscard]] Limits limits() {
    Limits found;
    for (const std::string_view key : {"swiglu_limit", "swiglu_limits"}) {
      const std::string* const value = take(key);
      if (value == nullptr || is_off(*value)) continue;
      const Limits here = read_limits(key, *value);
      if (!found.key.empty() && (here.values != found.values || here.is_list != found.is_list)) {
        fail(ErrorCode::kUnsupported, "{}: {} = {} contradicts {}", fields_.file, key, *value,
             found.key);
      }
      found = here;
    }
    return found;
  }

  /// A positive number, if the key is there.
  [[nodiscard]] std::optional<float> number(std::string_view key) {
    const std::string* const value = take(key);
    if (value == nullptr) return std::nullopt;
    JsonReader json = reader(key, *value);
    const float number = read_float(key, json);
    if (number == 0) {
      fail(ErrorCode::kUnsupported, "{}: {} = {} must be above 0", fields_.file, key, *value);
    }
    return number;
  }

  [[nodiscard]] float required(std::string_view key, std::string_view function) {
    if (const auto value = number(key)) return *value;
    fail(ErrorCode::kUnsupported, "{}: the activation {} needs {}, which is not given",
         fields_.file, function, key);
  }

  /// Of every key that nobody took.
  void refuse_rest(std::string_view function) const {
    for (const auto& [key, value] : fields_.activation) {
      if (taken_.contains(key) || is_off(value)) continue;
      if (function == "silu" && names_silu(value)) continue;
      if (key.find("swiglu_limit") != std::string::npos &&
          begins_with_any(fields_.language_type, kAfterSilu)) {
        refuse_after_silu(key, value);
      }
      refuse(key, value,
             fmt::format("is not known to go with the activation {}, and not supported", function));
    }
  }

  [[noreturn]] void refuse_after_silu(std::string_view key, std::string_view value) const {
    refuse(key, value,
           fmt::format("limits the experts of {} after SiLU: min(silu(gate), L) clamp(up, -L, L) "
                       "is another function than those there are",
                       fields_.language_type));
  }

  [[noreturn]] void refuse(std::string_view key, std::string_view value,
                           std::string_view why) const {
    constexpr std::size_t kMaxLength = 60;
    fail(ErrorCode::kUnsupported, "{}: {} = {}{} {}", fields_.file, key,
         value.substr(0, kMaxLength), value.size() > kMaxLength ? "..." : "", why);
  }

 private:
  [[nodiscard]] JsonReader reader(std::string_view key, std::string_view value) const {
    return {value, fmt::format("{}: {}", fields_.file, key), JsonReader::Dialect::kPython};
  }

  [[nodiscard]] const std::string* take(std::string_view key) {
    const auto at = fields_.activation.find(std::string(key));
    if (at == fields_.activation.end()) return nullptr;
    taken_.insert(at->first);
    return &at->second;
  }

  /// false, 0, nothing, or a list of nothing but that.
  [[nodiscard]] bool is_off(std::string_view value) const {
    if (value == "false" || value == "null" || value == "{}" || value == "\"\"" ||
        value == "\"none\"" || value == "\"None\"") {
      return true;
    }
    JsonReader json(value, fields_.file, JsonReader::Dialect::kPython);
    switch (json.peek()) {
      case Json::kNumber:
        return json.number() == 0;
      case Json::kArray: {
        bool all = true;
        json.array([&] { all &= is_off(json.raw()); });
        return all;
      }
      default:
        return false;
    }
  }

  [[nodiscard]] bool names_silu(std::string_view value) const {
    JsonReader json(value, fields_.file, JsonReader::Dialect::kPython);
    return json.peek() == Json::kString && function_named(json.string()) == FunctionName::kSilu;
  }

  [[nodiscard]] Limits read_limits(std::string_view key, const std::string& value) const {
    JsonReader json = reader(key, value);
    Limits limits{.key = std::string(key), .values = {}, .is_list = json.peek() == Json::kArray};
    const auto read = [&] {
      const bool is_null = json.peek() == Json::kNull;
      if (is_null) json.skip();
      limits.values.push_back(is_null ? 0 : read_float(key, json));
    };
    limits.is_list ? json.array(read) : read();
    return limits;
  }

  /// 0 stays 0; everything else must be above it in float32 as well.
  [[nodiscard]] float read_float(std::string_view key, JsonReader& json) const {
    require_kind(json, Json::kNumber, "a number", key, fields_.file);
    const double value = json.number();
    const auto narrow = static_cast<float>(value);
    if (!(value >= 0) || !std::isfinite(narrow) || (narrow == 0) != (value == 0)) {
      fail(ErrorCode::kUnsupported, "{}: {} = {} is no float32 of 0 or above", fields_.file, key,
           value);
    }
    return narrow;
  }

  const ConfigFields& fields_;
  std::set<std::string> taken_;
};

ActivationFn with_limit(float limit) {
  if (limit == 0) return {ActivationKind::kSwiglu};
  return {.kind = ActivationKind::kSwigluLimit, .limit = limit};
}

/// Throws: kUnsupported for a model whose code has a limit that config.json says nothing of.
void require_limit(const ConfigFields& fields) {
  if (!begins_with_any(fields.language_type, kLimitByDefault) ||
      fields.activation.contains("swiglu_limit") || fields.activation.contains("swiglu_limits")) {
    return;
  }
  fail(ErrorCode::kUnsupported,
       "{}: swiglu_limit is not given, and models of type '{}' then have one by their own code: "
       "set it, to 0 if there is none",
       fields.file, fields.language_type);
}

/// SiLU as the model type means it.
void read_silu(const ConfigFields& fields, ActivationKeys& keys, LayerActivations& out) {
  const Limits limits = keys.limits();
  if (limits.any() && !begins_with_any(fields.language_type, kBeforeSilu)) {
    const std::string& value = fields.activation.at(limits.key);
    if (begins_with_any(fields.language_type, kAfterSilu))
      keys.refuse_after_silu(limits.key, value);
    keys.refuse(limits.key, value,
                fmt::format("is a limit before SiLU in models of type deepseek*, glm* and hy_v4*; "
                            "what it is in those of type '{}' is not known",
                            fields.language_type));
  }
  out.by_layer.clear();
  for (const float limit : limits.values) out.by_layer.push_back(with_limit(limit));
  if (limits.is_list && limits.any()) out.list_key = limits.key;
}

void read_swiglu_oai(const ConfigFields& fields, ActivationKeys& keys, std::optional<float> alpha,
                     LayerActivations& out) {
  if (const auto given = keys.number("swiglu_alpha")) alpha = given;
  if (!alpha) alpha = keys.required("swiglu_alpha", "swigluoai");
  if (const auto beta = keys.number("swiglu_beta"); beta && *beta != 1) {
    keys.refuse("swiglu_beta", fields.activation.at("swiglu_beta"),
                "is not 1, the only number that up is raised by here");
  }
  const Limits limits = keys.limits();
  out.by_layer.clear();
  for (const float limit : limits.values) {
    if (limit == 0) {
      fail(ErrorCode::kUnsupported, "{}: the activation swigluoai needs a swiglu_limit above 0{}",
           fields.file, limits.is_list ? " for every layer" : "");
    }
    out.by_layer.push_back({.kind = ActivationKind::kSwigluOai, .limit = limit, .alpha = *alpha});
  }
  if (limits.is_list) out.list_key = limits.key;
}

void read_situ(ActivationKeys& keys, LayerActivations& out) {
  const float beta = keys.required("activation_situ_beta", "situ");
  const float linear_beta = keys.required("activation_situ_linear_beta", "situ");
  out.by_layer = {{.kind = ActivationKind::kSitu, .beta = beta, .linear_beta = linear_beta}};
}

}  // namespace

const ActivationFn& LayerActivations::of(int layer) const {
  if (list_key.empty()) return by_layer.front();
  if (layer < 0 || static_cast<std::size_t>(layer) >= by_layer.size()) {
    fail(ErrorCode::kUnsupported, "{}: {} has {} numbers, none for layer {}", file, list_key,
         by_layer.size(), layer);
  }
  return by_layer[static_cast<std::size_t>(layer)];
}

LayerActivations read_activations(const ConfigFields& fields, int num_layers) {
  ActivationKeys keys(fields);
  LayerActivations out{.by_layer = {ActivationFn{}}, .list_key = {}, .file = fields.file};
  switch (keys.function()) {
    case FunctionName::kSilu:
      if (fields.language_type == "gpt_oss") {
        read_swiglu_oai(fields, keys, kGptOssAlpha, out);
        keys.refuse_rest("swigluoai");
      } else {
        read_silu(fields, keys, out);
        keys.refuse_rest("silu");
        require_limit(fields);
      }
      break;
    case FunctionName::kSwigluOai:
      read_swiglu_oai(fields, keys, std::nullopt, out);
      keys.refuse_rest("swigluoai");
      break;
    case FunctionName::kSitu:
      read_situ(keys, out);
      keys.refuse_rest("situ");
      break;
  }
  if (!out.list_key.empty() && out.by_layer.size() < static_cast<std::size_t>(num_layers)) {
    fail(ErrorCode::kUnsupported, "{}: {} has {} numbers for {} layers", fields.file, out.list_key,
         out.by_layer.size(), num_layers);
  }
  return out;
}

}  // namespace sluice
