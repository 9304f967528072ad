// inspect_sample.h - a look into some experts of a layer: ranges of scales, counts of codes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <vector>

#include "sluice/checkpoint.h"

namespace sluice::cli {

struct Range {
  float min = 0, median = 0, max = 0;
};

/// Gathered from the sampled experts of one layer.
struct LayerSample {
  int layer = 0, num_sampled = 0;
  std::array<Range, 3> weight_scales;  // gate, up, down
  Range w1, w2, w3;
  std::optional<StaticScales> static_scales;
  WeightFormat weight_format = WeightFormat::kInt4;
  std::array<std::int64_t, 16> codes{};  // by nibble ^ 8: of int4, by value + 8
  std::size_t expert_bytes = 0;
  DType scale_dtype = DType::kFloat32;
};

/// At most `limit` of 0 .. count - 1, first and last included; 0 = all.
[[nodiscard]] std::vector<int> spread(int count, int limit);

/// Throws: as Checkpoint::load_experts().
[[nodiscard]] LayerSample sample_layer(const Checkpoint& checkpoint, int layer, int max_experts);

/// Weights crowd around 0, so a sample read the right way has few codes at the ends. The opposite
/// is refused when experts are loaded.
struct NibbleShares {
  double near_0 = 0;     ///< Codes -1, 0, 1.
  double near_ends = 0;  ///< Codes 7, -8, -7: what those would be, stored the other way.
  [[nodiscard]] bool is_borne_out() const { return near_0 > 2 * near_ends; }
};

[[nodiscard]] NibbleShares nibble_shares(const LayerSample& sample);

[[nodiscard]] nlohmann::ordered_json to_json(const LayerSample& sample);
void print_layers(std::span<const LayerSample> samples, int num_experts);

}  // namespace sluice::cli
