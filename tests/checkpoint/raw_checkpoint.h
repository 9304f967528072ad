// raw_checkpoint.h - a checkpoint on disk as tensors in memory, to be spoiled in one way and
// written out again. Knows nothing of the readers under test.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "model_files.h"

namespace sluice::testing {

struct RawCheckpoint {
  nlohmann::ordered_json config, hf_quant_config;
  std::map<std::string, RawFile> files;

  explicit RawCheckpoint(const std::filesystem::path& dir) {
    config = nlohmann::ordered_json::parse(read_file(dir / "config.json"));
    if (std::filesystem::exists(dir / "hf_quant_config.json")) {
      hf_quant_config = nlohmann::ordered_json::parse(read_file(dir / "hf_quant_config.json"));
    }
    for (const auto& entry : std::filesystem::directory_iterator(dir)) {
      if (entry.path().extension() != ".safetensors") continue;
      files[entry.path().filename().string()] = parse(read_file(entry.path()));
    }
  }

  /// Without an index: every file counts.
  void write(const std::filesystem::path& dir) const {
    std::filesystem::create_directories(dir);
    write_file(dir / "config.json", config.dump());
    if (!hf_quant_config.is_null()) {
      write_file(dir / "hf_quant_config.json", hf_quant_config.dump());
    }
    for (const auto& [name, file] : files) write_file(dir / name, file.to_bytes());
  }

  /// Every tensor, whatever its file.
  [[nodiscard]] std::map<std::string, RawTensor> tensors() const {
    std::map<std::string, RawTensor> all;
    for (const auto& [name, file] : files) all.insert(file.begin(), file.end());
    return all;
  }
  RawTensor& at(const std::string& tensor) {
    for (auto& [name, file] : files) {
      if (const auto i = file.find(tensor); i != file.end()) return i->second;
    }
    throw std::out_of_range(tensor);
  }
  void erase(const std::string& tensor) {
    for (auto& [name, file] : files) file.erase(tensor);
  }
  void add(const std::string& tensor, RawTensor value) {
    files.begin()->second[tensor] = std::move(value);
  }

 private:
  static RawFile parse(const std::string& bytes) {
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof length);
    const auto header = nlohmann::ordered_json::parse(bytes.substr(8, length));
    RawFile file;
    for (const auto& [name, t] : header.items()) {
      if (name == "__metadata__") continue;
      const std::uint64_t begin = t["data_offsets"][0], end = t["data_offsets"][1];
      file[name] = {t["dtype"], t["shape"].get<std::vector<std::uint64_t>>(),
                    bytes.substr(8 + length + begin, end - begin)};
    }
    return file;
  }
};

inline bool operator==(const RawTensor& a, const RawTensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes;
}

}  // namespace sluice::testing
