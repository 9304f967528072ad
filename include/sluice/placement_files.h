// placement_files.h - rows of experts and placements as JSON files. docs/formats.md has the bytes.
//
//   ExpertRows: what a run or a server counted  --balance()-->  LayerPlacement of each layer
//
// Readers are strict: a key that is unknown, missing or there twice, or a value that cannot be, is
// refused by name.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "sluice/placement.h"

namespace sluice {

/// Rows of the experts of one layer, over time: [num_steps][num_experts]. All together are at most
/// 2^53, so that every sum is exact.
struct LayerRows {
  int layer = 0;
  std::vector<std::vector<std::int64_t>> steps = {};

  /// Of the last `num_steps` steps together, 0: of all. [num_experts]
  /// Throws: kInvalidArgument for more steps than there are.
  [[nodiscard]] std::vector<std::int64_t> sum(int num_steps = 0) const;
};

/// Of layers with as many experts and steps.
struct ExpertRows {
  int num_experts = 0;
  std::vector<LayerRows> layers = {};  ///< In the order of the file, each layer once.
};

/// Of one layer. Layers of a file have as many experts, ranks and slots.
struct LayerPlacement {
  int layer = 0;
  Placement placement = {};
};

/// Throws: kIo; kCorruptFile naming file, byte and key; kUnsupported for a later version.
[[nodiscard]] ExpertRows read_expert_rows(const std::filesystem::path& path);
[[nodiscard]] std::vector<LayerPlacement> read_placements(const std::filesystem::path& path);

/// Throws: kInvalidArgument for what no reader would take; kIo naming the file.
void write_expert_rows(const std::filesystem::path& path, const ExpertRows& rows);
void write_placements(const std::filesystem::path& path,
                      std::span<const LayerPlacement> placements);

}  // namespace sluice
