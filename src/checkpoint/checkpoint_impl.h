// checkpoint_impl.h - what an open Checkpoint holds; the converter works with it directly.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/formats/format.h"
#include "checkpoint/formats/nibbles.h"
#include "checkpoint/model_config.h"
#include "checkpoint/tensor_index.h"
#include "sluice/checkpoint.h"

namespace sluice {

struct CheckpointData {
  std::filesystem::path dir;
  ModelConfig config;
  TensorIndex index;
  std::unique_ptr<const Format> format;
  std::vector<int> moe_layers;
  std::string evidence;
  std::vector<std::string> unknown_quantization_keys;  ///< quantization_keys.h
  std::uint64_t identity = 0;
  std::vector<CheckpointWarning> warnings;  ///< Of the checkpoint as a whole.

  /// As Checkpoint::open().
  [[nodiscard]] static CheckpointData open(const std::filesystem::path& dir);

  [[nodiscard]] const ModelGeometry& geometry() const noexcept { return config.geometry; }
  /// Throws: kInvalidArgument listing the layers there are.
  [[nodiscard]] const LayerTensors& layer_tensors(int layer) const;
  /// Names, dtypes and shapes of all experts of a layer. Throws: kCorruptFile, kUnsupported.
  void check_layer(int layer) const;
  void check_is_of_all(int layer, const PartSpec& spec) const;
  /// One expert of a layer that check_layer() has seen, of the model's own widths. Throws: as
  /// Checkpoint::load_experts().
  [[nodiscard]] Expert load_expert(int layer, int expert, ExpertStorage& storage) const;
  /// One matrix of such an expert as [n, k] float32, for quantizing: of float formats exactly, of
  /// INT4 (code * scale) * factor of the channel, each product rounded. Throws: the same.
  void load_floats(int layer, int expert, const MatrixLayout& matrix, std::span<float> out) const;
  /// As Checkpoint::input_scales().
  [[nodiscard]] std::vector<InputScales> input_scales(int layer) const;
  /// Throws: kInvalidArgument unless [first, first + count) are experts.
  void check_range(int first, int count) const;
  /// Weights crowd around 0. Canonical codes that crowd around -8 were read the wrong way.
  /// Throws: kCorruptFile naming the expert.
  void check_nibbles(int layer, int expert, const NibbleEvidence& nibbles) const;
  /// Throws: kUnsupported if the experts are floats.
  void require_codes() const;
};

struct Checkpoint::Impl : CheckpointData {};

/// What config.json says that the tensors do not bear out: prediction layers that are not there,
/// exclusions of experts that are quantized, groups that do not target them; what nobody knows of
/// it: keys of quantization_config, a model type; and what read_model_config() had to say.
[[nodiscard]] std::vector<CheckpointWarning> config_warnings(const CheckpointData& data);

/// Canonical codes of some matrices, by nibble. Reads a little of each.
[[nodiscard]] NibbleEvidence canonical_nibbles(const Expert& expert);
[[nodiscard]] NibbleEvidence canonical_nibbles(const QuantMatrix& matrix);

}  // namespace sluice
