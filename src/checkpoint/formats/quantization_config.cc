#include "checkpoint/formats/quantization_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <map>
#include <system_error>
#include <utility>

#include "core/fail.h"

namespace sluice {
namespace {

using Kind = JsonReader::Kind;

[[noreturn]] void refuse_value(const std::string& file, std::string_view key,
                               std::string_view value, const char* description) {
  constexpr std::size_t kMaxLength = 60;
  fail(ErrorCode::kUnsupported, "{}: {} = {}{} is not {}", file, key, value.substr(0, kMaxLength),
       value.size() > kMaxLength ? "..." : "", description);
}

/// What says how codes are read must be a name, or not there.
void read_name(JsonReader& json, std::string_view key, const std::string& file, std::string& out) {
  if (json.peek() == Kind::kNull) return json.skip();
  if (json.peek() != Kind::kString) refuse_value(file, key, json.raw(), "a name");
  out = json.string();
}

/// An empty name would read as a key that is not there.
void read_expert_type(JsonReader& json, std::string_view key, const std::string& file,
                      std::string& out) {
  if (json.peek() == Kind::kNull) return json.skip();
  read_name(json, key, file, out);
  if (out.empty()) refuse_value(file, key, "''", "'fp4' or 'fp8'");
}

/// A whole number, which some writers make -1 to say that there is none.
std::int64_t read_whole_number(JsonReader& json, std::string_view key, const std::string& file) {
  const std::string_view text = json.raw();
  std::int64_t value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (problem != std::errc() || end != text.data() + text.size()) {
    refuse_value(file, key, text, "a whole number");
  }
  return value;
}

void read_count(JsonReader& json, std::string_view key, const std::string& file,
                std::optional<std::int64_t>& out) {
  if (json.peek() == Kind::kNull) return json.skip();
  out = read_whole_number(json, key, file);
}

bool is_exclusion(std::string_view key) {
  return key == "ignore" || key == "ignored_layers" || key == "exclude_modules" ||
         key == "modules_to_not_convert" || key == "llm_int8_skip_modules";
}

/// Appends the strings of a list; a lone string is a list of one.
void read_strings(JsonReader& json, std::vector<std::string>& out) {
  if (json.peek() == Kind::kString) {
    out.push_back(json.string());
  } else if (json.peek() == Kind::kArray) {
    json.array([&] {
      if (json.peek() == Kind::kString) {
        out.push_back(json.string());
      } else {
        json.skip();
      }
    });
  } else {
    json.skip();
  }
}

/// True for an object or array with something in it.
bool read_is_filled(JsonReader& json) {
  bool is_filled = false;
  if (json.peek() == Kind::kObject) {
    json.object([&](const std::string&) {
      is_filled = true;
      json.skip();
    });
  } else if (json.peek() == Kind::kArray) {
    json.array([&] {
      is_filled = true;
      json.skip();
    });
  } else {
    json.skip();
  }
  return is_filled;
}

void read_other(JsonReader& json, const std::string& key, std::vector<OtherKey>& out) {
  out.push_back({.key = key, .value = std::string(json.raw())});
}

void read_args(JsonReader& json, std::string_view name, const std::string& file,
               QuantizationArgs& args) {
  if (json.peek() == Kind::kNull) return json.skip();
  if (json.peek() != Kind::kObject) refuse_value(file, name, json.raw(), "an object");
  args.is_present = true;
  json.object([&](const std::string& key) {
    const std::string at = fmt::format("{}.{}", name, key);
    if (key == "num_bits") {
      read_count(json, at, file, args.num_bits);
    } else if (key == "group_size") {
      read_count(json, at, file, args.group_size);
    } else if (key == "type") {
      read_name(json, at, file, args.type);
    } else if (key == "strategy") {
      read_name(json, at, file, args.strategy);
    } else if (key == "scale_dtype") {
      read_name(json, at, file, args.scale_dtype);
    } else if (key == "actorder") {
      if (json.peek() == Kind::kBool) {
        args.actorder = json.boolean() ? "group" : "";
      } else {
        read_name(json, at, file, args.actorder);
      }
    } else if (key == "dynamic") {
      if (json.peek() == Kind::kBool) {
        args.dynamic = json.boolean() ? "true" : "false";
      } else {
        read_name(json, at, file, args.dynamic);
      }
    } else if (key == "symmetric" && json.peek() == Kind::kBool) {
      args.is_symmetric = json.boolean();
    } else {
      read_other(json, key, args.others);
    }
  });
}

void read_groups(JsonReader& json, const std::string& file,
                 std::vector<QuantizationGroup>& groups) {
  if (json.peek() != Kind::kObject) return json.skip();
  json.object([&](const std::string& name) {
    const std::string at = "quantization_config.config_groups." + name;
    if (json.peek() != Kind::kObject) refuse_value(file, at, json.raw(), "an object");
    QuantizationGroup& group = groups.emplace_back();
    group.name = name;
    json.object([&](const std::string& key) {
      if (key == "weights") {
        read_args(json, at + ".weights", file, group.weights);
      } else if (key == "input_activations") {
        read_args(json, at + ".input_activations", file, group.input_activations);
      } else if (key == "format") {
        read_name(json, at + ".format", file, group.format);
      } else if (key == "targets") {
        read_strings(json, group.targets);
      } else {
        read_other(json, key, group.others);
      }
    });
  });
}

/// "model.layers.3.mlp.experts.0.up_proj" and "*.experts*" are of routed experts, and
/// "model.layers.3.mlp.shared_experts" is not.
bool names_experts(std::string_view module) {
  constexpr std::string_view kWord = "experts";
  for (std::size_t at = 0; (at = module.find(kWord, at)) != module.npos; at += kWord.size()) {
    const char before = at == 0 ? '.' : module[at - 1];
    if (before != '_' && std::isalnum(static_cast<unsigned char>(before)) == 0) return true;
  }
  return false;
}

void read_quantized_layers(JsonReader& json, const std::string& key, const std::string& file,
                           std::vector<QuantizedExperts>& experts, std::vector<OtherKey>& others) {
  if (json.peek() != Kind::kObject) return read_other(json, key, others);
  json.object([&](const std::string& module) {
    if (!names_experts(module)) return json.skip();
    if (json.peek() != Kind::kObject) return read_other(json, key + "." + module, others);
    QuantizedExperts entry;
    entry.module = module;
    json.object([&](const std::string& inner) {
      if (inner == "quant_algo") {
        read_name(json, inner, file, entry.algo);
      } else if (inner == "group_size") {
        read_count(json, inner, file, entry.group_size);
      } else {
        read_other(json, inner, entry.others);
      }
    });
    // A model has tens of thousands of matrices, and says the same of all.
    const bool is_known = std::ranges::any_of(experts, [&](const QuantizedExperts& other) {
      return other.algo == entry.algo && other.group_size == entry.group_size &&
             other.others == entry.others;
    });
    if (!is_known) experts.push_back(std::move(entry));
  });
}

void read_block_size(JsonReader& json, std::string_view key, const std::string& file,
                     std::vector<std::int64_t>& out) {
  constexpr const char* kMeaning = "rows and columns of a block, two numbers above 0";
  if (json.peek() == Kind::kNull) return json.skip();
  if (json.peek() != Kind::kArray) refuse_value(file, key, json.raw(), kMeaning);
  json.array([&] { out.push_back(read_whole_number(json, key, file)); });
  if (out.size() != 2 || std::ranges::any_of(out, [](std::int64_t size) { return size < 1; })) {
    refuse_value(file, key, fmt::format("[{}]", fmt::join(out, ", ")), kMeaning);
  }
}

std::string text_of(const std::optional<std::int64_t>& value) {
  return value ? std::to_string(*value) : "";
}

std::string text_of(const QuantizationArgs& args) {
  if (!args.is_present) return "none";
  return fmt::format("{}-bit '{}', strategy '{}', groups of {}, dynamic '{}', symmetric {}",
                     text_of(args.num_bits), args.type, args.strategy, text_of(args.group_size),
                     args.dynamic, args.is_symmetric.value_or(true));
}

/// The fields that are given, as text.
std::map<std::string, std::string> fields_of(const QuantizationConfig& config) {
  std::map<std::string, std::string> fields;
  const auto add = [&](std::string_view name, std::string value) {
    if (!value.empty()) fields.emplace(name, std::move(value));
  };
  add("quant_method", config.quant_method);
  add("quant_algo", config.quant_algo);
  add("activation_scheme", config.activation_scheme);
  add("format", config.format);
  add("expert_dtype", config.expert_type);
  add("group_size", text_of(config.group_size));
  std::string block;
  for (const std::int64_t size : config.weight_block_size) {
    block += (block.empty() ? "[" : ", ") + std::to_string(size);
  }
  add("weight_block_size", block.empty() ? block : block + "]");
  for (const QuantizationGroup& group : config.groups) {
    add("config_groups." + group.name + ".weights", text_of(group.weights));
    add("config_groups." + group.name + ".input_activations", text_of(group.input_activations));
    add("config_groups." + group.name + ".format", group.format);
  }
  return fields;
}

}  // namespace

void read_quantization_config(JsonReader& json, QuantizationConfig& config) {
  if (json.peek() == Kind::kNull) return json.skip();
  config.is_present = true;
  json.object([&](const std::string& key) {
    const std::string at = "quantization_config." + key;
    if (key == "quant_method") {
      read_name(json, at, config.file, config.quant_method);
    } else if (key == "quant_algo") {
      read_name(json, at, config.file, config.quant_algo);
    } else if (key == "activation_scheme") {
      read_name(json, at, config.file, config.activation_scheme);
    } else if (key == "format") {
      read_name(json, at, config.file, config.format);
    } else if (key == "expert_dtype") {
      read_expert_type(json, at, config.file, config.expert_type);
    } else if (key == "group_size" || key == "weight_group_size" || key == "q_group_size") {
      // Names of one number.
      std::optional<std::int64_t> size;
      read_count(json, at, config.file, size);
      if (size && config.group_size && *size != *config.group_size) {
        fail(ErrorCode::kUnsupported,
             "{}: quantization_config.{} = {} contradicts the other name of the group size, which "
             "is {}",
             config.file, key, *size, *config.group_size);
      }
      if (size) config.group_size = size;
    } else if (key == "weight_block_size") {
      read_block_size(json, at, config.file, config.weight_block_size);
    } else if (key == "config_groups") {
      read_groups(json, config.file, config.groups);
    } else if (key == "sparsity_config") {
      config.has_sparsity = read_is_filled(json);
    } else if (key == "moe_sparsity_config") {
      config.has_expert_sparsity = read_is_filled(json);
    } else if (key == "transform_config") {
      config.has_transforms = read_is_filled(json);
    } else if (key == "quantized_layers") {
      read_quantized_layers(json, key, config.file, config.experts, config.others);
    } else if (is_exclusion(key)) {
      read_strings(json, config.exclusions);
    } else {
      read_other(json, key, config.others);
    }
  });
}

void read_algo_config(std::string_view text, const std::string& file, QuantizationConfig& config) {
  config.algo_file = file;
  JsonReader json(text, file);
  json.object([&](const std::string& key) {
    if (key != "quantization" || json.peek() != Kind::kObject) return json.skip();
    json.object([&](const std::string& inner) {
      if (inner == "quant_algo") {
        read_name(json, "quantization." + inner, file, config.algo);
      } else if (is_exclusion(inner)) {
        read_strings(json, config.exclusions);
      } else if (inner == "group_size") {
        read_count(json, "quantization." + inner, file, config.algo_group_size);
      } else if (inner == "quantized_layers") {
        read_quantized_layers(json, inner, file, config.algo_experts, config.algo_others);
      } else {
        read_other(json, inner, config.algo_others);
      }
    });
  });
  json.finish();
  const auto refuse = [&](std::string_view field, const std::string& ours, std::string_view key,
                          const std::string& theirs) {
    if (ours.empty() || theirs.empty() || ours == theirs) return;
    fail(ErrorCode::kUnsupported, "{}: quantization_config.{} = {}, but {} has {} = {}",
         config.file, field, ours, file, key, theirs);
  };
  refuse("quant_algo", config.quant_algo, "quant_algo", config.algo);
  refuse("group_size", text_of(config.group_size), "group_size", text_of(config.algo_group_size));
}

std::optional<Contradiction> contradiction(const QuantizationConfig& a,
                                           const QuantizationConfig& b) {
  const auto first = fields_of(a), second = fields_of(b);
  for (const auto& [field, value] : first) {
    const auto at = second.find(field);
    if (at != second.end() && at->second != value) return Contradiction{field, value, at->second};
  }
  return std::nullopt;
}

}  // namespace sluice
