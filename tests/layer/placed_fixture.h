// placed_fixture.h - layers whose experts lie in slots, and what they are compared with.
#pragma once

#include <vector>

#include "layer/group_fixture.h"
#include "support/modes_and_wires.h"
#include "support/random_placement.h"

namespace sluice::testing {

/// Recipe i for the low-latency mode, another one for the normal mode.
inline ModeRecipes recipes_of_layer(int i) {
  const auto all = named_recipes();
  const auto at = [&](int n) { return all[static_cast<std::size_t>(n) % all.size()].recipe; };
  return {.low_latency = at(i), .normal = at(i + 2)};
}

inline LayerGroupConfig slots_config(int num_slots) {
  LayerGroupConfig config = group_config();
  config.num_slots = num_slots;
  return config;
}

/// What layer i gives for a rank's own tokens on a single rank, where expert e is in slot e.
class OnOneRank {
 public:
  OnOneRank(const LayersOnDisk& files, const std::vector<int>& which)
      : transport_(std::move(make_inproc_transports(1).front())),
        backend_(make_backend({.num_threads = 1})),
        group_(LayerGroup::create(group_config(), *transport_, *backend_)) {
    for (const int i : which) {
      layers_.push_back(group_.add_layer(files.checkpoint(), files.layer(i), recipes_of_layer(i)));
    }
  }
  /// `at`: of the layers named.
  std::vector<std::uint16_t> forward_of(std::size_t at, Mode mode, const Workload& load) {
    return forward(layers_[at], mode, load);
  }

 private:
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Backend> backend_;
  LayerGroup group_;
  std::vector<Layer> layers_;
};

}  // namespace sluice::testing
