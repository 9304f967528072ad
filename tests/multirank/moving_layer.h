// moving_layer.h - a small layer whose experts change ranks between calls, and what it must give.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "core/counter_rng.h"
#include "sluice/backend.h"
#include "sluice/lab/workload.h"
#include "sluice/layer.h"
#include "sluice/transport.h"

namespace sluice::testing {

/// 8 experts in 12 slots; weights and tokens follow from numbers alone.
class MovingLayer {
 public:
  MovingLayer(Transport& transport, Mode mode, std::chrono::milliseconds timeout)
      : mode_(mode), backend_(make_backend({.num_threads = 1})) {
    const ModelGeometry geometry{
        .name = "moving", .num_experts = 8, .num_topk = 2, .hidden = 256, .intermediate = 128};
    load_ = make_workload({.num_experts = 8, .num_topk = 2, .hidden = 256, .seed = 5},
                          transport.rank() * 8, 8 - transport.rank() % 2);
    group_.emplace(LayerGroup::create({.geometry = geometry,
                                       .low_latency = {.max_tokens_per_rank = 8},
                                       .normal = {.max_tokens_per_rank = 8},
                                       .num_slots = 12,
                                       .peer_timeout = timeout},
                                      transport, *backend_));
    const Placement placement = Placement::even(8, transport.num_ranks(), 12);
    LayerSpec spec{.name = "moving layer", .placement = placement};
    spec.weights.geometry = geometry;
    for (const int e : placement.slot_experts(transport.rank())) {
      spec.weights.experts.push_back(expert(static_cast<std::uint64_t>(std::max(0, e))));
    }
    layer_.emplace(group_->add_layer(spec));
  }

  /// Calls it; false if the bits are not those of the first call.
  bool forward_is_exact() {
    std::vector<std::uint16_t> y(load_.x.size(), 0x7fc1);
    MutableTensorView view;
    view.data = y.data(), view.dtype = DType::kBFloat16, view.shape = load_.x_view().shape;
    layer_->forward(mode_, load_.x_view(), load_.routing_view(), view, {});
    if (expected_.empty()) expected_ = y;
    return y == expected_;
  }
  /// Every expert to the next rank, with one replica more in an empty slot.
  void move() {
    const Placement& now = layer_->placement();
    std::vector<int> slots(now.slot_experts().begin(), now.slot_experts().end());
    std::ranges::rotate(slots, slots.begin() + now.slots_per_rank());
    const auto empty = std::ranges::find(slots, int{kEmptySlot});
    if (empty != slots.end()) *empty = 0;
    (void)layer_->rebalance(Placement::create(8, now.num_ranks(), slots), {});
  }

 private:
  Expert expert(std::uint64_t number) {
    const auto matrix = [&](std::uint64_t which, std::int64_t n, std::int64_t k) {
      const CounterRng random(number, which);
      auto& codes = memory_.emplace_back(static_cast<std::size_t>(n * k / 2));
      for (std::size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<std::byte>(random.bits(i));
      }
      auto& scales = scales_.emplace_back(static_cast<std::size_t>(n * k / 128));
      for (std::size_t i = 0; i < scales.size(); ++i) {
        scales[i] = 0.01f + 0.01f * static_cast<float>(random.uniform(i + codes.size()));
      }
      QuantMatrix m;
      m.group_size = 128;
      m.codes = {codes.data(), DType::kPackedInt4, Shape{n, k / 2}};
      m.scales = {scales.data(), DType::kFloat32, Shape{n, k / 128}};
      return m;
    };
    return {.gate = matrix(0, 128, 256), .up = matrix(1, 128, 256), .down = matrix(2, 256, 128)};
  }

  Mode mode_;
  std::unique_ptr<Backend> backend_;
  Workload load_;
  std::vector<std::vector<std::byte>> memory_;
  std::vector<std::vector<float>> scales_;
  std::vector<std::uint16_t> expected_;
  std::optional<LayerGroup> group_;
  std::optional<Layer> layer_;
};

}  // namespace sluice::testing
