// model_config.h - what config.json and hf_quant_config.json say about a checkpoint.
#pragma once

#include <filesystem>
#include <string>

#include "checkpoint/formats/quantization_config.h"
#include "sluice/checkpoint.h"

namespace sluice {

struct ModelConfig {
  ModelGeometry geometry;
  int num_layers = 0;             ///< 0 if not given.
  int first_k_dense_replace = 0;  ///< Layers below this have no routed experts.
  QuantizationConfig quantization;
  std::string text;  ///< The bytes of the files read, for Checkpoint::identity().
};

/// Throws: kIo (no config.json), kCorruptFile (not JSON, a field of the wrong kind or out of range,
/// two fields that contradict each other). The geometry's group_size is for the format to say.
[[nodiscard]] ModelConfig read_model_config(const std::filesystem::path& dir);

}  // namespace sluice
