#include "verdict_faults.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

namespace sluice::testing {
namespace {

void for_each_matrix(const std::function<void(int e, int m)>& body) {
  for (int e = 0; e < SpelledFiles::kNumExperts; ++e) {
    for (int m = 0; m < 3; ++m) body(e, m);
  }
}

/// Changes the float32 scales of matrices whose number is in `which`.
std::function<void(SpelledFiles&)> scales(std::set<int> which, std::function<float(float)> change) {
  return [=](SpelledFiles& f) {
    for_each_matrix([&](int e, int m) {
      if (!which.contains(m)) return;
      std::string& bytes = f.at(f.scales_name(e, m)).bytes;
      for (std::size_t i = 0; i < bytes.size(); i += sizeof(float)) {
        float value = 0;
        std::memcpy(&value, bytes.data() + i, sizeof value);
        value = change(value);
        std::memcpy(bytes.data() + i, &value, sizeof value);
      }
    });
  };
}

/// Sets the scale [3, 1] of expert 1's gate.
std::function<void(SpelledFiles&)> one_scale(float value) {
  return [=](SpelledFiles& f) {
    RawTensor& tensor = f.at(f.scales_name(1, 0));
    const std::size_t size = tensor.dtype == "BF16" ? 2 : 4;  // The upper half of a float32.
    std::memcpy(tensor.bytes.data() + 7 * size,
                reinterpret_cast<const char*>(&value) + sizeof value - size, size);
  };
}

/// Replaces every code byte.
std::function<void(SpelledFiles&)> codes(std::function<char(char, std::size_t)> change) {
  return [=](SpelledFiles& f) {
    for_each_matrix([&](int e, int m) {
      std::string& bytes = f.at(f.codes_name(e, m)).bytes;
      for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = change(bytes[i], i);
    });
  };
}

std::function<void(SpelledFiles&)> reshape(bool is_scale, std::vector<std::uint64_t> shape) {
  return [=](SpelledFiles& f) {
    f.at(is_scale ? f.scales_name(1, 0) : f.codes_name(1, 0)).shape = shape;
  };
}

std::string input_name(const SpelledFiles& f, int e, const char* stem) {
  return f.experts() + std::to_string(e) + "." + stem + ".input_scale";
}

std::function<void(SpelledFiles&)> inputs(float value, bool all) {
  return [=](SpelledFiles& f) {
    for (int e = 0; e < SpelledFiles::kNumExperts; ++e) {
      for (const char* const stem : {"w1", "w3", "w2"}) {
        if (all) f.at(input_name(f, e, stem)).bytes = f32_bytes({value});
      }
    }
    if (!all) f.at(input_name(f, 1, "w2")).bytes = f32_bytes({value});
  };
}

std::function<void(SpelledFiles&)> shape_says(std::int64_t n, std::int64_t k) {
  return [=](SpelledFiles& f) {
    const std::int64_t values[] = {n, k};
    std::memcpy(f.at(f.name(1, 0, "weight_shape")).bytes.data(), values, sizeof values);
  };
}

/// One more tensor of expert 0's gate.
std::function<void(SpelledFiles&)> extra(const char* what, RawTensor tensor) {
  return [=](SpelledFiles& f) { f.add("0.safetensors", f.name(0, 0, what), tensor); };
}

/// One more tensor beside the experts, or elsewhere.
std::function<void(SpelledFiles&)> other(const char* name, RawTensor tensor) {
  return [=](SpelledFiles& f) { f.add("0.safetensors", name, tensor); };
}

Faults name_faults() {
  const RawTensor byte = {"U8", {1}, "x"};
  return {
      {"other-prefix",
       [](SpelledFiles& f) {
         f.rename(f.codes_name(1, 2), "model.language_model.layers.3.mlp.experts.1.w");
       }},
      {"both-stems",
       [=](SpelledFiles& f) { f.add("0.safetensors", f.experts() + "0.w1.weight", byte); }},
      {"fused",
       [=](SpelledFiles& f) {
         f.files.clear(), f.weight_map = nlohmann::ordered_json::object();
         f.add("0.safetensors", f.experts() + "gate_up_proj_packed", byte);
       }},
      {"fused-too",
       [=](SpelledFiles& f) { f.add("0.safetensors", f.experts() + "gate_up_proj_bias", byte); }},
      {"fused-bias",
       [=](SpelledFiles& f) {
         f.files.clear(), f.weight_map = nlohmann::ordered_json::object();
         f.add("0.safetensors", f.experts() + "gate_up_proj_bias", byte);
       }},
      {"bias", extra("bias", {"BF16", {1}, "ab"})},
      {"g-idx", extra("weight_g_idx", byte)},
      {"zero-point", extra("weight_zero_point", byte)},
      {"packed-renamed",
       [](SpelledFiles& f) {
         for_each_matrix(
             [&](int e, int m) { f.rename(f.codes_name(e, m), f.name(e, m, "weight")); });
       }},
      {"mtp", other("mtp.layers.0.mlp.experts.0.gate_proj.weight", byte)},
      {"shared", other("model.layers.3.mlp.shared_experts.gate_proj.weight", byte)},
      {"empty-tensor", other("model.empty", {"F32", {0, 256}, ""})},
      {"no-expert-1",
       [](SpelledFiles& f) {
         for (int m = 0; m < 3; ++m) f.erase(f.codes_name(1, m)), f.erase(f.scales_name(1, m));
       }},
      {"no-up-scale", [](SpelledFiles& f) { f.erase(f.scales_name(1, 1)); }},
  };
}

Faults container_faults() {
  return {
      {"scale-transposed", reshape(true, {2, 128})},
      {"codes-transposed", reshape(false, {32, 128})},
      {"codes-reshaped", reshape(false, {64, 256})},
      {"shape-transposed", shape_says(256, 128)},
      {"shape-odd", shape_says(128, 255)},
      {"scale-e8m0",
       [](SpelledFiles& f) {
         f.at(f.scales_name(0, 0)) = {"F8_E8M0", {128, 2}, std::string(256, 'x')};
       }},
      {"scale-i32", [](SpelledFiles& f) { f.at(f.scales_name(0, 0)).dtype = "I32"; }},
      {"codes-fp8", [](SpelledFiles& f) { f.at(f.codes_name(0, 0)).dtype = "F8_E4M3"; }},
      {"no-evidence", codes([](char, std::size_t i) { return static_cast<char>(i); })},
      {"codes-offset", codes([](char c, std::size_t) {
         return static_cast<char>(static_cast<unsigned char>(c) ^ 0x88U);
       })},
      {"no-quant", [](SpelledFiles& f) { f.config.erase("quantization_config"); }},
  };
}

Faults scale_faults() {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::set<int> all = {0, 1, 2};
  const auto times = [](float factor) { return [=](float s) { return s * factor; }; };
  return {
      // One weight in 50 is -8, in either of the two ways to store it.
      {"minus-8",
       [](SpelledFiles& f) {
         const bool has_offset = f.spelling.storage == Storage::kWords;
         codes([=](char c, std::size_t i) {
           return i % 50 ? c : static_cast<char>(has_offset ? 0x08 : 0x88);
         })(f);
       }},
      {"zero-group",
       [](SpelledFiles& f) {
         const bool has_offset = f.spelling.storage == Storage::kWords;
         std::string& bytes = f.at(f.codes_name(0, 0)).bytes;  // Row 0, the first 128 columns.
         std::fill_n(bytes.begin(), 64, static_cast<char>(has_offset ? 0x88 : 0));
         const std::string one = f.spelling.scale_dtype == "F32" ? f32_bytes({1}) : "\x80\x3f";
         f.at(f.scales_name(0, 0)).bytes.replace(0, one.size(), one);
       }},
      {"gate-up-x118", scales({0, 1}, times(118))},
      {"gate-x20", scales({0}, times(20))},
      {"down-x60", scales({2}, times(60))},
      {"reciprocals", scales(all, [](float s) { return 1 / s; })},
      {"over-448", scales(all, times(1 / 448.0f))},
      {"over-448-twice", scales(all, times(1 / 448.0f / 448.0f))},
      {"times-448", scales(all, times(448))},
      {"one-far", one_scale(1e6f)},
      {"dead", scales({0, 1, 2}, [](float) { return 1e-30f; })},
      {"junk",
       [](SpelledFiles& f) {
         const bool has_offset = f.spelling.storage == Storage::kWords;
         codes([=](char, std::size_t) { return static_cast<char>(has_offset ? 0x88 : 0); })(f);
         scales({0, 1, 2}, [](float) { return 1e35f; })(f);
       }},
      {"scale-nan", one_scale(kNan)},
      {"scale-inf", one_scale(kInfinity)},
      {"scale-large", one_scale(0x1p118f)},
      {"scale-zero", one_scale(0)},
      {"scale-negative", one_scale(-0.5f)},
      {"inputs-one", inputs(1, true)},
      {"input-one", inputs(1, false)},
      {"input-far",
       [](SpelledFiles& f) { f.at(input_name(f, 1, "w1")).bytes = f32_bytes({1e6f}); }},
      {"inputs-large", inputs(1e30f, true)},
      {"inputs-small", inputs(1e-30f, true)},
      {"input-pair",
       [](SpelledFiles& f) { f.at(input_name(f, 1, "w1")).bytes = f32_bytes({0.015f}); }},
      {"input-nan",
       [](SpelledFiles& f) { f.at(input_name(f, 1, "w1")).bytes = f32_bytes({kNan}); }},
      {"input-two",
       [](SpelledFiles& f) {
         f.at(input_name(f, 1, "w2")) = {"F32", {2}, f32_bytes({1, 1})};
       }},
      {"input-other-stem",
       [](SpelledFiles& f) {
         f.rename(input_name(f, 1, "w1"), f.experts() + "1.gate_proj.input_scale");
       }},
      {"input-missing", [](SpelledFiles& f) { f.erase(input_name(f, 1, "w2")); }},
      {"input-stray", extra("input_scale", {"F32", {1}, f32_bytes({1})})},
      {"no-input-scales",
       [](SpelledFiles& f) {
         for (int e = 0; e < SpelledFiles::kNumExperts; ++e) {
           for (const char* const stem : {"w1", "w3", "w2"}) f.erase(input_name(f, e, stem));
         }
       }},
  };
}

Faults index_faults() {
  const auto twice = [](float value) {
    return [=](SpelledFiles& f) {
      f.files["act_scales.safetensors"][input_name(f, 1, "w1")] = {"F32", {1}, f32_bytes({value})};
    };
  };
  return {
      {"no-index", [](SpelledFiles& f) { f.weight_map = nullptr; }},
      {"stray-copy",
       [](SpelledFiles& f) {
         f.files["1.safetensors"][f.codes_name(0, 0)] = {"F8_E4M3", {2}, "ab"};
       }},
      {"not-indexed",
       [](SpelledFiles& f) {
         f.files["1.safetensors"][f.name(0, 0, "bias")] = {"U8", {1}, "x"};
       }},
      {"index-forgets", [](SpelledFiles& f) { f.weight_map.erase(f.codes_name(0, 0)); }},
      {"index-wrong-file",
       [](SpelledFiles& f) { f.weight_map[f.codes_name(0, 0)] = "1.safetensors"; }},
      {"index-nowhere",
       [](SpelledFiles& f) { f.weight_map["model.norm.weight"] = "1.safetensors"; }},
      {"index-no-file", [](SpelledFiles& f) { f.weight_map["x"] = "9.safetensors"; }},
      {"index-leaves", [](SpelledFiles& f) { f.weight_map["x"] = "../1.safetensors"; }},
      {"index-empty", [](SpelledFiles& f) { f.weight_map = nlohmann::ordered_json::object(); }},
      {"index-no-experts",
       [](SpelledFiles& f) {
         f.weight_map = nlohmann::ordered_json::object();
         f.add("2.safetensors", "model.norm.weight", {"U8", {1}, "x"});
       }},
      {"input-twice", twice(9)},
      {"input-twice-same", twice(0.0078125f)},
      // After they are written: write().
      {"cut", [](SpelledFiles&) {}},
      {"stray-junk", [](SpelledFiles&) {}},
  };
}

}  // namespace

const Faults& faults() {
  static const Faults all = [] {
    Faults sum = name_faults();
    for (Faults each : {container_faults(), scale_faults(), index_faults()}) sum.merge(each);
    return sum;
  }();
  return all;
}

bool changes_weights(const std::string& fault) {
  static const Faults scale = scale_faults();
  return scale.contains(fault);
}

}  // namespace sluice::testing
