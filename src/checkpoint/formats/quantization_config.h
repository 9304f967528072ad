// quantization_config.h - what a checkpoint says about its own numbers, as written: config.json's
// quantization_config and hf_quant_config.json. What it means is for the formats to say.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/json_reader.h"

namespace sluice {

/// A key that no reader takes, and its value as JSON text.
struct OtherKey {
  std::string key, value;
  friend bool operator==(const OtherKey&, const OtherKey&) = default;
};

/// How compressed-tensors describes one kind of number. Fields that are absent or null are empty.
struct QuantizationArgs {
  bool is_present = false;
  std::optional<std::int64_t> num_bits, group_size;  ///< -1 as written: none.
  std::string type;                                  ///< "int" or "float"
  std::string strategy;                              ///< "tensor", "channel", "group", "token", ...
  std::string actorder;
  std::string scale_dtype;  ///< As of torch, e.g. "torch.uint8".
  std::string dynamic;      ///< "true", "false", "local"
  std::optional<bool> is_symmetric;
  std::vector<OtherKey> others;
  friend bool operator==(const QuantizationArgs&, const QuantizationArgs&) = default;
};

/// One entry of config_groups.
struct QuantizationGroup {
  std::string name, format;
  std::vector<std::string> targets;  ///< Names, "re:" patterns or classes of modules.
  QuantizationArgs weights, input_activations;
  std::vector<OtherKey> others;
};

/// Entries of quantized_layers, which names modules one by one, that say the same of experts.
struct QuantizedExperts {
  std::string module;  ///< The first of them, as written.
  std::string algo;    ///< quant_algo
  std::optional<std::int64_t> group_size;
  std::vector<OtherKey> others;
};

struct QuantizationConfig {
  std::string file;          ///< config.json, with its directory.
  bool is_present = false;   ///< It has a quantization_config.
  std::string quant_method;  ///< Lower case as published.
  std::string quant_algo;
  std::string activation_scheme;
  std::string format;       ///< compressed-tensors: the container.
  std::string expert_type;  ///< expert_dtype of DeepSeek-V4, which config.json has beside it.
  std::string expert_key = "quantization_config.expert_dtype";  ///< Where it was, for messages.
  std::optional<std::int64_t> group_size;
  std::vector<std::int64_t> weight_block_size;
  std::vector<QuantizationGroup> groups;
  std::vector<std::string> exclusions;  ///< `ignore` and its other names, in both files.
  bool has_sparsity = false, has_expert_sparsity = false, has_transforms = false;
  std::vector<QuantizedExperts> experts;
  std::vector<OtherKey> others;  ///< quantization_keys.h has what becomes of them.

  std::string algo_file;  ///< hf_quant_config.json, with its directory; empty if there is none.
  std::string algo;       ///< Its quantization.quant_algo.
  std::optional<std::int64_t> algo_group_size;
  std::vector<QuantizedExperts> algo_experts;
  std::vector<OtherKey> algo_others;
};

/// A field that two descriptions of the same checkpoint give differently, and both values.
struct Contradiction {
  std::string field, first, second;
};

/// What one of them leaves out contradicts nothing.
[[nodiscard]] std::optional<Contradiction> contradiction(const QuantizationConfig& a,
                                                         const QuantizationConfig& b);

/// Reads the value of the key quantization_config; `config.file` is for messages. Throws:
/// kCorruptFile (not JSON), kUnsupported (a method or a group size of the wrong kind).
void read_quantization_config(JsonReader& json, QuantizationConfig& config);

/// Reads all of hf_quant_config.json. Throws: the same, and kUnsupported if it contradicts
/// `config`.
void read_algo_config(std::string_view text, const std::string& file, QuantizationConfig& config);

}  // namespace sluice
