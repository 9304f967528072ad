// spelled_files.h - the same small experts under every name and in every container that is in use.
// Writes element by element and shares nothing with the readers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model_files.h"

namespace sluice::testing {

/// How the codes of a matrix are stored.
enum class Storage { kW4afp8, kW4afp8U8, kW4afp8U8Offset, kWords, kBytesOffset, kBytesSigned };

struct Spelling {
  std::string prefix = "model.layers";
  std::string container = "mlp.experts";
  bool has_numbers = false;  ///< w1, w3, w2
  Storage storage = Storage::kW4afp8;
  std::string scale_dtype = "F32";
  std::string shape_dtype = "I64";  ///< Of weight_shape; "" = none.
};

/// Two experts of layer 3: hidden 256, intermediate 128, groups of 128.
struct SpelledFiles {
  static constexpr int kLayer = 3, kNumExperts = 2, kHidden = 256, kIntermediate = 128;

  Spelling spelling;
  nlohmann::ordered_json config;
  std::map<std::string, RawFile> files;  ///< Expert e is in "e.safetensors".
  nlohmann::ordered_json weight_map;     ///< No index if null.

  explicit SpelledFiles(Spelling s = {}) : spelling(std::move(s)) {
    config = {{"model_type", "deepseek_v3"},
              {"hidden_size", kHidden},
              {"moe_intermediate_size", kIntermediate},
              {"n_routed_experts", kNumExperts},
              {"num_experts_per_tok", 2},
              {"routed_scaling_factor", 1},
              {"first_k_dense_replace", 3},
              {"num_hidden_layers", 4},
              {"hidden_act", "silu"}};
    config["quantization_config"] =
        is_w4afp8() ? nlohmann::ordered_json{{"quant_method", "w4afp8"}} : pack_quantized();
    weight_map = nlohmann::ordered_json::object();
    for (int e = 0; e < kNumExperts; ++e) {
      for (int m = 0; m < 3; ++m) add_matrix(e, m);
    }
  }

  [[nodiscard]] bool is_w4afp8() const { return spelling.storage <= Storage::kW4afp8U8Offset; }
  static std::string file(int expert) { return std::to_string(expert) + ".safetensors"; }
  /// Of matrix 0 (gate), 1 (up) or 2 (down).
  [[nodiscard]] std::string name(int e, int m, const std::string& what) const {
    const char* const words[] = {"gate_proj", "up_proj", "down_proj"};
    const char* const numbers[] = {"w1", "w3", "w2"};
    return experts() + std::to_string(e) + "." + (spelling.has_numbers ? numbers[m] : words[m]) +
           "." + what;
  }
  /// "model.layers.3.mlp.experts."
  [[nodiscard]] std::string experts() const {
    return spelling.prefix + "." + std::to_string(kLayer) + "." + spelling.container + ".";
  }
  [[nodiscard]] std::string codes_name(int e, int m) const {
    return name(e, m, is_w4afp8() ? "weight" : "weight_packed");
  }
  [[nodiscard]] std::string scales_name(int e, int m) const {
    return name(e, m, is_w4afp8() ? "weight_scale_inv" : "weight_scale");
  }
  /// Into a file, and into the index as being there.
  void add(const std::string& in, const std::string& tensor, RawTensor value) {
    files[in][tensor] = std::move(value);
    weight_map[tensor] = in;
  }
  void erase(const std::string& tensor) {
    for (auto& [file_name, f] : files) f.erase(tensor);
    weight_map.erase(tensor);
  }
  void rename(const std::string& from, const std::string& to) {
    const std::string in = weight_map.at(from);
    RawTensor tensor = files.at(in).at(from);
    erase(from);
    add(in, to, std::move(tensor));
  }
  RawTensor& at(const std::string& tensor) {
    return files.at(weight_map.at(tensor).get<std::string>()).at(tensor);
  }

  void write(const std::filesystem::path& dir) const {
    std::filesystem::create_directories(dir);
    write_file(dir / "config.json", config.dump());
    for (const auto& [file_name, f] : files) write_file(dir / file_name, f.to_bytes());
    if (weight_map.is_null()) return;
    write_file(dir / "model.safetensors.index.json",
               nlohmann::ordered_json{{"weight_map", weight_map}}.dump());
  }

  /// Of weight [row, column], in [-7, 7] and crowding around 0.
  static int code(int e, int m, int row, int column) {
    const int i = (row * 131 + column * 17 + e * 7 + m * 5) % 97;
    return (i % 3 + i / 3 % 3 + i / 9 % 3 + i / 27 % 4) - 4;
  }
  /// F16, BF16 and F32 all hold these.
  static float scale(int e, int m, int row, int group) {
    const int i = row + 3 * group + e + m;
    return std::ldexp(1.0f + 0.25f * static_cast<float>(i % 4), -6 - i % 3);
  }

 private:
  static nlohmann::ordered_json pack_quantized() {
    return nlohmann::ordered_json::parse(R"({"quant_method": "compressed-tensors",
      "format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"],
      "weights": {"num_bits": 4, "type": "int", "symmetric": true, "group_size": 128,
      "strategy": "group"}, "input_activations": null}}})");
  }

  void add_matrix(int e, int m) {
    const int n = m == 2 ? kHidden : kIntermediate, k = m == 2 ? kIntermediate : kHidden;
    const auto un = static_cast<std::uint64_t>(n), uk = static_cast<std::uint64_t>(k);
    const bool has_offset = spelling.storage == Storage::kW4afp8U8Offset ||
                            spelling.storage == Storage::kWords ||
                            spelling.storage == Storage::kBytesOffset;
    std::string codes, scales;
    for (int row = 0; row < n; ++row) {
      for (int column = 0; column < k; column += 2) {
        const int add = has_offset ? 8 : 0;
        const int low = (code(e, m, row, column) + add) & 15;
        const int high = (code(e, m, row, column + 1) + add) & 15;
        codes += static_cast<char>(high << 4 | low);
      }
      for (int group = 0; group < k / 128; ++group) scales += number(scale(e, m, row, group));
    }
    const bool has_words = spelling.storage == Storage::kWords;
    const char* const dtype = spelling.storage == Storage::kW4afp8 ? "I8"
                              : has_words                          ? "I32"
                                                                   : "U8";
    add(file(e), codes_name(e, m), {dtype, {un, has_words ? uk / 8 : uk / 2}, codes});
    add(file(e), scales_name(e, m), {spelling.scale_dtype, {un, uk / 128}, scales});
    if (is_w4afp8()) {
      const char* const inputs[] = {"w1", "w3", "w2"};
      add(file(e), experts() + std::to_string(e) + "." + inputs[m] + ".input_scale",
          {"F32", {1}, f32_bytes({0.0078125f})});
    } else if (!spelling.shape_dtype.empty()) {
      const std::int64_t wide[] = {n, k};
      const std::int32_t narrow[] = {n, k};
      const bool is_wide = spelling.shape_dtype == "I64";
      add(file(e), name(e, m, "weight_shape"),
          {spelling.shape_dtype,
           {2},
           is_wide ? std::string(reinterpret_cast<const char*>(wide), sizeof wide)
                   : std::string(reinterpret_cast<const char*>(narrow), sizeof narrow)});
    }
  }

  /// `value`, which has few bits and is normal in all three, in the dtype of the scales.
  [[nodiscard]] std::string number(float value) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if (spelling.scale_dtype == "F32") return {reinterpret_cast<const char*>(&bits), 4};
    const std::uint32_t f16 = ((bits >> 23) - 127 + 15) << 10 | (bits >> 13 & 0x3ff);
    const auto half = static_cast<std::uint16_t>(spelling.scale_dtype == "F16" ? f16 : bits >> 16);
    return {reinterpret_cast<const char*>(&half), 2};
  }
};

}  // namespace sluice::testing
