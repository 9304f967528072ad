// output_plan.h - where every byte of a result goes, known before the first is written.
//
//   job 0 .. J-1:   an expert of a layer, in order; then each other tensor of the model
//   shard:          header | tensors of consecutive jobs, back to back
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint_impl.h"
#include "convert/target_format.h"

namespace sluice {

/// Where one tensor goes.
struct OutputPlace {
  std::size_t shard = 0, tensor = 0;  ///< Of OutputShard::tensors.
  std::uint64_t offset = 0, bytes = 0;
};

/// One piece of work: all or nothing.
struct OutputJob {
  int layer = -1, expert = -1;        ///< -1 = a tensor that is copied.
  const TensorRef* tensor = nullptr;  ///< The tensor that is copied.
  std::vector<OutputPlace> places;    ///< Of the expert's tensors, or of the one.
  std::uint64_t bytes = 0;
};

struct OutputShard {
  std::string name;
  std::string header;
  std::vector<SafetensorsEntry> tensors;
  std::uint64_t file_bytes = 0;
};

struct OutputPlan {
  std::vector<OutputJob> jobs;
  std::vector<OutputShard> shards;
  std::uint64_t bytes = 0;  ///< Of all tensors.

  /// model.safetensors.index.json
  [[nodiscard]] std::string index_text() const;
  /// Of names, sizes and headers: equal plans put the same tensors in the same places.
  [[nodiscard]] std::uint64_t digest() const;
};

/// Throws: kInvalidArgument if it takes too many shards.
[[nodiscard]] OutputPlan plan_output(const CheckpointData& source, const TargetFormat& target,
                                     const TargetSpec& spec, const std::vector<int>& layers,
                                     bool experts_only, std::size_t max_shard_bytes);

}  // namespace sluice
