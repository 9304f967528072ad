#include "checkpoint/model_config.h"

#include <cmath>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "checkpoint/json_reader.h"
#include "core/fail.h"
#include "core/mmap.h"

namespace sluice {
namespace {

constexpr int kWeightGroup = 128;
/// Far above any model there is; small enough that products of two sizes fit 64 bits.
constexpr int kMaxSize = 1 << 20;

/// The few fields we need, each where it was found. Absent and null are the same.
struct Fields {
  std::string file;
  std::map<std::string, std::uint64_t> counts;
  std::optional<double> routed_scaling_factor;
  std::string model_type;
  std::string quant_method;  ///< Lower case as published.
  std::optional<std::uint64_t> group_size;
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

void read_quantization_config(JsonReader& json, Fields& fields) {
  json.object([&](const std::string& key) {
    const auto kind = json.peek();
    if (key == "quant_method" && kind == JsonReader::Kind::kString) {
      fields.quant_method = json.string();
    } else if ((key == "group_size" || key == "weight_group_size") &&
               kind == JsonReader::Kind::kNumber) {
      fields.group_size = json.unsigned_integer();
    } else {
      json.skip();
    }
  });
}

Fields read_fields(std::string_view text, const std::string& file) {
  Fields fields;
  fields.file = file;
  JsonReader json(text, file);
  json.object([&](const std::string& key) {
    if (json.peek() == JsonReader::Kind::kNull) {
      json.skip();
    } else if (is_count(key)) {
      fields.counts[key] = json.unsigned_integer();
    } else if (key == "routed_scaling_factor") {
      fields.routed_scaling_factor = json.number();
    } else if (key == "model_type") {
      fields.model_type = json.string();
    } else if (key == "quantization_config") {
      read_quantization_config(json, fields);
    } else {
      json.skip();
    }
  });
  json.finish();
  return fields;
}

/// quantization.quant_algo of hf_quant_config.json.
std::string read_quant_algo(std::string_view text, const std::string& file) {
  std::string algo;
  JsonReader json(text, file);
  json.object([&](const std::string& key) {
    if (key != "quantization" || json.peek() != JsonReader::Kind::kObject) return json.skip();
    json.object([&](const std::string& inner) {
      if (inner == "quant_algo" && json.peek() == JsonReader::Kind::kString) {
        algo = json.string();
      } else {
        json.skip();
      }
    });
  });
  json.finish();
  return algo;
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
  const int width = count_field(fields, key, kWeightGroup, std::nullopt);
  if (width % kWeightGroup != 0) {
    fail(ErrorCode::kCorruptFile, "{}: {} = {} is not a multiple of {}", fields.file, key, width,
         kWeightGroup);
  }
  return width;
}

ModelGeometry read_geometry(const Fields& fields) {
  ModelGeometry geometry{.name = fields.model_type.empty() ? "unnamed" : fields.model_type,
                         .num_experts = num_experts_field(fields),
                         .num_topk = count_field(fields, "num_experts_per_tok", 1, std::nullopt),
                         .hidden = width_field(fields, "hidden_size"),
                         .intermediate = width_field(fields, "moe_intermediate_size"),
                         .group_size = kWeightGroup,
                         .routed_scaling_factor = 1.0f};
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

/// Decides the format, or refuses. `algo` is empty without hf_quant_config.json.
void recognise(const Fields& fields, const std::string& quant_file, const std::string& algo,
               ModelConfig& config) {
  const std::string& method = fields.quant_method;
  const bool is_ours = method.find("w4afp8") != std::string::npos;
  if (!method.empty() && !is_ours) {
    fail(ErrorCode::kUnsupported,
         "{}: quantization_config.quant_method = '{}'; the only method supported is w4afp8{}",
         fields.file, method,
         algo.empty() ? "" : fmt::format(" ({} says quant_algo = '{}')", quant_file, algo));
  }
  if (!is_ours && algo.empty()) {
    fail(ErrorCode::kUnsupported,
         "{}: no quantization_config.quant_method, and no quantization.quant_algo in "
         "hf_quant_config.json; the only method supported is w4afp8",
         fields.file);
  }
  if (!is_ours && algo != "MIXED_PRECISION") {
    fail(ErrorCode::kUnsupported,
         "{}: quantization.quant_algo = '{}'; only MIXED_PRECISION (w4afp8) is supported",
         quant_file, algo);
  }
  if (fields.group_size && *fields.group_size != kWeightGroup) {
    fail(ErrorCode::kUnsupported, "{}: quantization_config.group_size = {}; w4afp8 has {}",
         fields.file, *fields.group_size, kWeightGroup);
  }
  config.format = "w4afp8";
  config.evidence = is_ours ? fmt::format("config.json: quant_method = '{}'", method)
                            : fmt::format("hf_quant_config.json: quant_algo = '{}'", algo);
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& dir) {
  const auto file = dir / "config.json";
  ModelConfig config;
  config.text = read_text(file);
  const Fields fields = read_fields(config.text, file.string());

  const auto quant_file = dir / "hf_quant_config.json";
  std::string algo;
  if (std::filesystem::exists(quant_file)) {
    const std::string text = read_text(quant_file);
    algo = read_quant_algo(text, quant_file.string());
    config.text += text;
  }
  recognise(fields, quant_file.string(), algo, config);
  config.geometry = read_geometry(fields);
  config.num_layers = count_field(fields, "num_hidden_layers", 1, 0);
  config.first_k_dense_replace = count_field(fields, "first_k_dense_replace", 0, 0);
  return config;
}

}  // namespace sluice
