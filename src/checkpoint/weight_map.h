// weight_map.h - model.safetensors.index.json: which file each tensor is in.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>

namespace sluice {

inline constexpr std::string_view kIndexFile = "model.safetensors.index.json";
inline constexpr std::string_view kSafetensorsSuffix = ".safetensors";

/// Where the index says a tensor is, and whether it was there.
struct WeightMapEntry {
  std::string file;
  bool is_found = false;
  std::string other_file;  ///< Another that has a tensor of this name.
};
using WeightMap = std::unordered_map<std::string, WeightMapEntry>;  // by tensor name

/// `source` is for messages. Throws: kCorruptFile (no such JSON), kUnsupported (a name
/// that leaves the directory, a file that is not *.safetensors).
[[nodiscard]] WeightMap parse_weight_map(std::string_view text, const std::string& source);

}  // namespace sluice
