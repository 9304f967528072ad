// other_files.h - what stands beside the shards of a converted checkpoint.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

namespace sluice {

/// The config.json of `source`, with what is said of its numbers replaced by `quantization`, and
/// its expert_dtype by `expert_type` (empty: none).
[[nodiscard]] std::string converted_config(const std::filesystem::path& source,
                                           const nlohmann::ordered_json& quantization,
                                           const std::string& expert_type);

/// Copies the tokenizer and the like: small files that say nothing about numbers. Throws: kIo.
void copy_small_files(const std::filesystem::path& source, const std::filesystem::path& target);

/// Writes SHA256SUMS of all files in `dir`, as `sha256sum --check` reads it. Throws: kIo.
void write_checksums(const std::filesystem::path& dir);

}  // namespace sluice
