// tensor_index.h - where every tensor of the routed experts lies, over all files of a checkpoint.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "core/mmap.h"
#include "sluice/tensor.h"

namespace sluice {

inline constexpr std::uint64_t kDigestSeed = 0xcbf29ce484222325U;

/// The nine tensors of one expert, in the order of their names below.
enum class ExpertPart {
  kGateWeight,
  kGateScale,
  kUpWeight,
  kUpScale,
  kDownWeight,
  kDownScale,
  kW1InputScale,
  kW2InputScale,
  kW3InputScale,
};
inline constexpr int kNumExpertParts = 9;

/// "gate_proj.weight", "gate_proj.weight_scale_inv", ..., "w1.input_scale", ...
[[nodiscard]] const char* to_string(ExpertPart part) noexcept;
/// "model.layers.3.mlp.experts.17.gate_proj.weight"
[[nodiscard]] std::string tensor_name(int layer, int expert, ExpertPart part);

/// A tensor in its file. Empty if the checkpoint has none of this name.
struct TensorRef {
  std::shared_ptr<const MappedFile> file;
  SafetensorsEntry entry;
  std::uint64_t data_begin = 0;

  [[nodiscard]] bool exists() const noexcept { return file != nullptr; }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
    return file->bytes().subspan(data_begin + entry.begin, entry.end - entry.begin);
  }
};

using ExpertTensors = std::array<TensorRef, kNumExpertParts>;

struct LayerTensors {
  std::vector<ExpertTensors> experts;      ///< [num_experts]
  std::vector<std::string> unknown_parts;  ///< Tensors of an expert that w4afp8 does not have.
};

struct TensorIndex {
  std::map<int, LayerTensors> layers;  ///< Those with at least one routed expert.
  std::vector<std::string> files;      ///< Names, in the order read.
  std::uint64_t digest = kDigestSeed;  ///< Of the files' names, sizes and headers, and the index.
};

/// 64-bit FNV-1a, continued from `seed`.
[[nodiscard]] std::uint64_t digest_bytes(std::span<const std::byte> bytes,
                                         std::uint64_t seed = kDigestSeed) noexcept;

/// Reads every header. With model.safetensors.index.json, the shards are those it names; any other
/// *.safetensors file contributes its input scales only (act_scales.safetensors is published
/// beside the index). Without it, every *.safetensors file counts.
/// Throws: kIo, kCorruptFile.
[[nodiscard]] TensorIndex read_tensor_index(const std::filesystem::path& dir, int num_experts);

}  // namespace sluice
