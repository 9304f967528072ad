// format_fixture.h - small checkpoints of every layout: what they must hold, and how they are
// spoiled.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/checkpoint_impl.h"
#include "expect_error.h"
#include "raw_checkpoint.h"
#include "sluice/checkpoint.h"
#include "sluice/quant.h"
#include "synthetic/random_weights.h"
#include "temp_dir.h"

namespace sluice::testing {

constexpr int kLayer = 3;

inline SyntheticCheckpoint spec_of(const std::string& format, int group = 128,
                                   DType scale_dtype = DType::kFloat32) {
  ModelGeometry geometry = preset_geometry("tiny");
  geometry.num_experts = 3;
  geometry.group_size = group;
  return {.geometry = geometry, .format = format, .scale_dtype = scale_dtype};
}

inline std::string name_of(int expert, const std::string& part) {
  return "model.layers.3.mlp.experts." + std::to_string(expert) + "." + part;
}

inline float scale_at(const QuantMatrix& m, std::int64_t i) {
  return m.scales.dtype == DType::kFloat32 ? m.scales.as<float>()[i]
                                           : bf16_to_float(m.scales.as<std::uint16_t>()[i]);
}

/// Codes byte for byte, scales as they are after rounding to their dtype, times `factor`.
inline void expect_same(const QuantMatrix& m, const SyntheticMatrix& expected, DType stored,
                        float factor = 1) {
  ASSERT_EQ(m.group_size, expected.group);
  ASSERT_EQ(m.n(), expected.n);
  ASSERT_EQ(m.k(), expected.k);
  ASSERT_EQ(std::memcmp(m.codes.data, expected.codes.data(), expected.codes.size()), 0);
  ASSERT_EQ(static_cast<std::size_t>(m.scales.shape.num_elements()), expected.scales.size());
  for (std::size_t i = 0; i < expected.scales.size(); ++i) {
    const float s = stored == DType::kBFloat16 ? bf16_to_float(bf16_from_float(expected.scales[i]))
                                               : expected.scales[i];
    ASSERT_EQ(scale_at(m, static_cast<std::int64_t>(i)), s * factor) << "scale " << i;
  }
}

inline void expect_experts(const Checkpoint& checkpoint, const SyntheticCheckpoint& spec,
                           float factor = 1) {
  const ExpertWeights weights = checkpoint.load_experts(kLayer, 0, 3);
  ASSERT_EQ(weights.geometry.group_size, spec.geometry.group_size);
  for (int e = 0; e < 3; ++e) {
    SyntheticExpert expected;
    fill_expert(spec, kLayer, e, expected);
    const Expert& expert = weights.experts[static_cast<std::size_t>(e)];
    expect_same(expert.gate, expected.matrices[0], spec.scale_dtype, factor);
    expect_same(expert.up, expected.matrices[1], spec.scale_dtype, factor);
    expect_same(expert.down, expected.matrices[2], spec.scale_dtype, factor);
  }
}

/// Opens and loads everything, whatever the format.
inline void read_all(const std::filesystem::path& dir) {
  const CheckpointData data = CheckpointData::open(dir);
  for (const int layer : data.moe_layers) {
    data.check_layer(layer);
    (void)data.input_scales(layer);
    for (int e = 0; e < data.geometry().num_experts; ++e) {
      ExpertStorage storage;
      if (data.format->weight_format()) {
        (void)data.load_expert(layer, e, storage);
        continue;
      }
      for (const MatrixLayout& matrix : matrix_layouts(data.geometry())) {
        std::vector<float> values(static_cast<std::size_t>(matrix.n * matrix.k));
        data.format->load_floats(data.layer_tensors(layer).experts[static_cast<std::size_t>(e)],
                                 matrix, values);
      }
    }
  }
}

/// A checkpoint of `spec` that `spoil` has changed; reading it must fail.
inline void expect_refused(const SyntheticCheckpoint& spec,
                           const std::function<void(RawCheckpoint&)>& spoil, ErrorCode code,
                           const std::vector<std::string>& parts) {
  const TempDir dir;
  write_synthetic_checkpoint(spec, dir / "good");
  RawCheckpoint raw(dir / "good");
  raw.write(dir / "same");
  read_all(dir / "same");
  spoil(raw);
  raw.write(dir / "bad");
  SCOPED_TRACE(spec.format);
  expect_error(code, parts, [&] { read_all(dir / "bad"); });
}

}  // namespace sluice::testing
