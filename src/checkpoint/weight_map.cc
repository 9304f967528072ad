#include "checkpoint/weight_map.h"

#include <utility>

#include "checkpoint/file_kind.h"
#include "checkpoint/json_reader.h"
#include "core/fail.h"

namespace sluice {

WeightMap parse_weight_map(std::string_view text, const std::string& source) {
  WeightMap map;
  bool has_map = false;
  check_is_json(text, source);
  JsonReader json(text, source);
  json.object([&](const std::string& key) {
    if (key != "weight_map") return json.skip();
    has_map = true;
    json.object([&](const std::string& tensor) {
      std::string file = json.string();
      if (!file.ends_with(kSafetensorsSuffix) || file.find('/') != std::string::npos) {
        fail(ErrorCode::kUnsupported,
             "{}: tensor {}: '{}' is not the name of a *{} file in this directory", source, tensor,
             file, kSafetensorsSuffix);
      }
      map.emplace(tensor, WeightMapEntry{.file = std::move(file), .other_file = {}});
    });
  });
  json.finish();
  if (!has_map) json.error("weight_map is missing");
  return map;
}

}  // namespace sluice
