// group_fixture.h - a checkpoint of several small layers, and a rank's tokens for them.
#pragma once

#include <gtest/gtest.h>

#include <optional>
#include <vector>

#include "checkpoint/temp_dir.h"
#include "sluice/backend.h"
#include "sluice/checkpoint.h"
#include "sluice/engine.h"
#include "sluice/error.h"
#include "sluice/lab/synthetic.h"
#include "sluice/lab/workload.h"
#include "sluice/layer.h"
#include "sluice/transport.h"

namespace sluice::testing {

inline constexpr int kTokens = 5;     ///< Of each rank; rank 1 has one less.
inline constexpr int kNumLayers = 7;  ///< One for each recipe.

inline ModelGeometry group_geometry() {
  return {.name = "group", .num_experts = 8, .num_topk = 3, .hidden = 256, .intermediate = 128};
}

/// Each process writes its own: the same bytes.
class LayersOnDisk {
 public:
  explicit LayersOnDisk(SyntheticCheckpoint spec = {.geometry = group_geometry(),
                                                    .num_layers = kNumLayers}) {
    write_synthetic_checkpoint(spec, dir_ / "checkpoint");
    checkpoint_.emplace(Checkpoint::open(dir_ / "checkpoint"));
  }
  [[nodiscard]] const Checkpoint& checkpoint() const { return *checkpoint_; }
  /// Layer number `i` of those there are.
  [[nodiscard]] int layer(int i) const {
    return checkpoint_->moe_layers().at(static_cast<std::size_t>(i));
  }

 private:
  TempDir dir_;
  std::optional<Checkpoint> checkpoint_;
};

inline LayerGroupConfig group_config() {
  return {.geometry = group_geometry(),
          .low_latency = {.max_tokens_per_rank = kTokens},
          .normal = {.max_tokens_per_rank = kTokens},
          .routed_scaling_factor = 2.5f,
          .peer_timeout = std::chrono::milliseconds(20'000)};
}

/// Tokens of rank `rank`; another `stream` of them has other values and other routing.
inline Workload tokens_of(int rank, std::uint64_t stream = 0) {
  const ModelGeometry g = group_geometry();
  return make_workload(
      {.num_experts = g.num_experts, .num_topk = g.num_topk, .hidden = g.hidden, .seed = 7},
      static_cast<std::int64_t>(stream) * 1000 + rank * kTokens, kTokens - (rank == 1));
}

/// Output of a call: poisoned until it is written.
class OutputRows {
 public:
  explicit OutputRows(const Workload& load) : bits_(load.x.size(), 0x7fc1) {
    view_.data = bits_.data(), view_.dtype = DType::kBFloat16, view_.shape = load.x_view().shape;
  }
  [[nodiscard]] MutableTensorView view() const { return view_; }
  [[nodiscard]] const std::vector<std::uint16_t>& bits() const { return bits_; }

 private:
  std::vector<std::uint16_t> bits_;
  MutableTensorView view_;
};

inline std::vector<std::uint16_t> forward(Layer& layer, Mode mode, const Workload& load) {
  OutputRows y(load);
  layer.forward(mode, load.x_view(), load.routing_view(), y.view(), {});
  return y.bits();
}

}  // namespace sluice::testing
