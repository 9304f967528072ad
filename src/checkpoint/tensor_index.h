// tensor_index.h - where every tensor of the routed experts lies, over all files of a checkpoint.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/expert_names.h"
#include "checkpoint/safetensors.h"
#include "core/mmap.h"
#include "sluice/checkpoint.h"
#include "sluice/tensor.h"

namespace sluice {

inline constexpr std::uint64_t kDigestSeed = 0xcbf29ce484222325U;

/// A tensor in its file. Empty if the checkpoint has none of this name.
struct TensorRef {
  std::shared_ptr<const MappedFile> file;
  SafetensorsEntry entry;
  std::uint64_t data_begin = 0;
  /// Its bytes, where they were read into memory instead of mapped. Whoever holds this TensorRef
  /// may change them.
  std::byte* read_bytes = nullptr;
  int expert = -1;  ///< Whose part of a tensor of all experts this is; -1: it is whole.

  [[nodiscard]] bool exists() const noexcept { return file != nullptr; }
  [[nodiscard]] std::size_t size() const noexcept { return entry.end - entry.begin; }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
    if (read_bytes != nullptr) return {read_bytes, size()};
    return file->bytes().subspan(data_begin + entry.begin, size());
  }
  /// MappedFile's, where bytes() are mapped.
  void will_need() const noexcept {
    if (read_bytes == nullptr) MappedFile::will_need(bytes());
  }
  void release() const noexcept {
    if (read_bytes == nullptr) MappedFile::release(bytes());
  }
};

/// Says where a tensor is, for messages: "DIR/model-00001-of-00002.safetensors: tensor NAME", with
/// ", expert 17" behind it for a part of a tensor of all experts.
[[nodiscard]] std::string place(const TensorRef& tensor);

/// Copies out.size() bytes of a tensor from `at` on, of the file as it is now unless they were read
/// before.   Throws: kIo; kCorruptFile naming file and tensor if the file has become shorter.
void read_tensor(const TensorRef& tensor, std::uint64_t at, std::span<std::byte> out);

/// What an expert has, by the canonical part of the name after "experts.17.": "gate_proj.weight"
/// also where the file says "w1.weight". TensorRef::entry has the file's own name.
struct ExpertTensors {
  struct Part {
    std::string name;
    TensorRef tensor;
  };
  std::vector<Part> parts;  ///< A dozen or so: searched one after the other.

  /// Null if there is none.
  [[nodiscard]] const TensorRef* find(std::string_view part) const noexcept;
};

struct LayerTensors {
  std::vector<ExpertTensors> experts;  ///< [num_experts]
};

struct TensorIndex {
  std::map<int, LayerTensors> layers;  ///< Those with at least one routed expert.
  std::vector<TensorRef> others;       ///< What is no part of a routed expert.
  ExpertSpelling spelling;             ///< Of all experts.
  /// Layers that have weights of all experts in one tensor, with the name of the first such; of
  /// biases where there are no weights like that.
  /// -1: the name does not tell the layer in a known place.
  std::map<int, std::string> fused;
  /// Layers with a tensor that lies among the experts and belongs to none, with its name.
  std::map<int, std::string> strays;
  /// Some names that look like experts' and were not read, for messages.
  std::vector<std::string> unread;
  /// Experts' tensors that the index does not name, with the file of each.
  std::map<std::string, std::string> left_out;
  std::vector<CheckpointWarning> warnings;  ///< One for each kind, with a count.
  std::vector<std::string> files;           ///< Names, in the order read.
  std::uint64_t digest = kDigestSeed;  ///< Of the files' names, sizes and headers, and the index.
  bool has_empty_map = false;          ///< The index names no tensor at all.

  /// What there is instead of the experts of `layer` that a message misses; begins with "; ".
  [[nodiscard]] std::string hint(int layer) const;
};

/// 64-bit FNV-1a, continued from `seed`.
[[nodiscard]] std::uint64_t digest_bytes(std::span<const std::byte> bytes,
                                         std::uint64_t seed = kDigestSeed) noexcept;

/// Input scales may lie in a file that the index does not name, and in two files.
[[nodiscard]] bool is_input_scale(std::string_view part) noexcept;

/// Reads every header. With model.safetensors.index.json, the shards are those it names, and a
/// tensor is where it says: another of that name, or one that it does not name, is left out with a
/// warning. Any other *.safetensors file contributes its input scales only (act_scales.safetensors
/// is published beside the index), and if it cannot be read, it is left out with a warning. Without
/// the index, every *.safetensors file counts.
/// Throws: kIo; kCorruptFile; kUnsupported (two spellings in one checkpoint, two tensors of one
/// name that the index does not decide between, an expert past `num_experts`).
[[nodiscard]] TensorIndex read_tensor_index(const std::filesystem::path& dir, int num_experts);

}  // namespace sluice
