// convert_fixture.h - small checkpoints of every layout, and what to compare of two of them.
#pragma once

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <bit>
#include <map>
#include <string>

#include "expect_error.h"
#include "raw_checkpoint.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/convert.h"
#include "sluice/lab/synthetic.h"
#include "sluice/quant.h"
#include "temp_dir.h"

namespace sluice::testing {

constexpr int kFirstLayer = 3;

inline SyntheticCheckpoint small_spec(const std::string& format, int group = 128) {
  ModelGeometry geometry = preset_geometry("tiny");
  geometry.num_experts = 4;
  geometry.group_size = group;
  return {.geometry = geometry, .format = format};
}

/// Tensors by name; files and their order do not matter.
inline void expect_same_tensors(const std::filesystem::path& a, const std::filesystem::path& b) {
  const auto left = RawCheckpoint(a).tensors(), right = RawCheckpoint(b).tensors();
  ASSERT_EQ(left.size(), right.size());
  for (const auto& [name, tensor] : left) {
    ASSERT_TRUE(right.contains(name)) << name;
    ASSERT_TRUE(right.at(name) == tensor) << name;
  }
}

/// All files, byte for byte.
inline std::map<std::string, std::string> file_contents(const std::filesystem::path& dir) {
  std::map<std::string, std::string> result;
  for (const auto& file : std::filesystem::directory_iterator(dir)) {
    result[file.path().filename().string()] = read_file(file.path());
  }
  return result;
}

inline std::vector<float> dequantized(const QuantMatrix& m) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < m.n() * m.k(); ++i) {
    const std::int64_t s = i / m.group_size;
    values.push_back(code_value(m.format, m.codes.as<std::uint8_t>(), i) *
                     scale_value(m.scales, s));
  }
  return values;
}

/// Bit for bit, through the readers; and the same static scales.
inline void expect_same_weights(const std::filesystem::path& a, const std::filesystem::path& b) {
  const Checkpoint left = Checkpoint::open(a), right = Checkpoint::open(b);
  ASSERT_EQ(left.moe_layers(), right.moe_layers());
  for (const int layer : left.moe_layers()) {
    const int count = left.geometry().num_experts;
    const ExpertWeights x = left.load_experts(layer, 0, count);
    const ExpertWeights y = right.load_experts(layer, 0, count);
    ASSERT_EQ(x.static_scales.has_value(), y.static_scales.has_value());
    for (std::size_t e = 0; e < x.experts.size(); ++e) {
      for (const auto member : {&Expert::gate, &Expert::up, &Expert::down}) {
        const auto p = dequantized(x.experts[e].*member), q = dequantized(y.experts[e].*member);
        ASSERT_EQ(p.size(), q.size());
        ASSERT_EQ(std::memcmp(p.data(), q.data(), p.size() * sizeof(float)), 0) << "expert " << e;
      }
    }
    const auto p = left.input_scales(layer), q = right.input_scales(layer);
    ASSERT_EQ(p.size(), q.size());
    for (std::size_t e = 0; e < p.size(); ++e) {
      EXPECT_EQ(p[e].w1, q[e].w1);
      EXPECT_EQ(p[e].w2, q[e].w2);
      EXPECT_EQ(p[e].w3, q[e].w3);
    }
  }
}

}  // namespace sluice::testing
