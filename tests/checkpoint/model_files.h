// model_files.h - a small checkpoint held in memory, to be spoiled in one way and written out.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sluice::testing {

struct RawTensor {
  std::string dtype;
  std::vector<std::uint64_t> shape;
  std::string bytes;
};

inline std::string f32_bytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path.string());
}

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// Length, header as given, data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + header + data;
}

/// Tensors of one file, by name. Writes them back to back without padding.
struct RawFile : std::map<std::string, RawTensor> {
  [[nodiscard]] std::string to_bytes() const {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    std::string data;
    for (const auto& [name, t] : *this) {
      header[name] = {{"dtype", t.dtype},
                      {"shape", t.shape},
                      {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
      data += t.bytes;
    }
    return safetensors_bytes(header.dump(), data);
  }
};

/// Two experts, hidden 256, intermediate 128, one MoE layer (5), all files as published.
struct ModelFiles {
  static constexpr int kLayer = 5, kNumExperts = 2, kHidden = 256, kIntermediate = 128;

  nlohmann::ordered_json config = {{"model_type", "deepseek_v3"},
                                   {"hidden_size", kHidden},
                                   {"moe_intermediate_size", kIntermediate},
                                   {"n_routed_experts", kNumExperts},
                                   {"num_experts_per_tok", 2},
                                   {"routed_scaling_factor", 2.5},
                                   {"first_k_dense_replace", 5},
                                   {"num_hidden_layers", 6},
                                   {"quantization_config", {{"quant_method", "w4afp8"}}}};
  nlohmann::ordered_json hf_quant_config;  // written unless null
  std::map<std::string, RawFile> files;    // by name
  bool with_index = true;

  /// Weights in two shards, input scales in act_scales.safetensors, which the index leaves out.
  ModelFiles() {
    for (int e = 0; e < kNumExperts; ++e) {
      RawFile& shard = files["model-0000" + std::to_string(e + 1) + "-of-00002.safetensors"];
      add_matrix(shard, e, "gate_proj", kIntermediate, kHidden);
      add_matrix(shard, e, "up_proj", kIntermediate, kHidden);
      add_matrix(shard, e, "down_proj", kHidden, kIntermediate);
      RawFile& scales = files["act_scales.safetensors"];
      scales[name(e, "w1.input_scale")] = {"F32", {1}, f32_bytes({0.5f + 0.25f * e})};
      scales[name(e, "w2.input_scale")] = {"F32", {1}, f32_bytes({0.125f + 0.5f * e})};
      scales[name(e, "w3.input_scale")] = {"F32", {1}, f32_bytes({0.625f})};
    }
  }

  static std::string name(int expert, const std::string& part) {
    return "model.layers." + std::to_string(kLayer) + ".mlp.experts." + std::to_string(expert) +
           "." + part;
  }
  /// Name of the shard that holds an expert's weights.
  static std::string shard_name(int expert) {
    return "model-0000" + std::to_string(expert + 1) + "-of-00002.safetensors";
  }
  RawTensor& tensor(int expert, const std::string& part) {
    for (auto& [file_name, file] : files) {
      const auto at = file.find(name(expert, part));
      if (at != file.end()) return at->second;
    }
    throw std::out_of_range(name(expert, part));
  }
  void erase(int expert, const std::string& part) {
    for (auto& [file_name, file] : files) file.erase(name(expert, part));
  }
  [[nodiscard]] nlohmann::ordered_json weight_map() const {
    nlohmann::ordered_json map = nlohmann::ordered_json::object();
    for (const auto& [file_name, file] : files) {
      if (file_name == "act_scales.safetensors") continue;
      for (const auto& [tensor_name, t] : file) map[tensor_name] = file_name;
    }
    return map;
  }
  void write(const std::filesystem::path& dir) const {
    std::filesystem::create_directories(dir);
    write_file(dir / "config.json", config.dump());
    if (!hf_quant_config.is_null()) {
      write_file(dir / "hf_quant_config.json", hf_quant_config.dump());
    }
    for (const auto& [file_name, file] : files) write_file(dir / file_name, file.to_bytes());
    if (with_index) {
      const nlohmann::ordered_json index = {{"metadata", {{"total_size", 0}}},
                                            {"weight_map", weight_map()}};
      write_file(dir / "model.safetensors.index.json", index.dump());
    }
  }

 private:
  static void add_matrix(RawFile& file, int e, const std::string& stem, int n, int k) {
    const auto un = static_cast<std::uint64_t>(n), uk = static_cast<std::uint64_t>(k);
    std::string codes(un * uk / 2, '\0');
    for (std::size_t i = 0; i < codes.size(); ++i) {
      codes[i] = static_cast<char>((i * 37 + static_cast<std::size_t>(e) * 11) % 7 * 0x11);
    }
    std::vector<float> scales(un * uk / 128);
    for (std::size_t i = 0; i < scales.size(); ++i) {
      scales[i] = 0.001f * static_cast<float>(i % 13 + 1 + static_cast<std::size_t>(e));
    }
    file[name(e, stem + ".weight")] = {"I8", {un, uk / 2}, codes};
    file[name(e, stem + ".weight_scale_inv")] = {"F32", {un, uk / 128}, f32_bytes(scales)};
  }
};

}  // namespace sluice::testing
