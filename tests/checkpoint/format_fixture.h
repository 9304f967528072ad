// format_fixture.h - small checkpoints of every layout: what they must hold, and how they are
// spoiled.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "checkpoint/checkpoint_impl.h"
#include "checkpoint/expert_reader.h"
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
  return scale_value(m.scales, i);
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

inline const QuantMatrix& matrix_of(const Expert& expert, MatrixRole role) {
  return role == MatrixRole::kGate ? expert.gate
         : role == MatrixRole::kUp ? expert.up
                                   : expert.down;
}

/// Memory that an ExpertReader reads into, full of what must not be taken for anything.
class Slot {
 public:
  explicit Slot(std::size_t bytes) : memory_(bytes + 2 * kAlignment, std::byte{0x5a}) {
    void* at = memory_.data();
    std::size_t room = memory_.size();
    bytes_ = {static_cast<std::byte*>(std::align(kAlignment, bytes, at, room)), bytes};
  }
  [[nodiscard]] std::span<std::byte> bytes() const { return bytes_; }

 private:
  static constexpr std::size_t kAlignment = 256;
  std::vector<std::byte> memory_;
  std::span<std::byte> bytes_;
};

/// Reads matrices as a loader does, in pieces of `max_rows` rows, and puts the pieces together.
class MatrixReader {
 public:
  explicit MatrixReader(ExpertReader& reader, std::int64_t max_rows = 1 << 20)
      : reader_(reader),
        max_rows_(max_rows),
        scales_(reader.scales_bytes()),
        piece_(reader.piece_bytes()),
        spare_(reader.piece_bytes()) {}

  /// Valid until the next call.
  QuantMatrix read(int index, MatrixRole role) {
    QuantMatrix matrix = matrix_of(reader_.shapes().experts[static_cast<std::size_t>(index)], role);
    matrix.scales = reader_.read_scales(index, role, scales_.bytes());
    bias_ = reader_.read_bias(index, role);
    if (matrix.has_bias()) matrix.bias.data = bias_.data();
    codes_.clear();
    const std::int64_t most = std::min(max_rows_, reader_.piece_rows(role));
    for (std::int64_t row = 0; row < matrix.n(); row += most) {
      const std::int64_t rows = std::min(most, matrix.n() - row);
      const auto piece = piece_.bytes().first(static_cast<std::size_t>(rows * matrix.k() / 2));
      reader_.read_rows(index, role, row, piece, spare_.bytes());
      codes_.insert(codes_.end(), piece.begin(), piece.end());
    }
    matrix.codes.data = codes_.data();
    return matrix;
  }

 private:
  ExpertReader& reader_;
  std::int64_t max_rows_;
  Slot scales_, piece_, spare_;
  std::vector<std::byte> codes_;
  std::vector<float> bias_;
};

/// Experts [first, first + count) of a layer, read matrix by matrix, are those that are mapped.
inline void expect_reads_alike(const Checkpoint& checkpoint, int layer, int first, int count) {
  const ExpertWeights mapped = checkpoint.load_experts(layer, first, count);
  ExpertReader reader(checkpoint, layer, first, count);
  EXPECT_EQ(reader.shapes().first_expert, first);
  EXPECT_EQ(reader.shapes().bytes(), mapped.bytes());
  EXPECT_EQ(reader.shapes().geometry.activation, mapped.geometry.activation);
  EXPECT_EQ(reader.shapes().static_scales.has_value(), mapped.static_scales.has_value());
  MatrixReader matrices(reader, count == 1 ? 1 << 20 : 32);  // Whole, or in pieces.
  for (int e = 0; e < count; ++e) {
    for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
      const QuantMatrix read = matrices.read(e, role);
      const auto at = static_cast<std::size_t>(e);
      const QuantMatrix& expected = matrix_of(mapped.experts[at], role);
      const QuantMatrix& shape = matrix_of(reader.shapes().experts[at], role);
      ASSERT_EQ(read.group_size, expected.group_size);
      ASSERT_EQ(read.has_bias(), expected.has_bias());
      if (read.has_bias()) {
        ASSERT_EQ(read.bias.shape, expected.bias.shape);
        ASSERT_EQ(std::memcmp(read.bias.data, expected.bias.data, expected.bias.bytes()), 0);
      }
      for (const auto& [r, x, s] : {std::tuple{read.codes, expected.codes, shape.codes},
                                    {read.scales, expected.scales, shape.scales}}) {
        ASSERT_EQ(r.dtype, x.dtype);
        ASSERT_EQ(s.dtype, x.dtype);
        ASSERT_EQ(r.shape, x.shape);
        ASSERT_EQ(s.shape, x.shape);
        ASSERT_EQ(s.data, nullptr);
        ASSERT_EQ(std::memcmp(r.data, x.data, x.bytes()), 0) << "expert " << e;
      }
    }
  }
  EXPECT_EQ(reader.bytes_read(), reader.file_bytes());
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
  expect_reads_alike(checkpoint, kLayer, 0, 3);
  expect_reads_alike(checkpoint, kLayer, 1, 1);
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

/// The same by an ExpertReader, where there are readers.
inline void read_by_reader(const std::filesystem::path& dir) {
  const Checkpoint checkpoint = Checkpoint::open(dir);
  for (const int layer : checkpoint.moe_layers()) {
    ExpertReader reader(checkpoint, layer, 0, checkpoint.geometry().num_experts);
    MatrixReader matrices(reader);
    for (int e = 0; e < checkpoint.geometry().num_experts; ++e) {
      for (const MatrixRole role : {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown}) {
        (void)matrices.read(e, role);
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
  const bool has_reader = spec.format != "bf16" && spec.format != "fp8-block";
  if (has_reader) expect_error(code, parts, [&] { read_by_reader(dir / "bad"); });
}

}  // namespace sluice::testing
