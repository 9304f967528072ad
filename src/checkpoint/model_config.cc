#include "checkpoint/model_config.h"

#include <cmath>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "checkpoint/json_reader.h"
#include "core/fail.h"
#include "core/mmap.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Widths are multiples of this, the group of activations and the largest of weights.
constexpr int kWidthUnit = kActivationGroup;
/// Far above any model there is; small enough that products of two sizes fit 64 bits.
constexpr int kMaxSize = 1 << 20;

/// The few fields we need, each where it was found. Absent and null are the same.
struct Fields {
  std::string file;
  std::map<std::string, std::uint64_t> counts;
  std::optional<double> routed_scaling_factor;
  std::string model_type;
  std::string hidden_act;
  QuantizationConfig quantization;
};

constexpr std::string_view kCountNames[] = {
    "hidden_size",       "moe_intermediate_size", "n_routed_experts",  "num_experts",
    "num_local_experts", "num_experts_per_tok",   "num_hidden_layers", "first_k_dense_replace",
};

bool is_count(std::string_view key) {
  for (const std::string_view name : kCountNames) {
    if (key == name) return true;
  }
  return false;
}

/// What a model with other senses says of its language model.
void merge(Fields&& text, Fields& out) {
  for (const auto& [key, value] : text.counts) out.counts[key] = value;
  if (text.routed_scaling_factor) out.routed_scaling_factor = text.routed_scaling_factor;
  if (out.model_type.empty()) out.model_type = std::move(text.model_type);
  if (!text.hidden_act.empty()) out.hidden_act = std::move(text.hidden_act);
  if (text.quantization.is_present) out.quantization = std::move(text.quantization);
}

Fields read_object(JsonReader& json, bool is_text_config) {
  Fields fields;
  std::optional<Fields> text;
  json.object([&](const std::string& key) {
    if (json.peek() == JsonReader::Kind::kNull) {
      json.skip();
    } else if (is_count(key)) {
      fields.counts[key] = json.unsigned_integer();
    } else if (key == "routed_scaling_factor") {
      fields.routed_scaling_factor = json.number();
    } else if (key == "model_type") {
      fields.model_type = json.string();
    } else if (key == "hidden_act") {
      fields.hidden_act = json.string();
    } else if (key == "quantization_config") {
      read_quantization_config(json, fields.quantization);
    } else if (key == "text_config" && !is_text_config) {
      text = read_object(json, true);
    } else {
      json.skip();
    }
  });
  if (text) merge(std::move(*text), fields);
  return fields;
}

Fields read_fields(std::string_view text, const std::string& file) {
  JsonReader json(text, file);
  Fields fields = read_object(json, false);
  json.finish();
  fields.file = file;
  return fields;
}

int count_field(const Fields& fields, const std::string& key, int low, std::optional<int> absent) {
  const auto at = fields.counts.find(key);
  if (at == fields.counts.end()) {
    if (absent) return *absent;
    fail(ErrorCode::kCorruptFile, "{}: {} is missing", fields.file, key);
  }
  if (at->second < static_cast<std::uint64_t>(low) || at->second > kMaxSize) {
    fail(ErrorCode::kCorruptFile, "{}: {} = {} is outside [{}, {}]", fields.file, key, at->second,
         low, kMaxSize);
  }
  return static_cast<int>(at->second);
}

/// The same number has three names in the field; those that are present must agree.
int num_experts_field(const Fields& fields) {
  std::string found;
  int value = 0;
  for (const char* const key : {"n_routed_experts", "num_experts", "num_local_experts"}) {
    if (!fields.counts.contains(key)) continue;
    const int here = count_field(fields, key, 1, std::nullopt);
    if (!found.empty() && here != value) {
      fail(ErrorCode::kCorruptFile, "{}: {} = {} contradicts {} = {}", fields.file, key, here,
           found, value);
    }
    found = key, value = here;
  }
  if (found.empty()) {
    fail(ErrorCode::kCorruptFile,
         "{}: none of n_routed_experts, num_experts, num_local_experts is given", fields.file);
  }
  return value;
}

int width_field(const Fields& fields, const std::string& key) {
  const int width = count_field(fields, key, kWidthUnit, std::nullopt);
  if (width % kWidthUnit != 0) {
    fail(ErrorCode::kCorruptFile, "{}: {} = {} is not a multiple of {}", fields.file, key, width,
         kWidthUnit);
  }
  return width;
}

/// Models name the function of the gate alone. Absent is SiLU, as all models here have it.
ActivationFn activation_field(const Fields& fields) {
  if (fields.hidden_act.empty() || fields.hidden_act == "silu") {
    return {ActivationKind::kSwiglu};
  }
  fail(ErrorCode::kUnsupported, "{}: hidden_act = {} is not silu, the only one there is",
       fields.file, fields.hidden_act);
}

ModelGeometry read_geometry(const Fields& fields) {
  ModelGeometry geometry{.name = fields.model_type.empty() ? "unnamed" : fields.model_type,
                         .num_experts = num_experts_field(fields),
                         .num_topk = count_field(fields, "num_experts_per_tok", 1, std::nullopt),
                         .hidden = width_field(fields, "hidden_size"),
                         .intermediate = width_field(fields, "moe_intermediate_size"),
                         .routed_scaling_factor = 1.0f,
                         .activation = activation_field(fields)};
  if (geometry.num_topk > geometry.num_experts) {
    fail(ErrorCode::kCorruptFile, "{}: num_experts_per_tok = {} is above the {} experts there are",
         fields.file, geometry.num_topk, geometry.num_experts);
  }
  if (fields.routed_scaling_factor) {
    const double factor = *fields.routed_scaling_factor;
    if (!(factor > 0) || !std::isfinite(static_cast<float>(factor))) {
      fail(ErrorCode::kCorruptFile, "{}: routed_scaling_factor = {} is not a positive float32",
           fields.file, factor);
    }
    geometry.routed_scaling_factor = static_cast<float>(factor);
  }
  return geometry;
}

std::string read_text(const std::filesystem::path& path) {
  const auto file = MappedFile::open(path);
  const auto bytes = file->bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& dir) {
  const auto file = dir / "config.json";
  ModelConfig config;
  config.text = read_text(file);
  Fields fields = read_fields(config.text, file.string());
  fields.quantization.file = file.string();

  const auto algo_file = dir / "hf_quant_config.json";
  if (std::filesystem::exists(algo_file)) {
    const std::string text = read_text(algo_file);
    read_algo_config(text, algo_file.string(), fields.quantization);
    config.text += text;
  }
  config.geometry = read_geometry(fields);
  config.num_layers = count_field(fields, "num_hidden_layers", 1, 0);
  config.first_k_dense_replace = count_field(fields, "first_k_dense_replace", 0, 0);
  config.quantization = std::move(fields.quantization);
  return config;
}

}  // namespace sluice
