// checkpoint_impl.h - what an open Checkpoint holds.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "checkpoint/model_config.h"
#include "checkpoint/tensor_index.h"
#include "sluice/checkpoint.h"

namespace sluice {

struct Checkpoint::Impl {
  std::filesystem::path dir;
  ModelConfig config;
  TensorIndex index;
  std::vector<int> moe_layers;
  std::string evidence;
  std::uint64_t identity = 0;

  /// Throws: kInvalidArgument listing the layers there are.
  [[nodiscard]] const LayerTensors& layer_tensors(int layer) const;
  /// Names, dtypes and shapes of all experts of a layer. Throws: kCorruptFile, kUnsupported.
  void check_layer(int layer) const;
};

}  // namespace sluice
