#include "checkpoint/config_fields.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "checkpoint/json_reader.h"
#include "core/fail.h"

namespace sluice {
namespace {

using Kind = ConfigKeyKind;
using Json = JsonReader::Kind;

std::uint64_t read_whole_number(JsonReader& json, const std::string& key, const std::string& file) {
  constexpr const char* kDescription = "a whole number in [0, 2^64)";
  require_kind(json, Json::kNumber, kDescription, key, file);
  const std::string_view text = json.raw();
  std::uint64_t value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc{} || end != text.data() + text.size()) {
    fail(ErrorCode::kUnsupported, "{}: {} = {} is not {}", file, key, shown_value(text),
         kDescription);
  }
  return value;
}

ConfigNumbers read_numbers(JsonReader& json, const std::string& key, const std::string& file) {
  ConfigNumbers numbers;
  numbers.is_list = json.peek() == Json::kArray;
  if (numbers.is_list) {
    json.array([&] { numbers.values.push_back(read_whole_number(json, key, file)); });
  } else {
    numbers.values.push_back(read_whole_number(json, key, file));
  }
  return numbers;
}

/// Of these no model gives a list, by layer or by sense.
bool has_one_number(Kind kind) {
  return kind == Kind::kHidden || kind == Kind::kLatent || kind == Kind::kNumLayers;
}

std::vector<std::string> read_names(JsonReader& json, const std::string& key,
                                    const std::string& file) {
  constexpr const char* kDescription = "a list of names";
  std::vector<std::string> names;
  require_kind(json, Json::kArray, kDescription, key, file);
  json.array([&] {
    require_kind(json, Json::kString, kDescription, key, file);
    names.push_back(json.string());
  });
  return names;
}

/// Only looked at for a warning, so nothing about it is refused.
void read_architectures(JsonReader& json, std::vector<std::string>& out) {
  if (json.peek() != Json::kArray) return json.skip();
  json.array([&] {
    if (json.peek() != Json::kString) return json.skip();
    out.push_back(json.string());
  });
}

/// What a model with other senses says of its language model.
void merge(ConfigFields&& inner, ConfigFields& out) {
  for (auto& [kind, keys] : inner.numbers) {
    for (auto& [key, numbers] : keys) out.numbers[kind][key] = std::move(numbers);
  }
  for (const auto& [key, value] : inner.scales) out.scales[key] = value;
  for (auto& [key, value] : inner.activation) {
    if (value != "null" || !out.activation.contains(key)) out.activation[key] = std::move(value);
  }
  if (!inner.layer_types.empty()) out.layer_types = std::move(inner.layer_types);
  out.has_layer_pattern |= inner.has_layer_pattern;
  if (!inner.model_type.empty()) out.language_type = inner.model_type;
  if (out.model_type.empty()) out.model_type = std::move(inner.model_type);
  out.architectures = std::move(inner.architectures);
  if (!inner.expert_type.empty()) out.expert_type = std::move(inner.expert_type);
  for (std::string& key : inner.unknown) {
    if (std::ranges::find(out.unknown, key) == out.unknown.end()) {
      out.unknown.push_back(std::move(key));
    }
  }
  if (!inner.quantization.is_present) return;
  if (out.quantization.is_present) {
    if (const auto found = contradiction(out.quantization, inner.quantization)) {
      fail(ErrorCode::kUnsupported,
           "{}: quantization_config.{} = {}, but the language model's quantization_config has {}",
           out.file, found->field, found->first, found->second);
    }
  }
  for (OtherKey& other : out.quantization.others) {
    inner.quantization.others.push_back(std::move(other));
  }
  out.quantization = std::move(inner.quantization);
}

/// A key that the table does not have, or one that is only good while it is off.
void read_other(JsonReader& json, const std::string& key, Kind kind, ConfigFields& fields) {
  const std::string_view value = json.raw();
  if (kind == Kind::kMustBeOff) {
    if (is_off(value)) return;
    fail(ErrorCode::kUnsupported,
         "{}: {} = {} would change what routed experts compute, and is not supported", fields.file,
         key, shown_value(value));
  }
  const bool is_function = names_function(value);
  if (!is_suspicious(key) && !is_function) {
    fields.unknown.push_back(key);
    return;
  }
  fail(ErrorCode::kUnsupported,
       "{}: {} = {}: the key is not known, and its {} sounds as though it changes what routed "
       "experts compute; remove it if it does not",
       fields.file, key, shown_value(value), is_function ? "value" : "name");
}

ConfigFields read_object(JsonReader& json, const std::string& file, bool is_inner) {
  ConfigFields fields;
  fields.file = file;
  fields.quantization.file = file;
  std::vector<ConfigFields> inner;
  json.object([&](const std::string& key) {
    if (json.peek() == Json::kNull) {
      // That there is no limit is something else than nothing about it.
      if (key == "swiglu_limit" || key == "swiglu_limits") fields.activation[key] = "null";
      return json.skip();
    }
    switch (const Kind kind = config_key_kind(key); kind) {
      case Kind::kScale:
        require_kind(json, Json::kNumber, "a number", key, file);
        fields.scales[key] = json.number();
        return;
      case Kind::kActivation:
        fields.activation[key] = std::string(json.raw());
        return;
      case Kind::kLayerTypes:
        fields.layer_types = read_names(json, key, file);
        return;
      case Kind::kLayerPattern:
        fields.has_layer_pattern = true;
        return json.skip();
      case Kind::kModelType:
        require_kind(json, Json::kString, "a name", key, file);
        fields.model_type = fields.language_type = json.string();
        return;
      case Kind::kArchitectures:
        return read_architectures(json, fields.architectures);
      case Kind::kQuantization:
        require_kind(json, Json::kObject, "an object", key, file);
        return read_quantization_config(json, fields.quantization);
      case Kind::kExpertType:
        require_kind(json, Json::kString, "a name", key, file);
        fields.expert_type = json.string();
        if (fields.expert_type.empty()) {
          fail(ErrorCode::kUnsupported, "{}: {} = '' is not 'fp4' or 'fp8'", file, key);
        }
        return;
      case Kind::kLanguage:
        // A language model has no language model of its own.
        if (is_inner) return json.skip();
        require_kind(json, Json::kObject, "an object", key, file);
        inner.push_back(read_object(json, file, true));
        return;
      case Kind::kIrrelevant:
        return json.skip();
      case Kind::kMustBeOff:
      case Kind::kUnknown:
        return read_other(json, key, kind, fields);
      default:
        if (has_one_number(kind) && json.peek() == Json::kArray) {
          require_kind(json, Json::kNumber, "a number", key, file);
        }
        fields.numbers[kind][key] = read_numbers(json, key, file);
    }
  });
  for (ConfigFields& each : inner) merge(std::move(each), fields);
  return fields;
}

}  // namespace

void require_kind(JsonReader& json, JsonReader::Kind wanted, const char* description,
                  std::string_view key, std::string_view file) {
  if (json.peek() == wanted) return;
  fail(ErrorCode::kUnsupported, "{}: {} = {} is not {}", file, key, shown_value(json.raw()),
       description);
}

ConfigFields read_config_fields(std::string_view text, const std::string& file) {
  JsonReader json(text, file, JsonReader::Dialect::kPython);
  ConfigFields fields = read_object(json, file, false);
  json.finish();
  return fields;
}

}  // namespace sluice
