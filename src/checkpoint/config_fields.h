// config_fields.h - config.json as it stands: the keys that matter, each with the spelling it has.
//
//   {"hidden_size": .., "text_config": {..}} --read_config_fields()--> ConfigFields
//
// A nested language model's config takes precedence, key by key. null is the same as absent.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/config_keys.h"
#include "checkpoint/formats/quantization_config.h"
#include "checkpoint/json_reader.h"

namespace sluice {

/// A number, or a list of them (by layer, or by sense of a model).
struct ConfigNumbers {
  std::vector<std::uint64_t> values;
  bool is_list = false;
};

struct ConfigFields {
  std::string file;
  std::map<ConfigKeyKind, std::map<std::string, ConfigNumbers>> numbers;  ///< By kind, then key.
  std::map<std::string, double> scales;
  std::map<std::string, std::string> activation;  ///< Key to JSON text.
  std::vector<std::string> layer_types;           ///< mlp_layer_types
  bool has_layer_pattern = false;                 ///< A key of kind kLayerPattern.
  std::string model_type;                         ///< Of the whole.
  std::string language_type;  ///< Of the language model in it: what its keys mean depends on it.
  std::vector<std::string> architectures;  ///< Of the language model, where it has any itself.
  std::string expert_type;                 ///< expert_dtype
  std::vector<std::string> unknown;  ///< Keys that are in no list and do not sound like experts'.
  QuantizationConfig quantization;
};

/// Throws: kUnsupported naming file, key and value if the next value of `json` is not `wanted`.
/// The JSON is sound then, so that nothing is corrupt. `description`: "a number", "a name".
void require_kind(JsonReader& json, JsonReader::Kind wanted, const char* description,
                  std::string_view key, std::string_view file);

/// Throws: kCorruptFile (not JSON), kUnsupported (a value of the wrong kind; a key that would
/// change results, with its value; two quantization_configs that contradict each other, with both).
[[nodiscard]] ConfigFields read_config_fields(std::string_view text, const std::string& file);

}  // namespace sluice
