// local_fixture.h - a layer's experts for local calls on the CPU, and an engine beside them.
#pragma once

#include <gmock/gmock.h>

#include "layer_fixture.h"
#include "sluice/local_experts.h"

namespace sluice::testing {

inline constexpr float kFactor = 2.5f;
inline constexpr int kTokens = 11;
inline constexpr std::uint16_t kPoison = 0x7fc1;  // A NaN that nothing writes.

template <class Call>
void expect_refused(const char* text, const Call& call) {
  try {
    call();
    ADD_FAILURE() << "not refused: " << text;
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr(text));
  }
}

class LocalExpertsTest : public SmallLayerTest {
 protected:
  static const ModelGeometry& geometry() { return checkpoint_->geometry(); }
  static LocalGroupConfig config(int max_tokens = kTokens) {
    return {.hidden = geometry().hidden,
            .intermediate = geometry().intermediate,
            .max_entries = std::int64_t{max_tokens} * geometry().num_topk,
            .routed_scaling_factor = kFactor};
  }
  static ExpertWeights weights(int first = 0, int count = small_geometry().num_experts) {
    return checkpoint_->load_experts(checkpoint_->moe_layers().front(), first, count);
  }
  static Workload tokens(std::int64_t count = kTokens, std::int64_t first = 0) {
    const ModelGeometry& g = geometry();
    return make_workload(
        {.num_experts = g.num_experts, .num_topk = g.num_topk, .hidden = g.hidden, .seed = 7},
        first, count);
  }
  static MutableTensorView view_of(std::vector<std::uint16_t>& y) {
    MutableTensorView view;
    view.data = y.data(), view.dtype = DType::kBFloat16;
    view.shape = {static_cast<std::int64_t>(y.size()) / geometry().hidden, geometry().hidden};
    return view;
  }
  static std::vector<std::uint16_t> forward(LocalExperts& layer, const Workload& load) {
    std::vector<std::uint16_t> y(load.x.size(), kPoison);
    layer.forward(load.x_view(), load.routing_view(), view_of(y), {});
    return y;
  }
  static std::vector<std::uint16_t> engine(const Recipe& recipe, std::vector<std::int64_t> tokens) {
    return run_layer(
               *checkpoint_,
               {.tokens = std::move(tokens), .recipe = recipe, .routed_scaling_factor = kFactor})
        .all_y();
  }

  std::unique_ptr<Backend> backend_ = make_backend({.num_threads = 2});
};

}  // namespace sluice::testing
