// Calls that are kept: what their tensors hold is read each time they run.
#include <algorithm>
#include <vector>

#include "local_fixture.h"

namespace sluice::testing {
namespace {

TEST_F(LocalExpertsTest, KeptCallsReadTheirTensorsAnew) {
  LocalGroup group = LocalGroup::create(config(), *backend_);
  LocalExperts layer = group.add_layer(weights());
  Workload load = tokens();
  std::vector<std::uint16_t> y(load.x.size(), kPoison);
  LocalCall call = layer.keep(load.x_view(), load.routing_view(), view_of(y));
  EXPECT_THAT(y, ::testing::Each(kPoison));  // Nothing runs yet.
  for (const std::int64_t first : {0, 100, 0}) {
    const Workload other = tokens(kTokens, first);
    std::ranges::copy(other.x, load.x.begin());
    std::ranges::copy(other.topk_idx, load.topk_idx.begin());
    std::ranges::copy(other.topk_weights, load.topk_weights.begin());
    call.run({});
    EXPECT_EQ(y, forward(layer, other)) << first;
  }
  const Workload none = tokens(0);
  std::vector<std::uint16_t> no_rows;
  layer.keep(none.x_view(), none.routing_view(), view_of(no_rows)).run({});
  EXPECT_THROW((void)layer.keep(load.x_view(), none.routing_view(), view_of(y)), Error);
}

TEST_F(LocalExpertsTest, KeptBatchesLookAtTheirCountsAnew) {
  constexpr int kMaxM = 3;
  const ModelGeometry& g = geometry();
  LocalGroup group = LocalGroup::create(config(), *backend_);
  LocalExperts layer = group.add_layer(weights(), parse_recipe("direct-bf16"));
  layer.reserve_batch(std::int64_t{g.num_experts} * kMaxM);
  const Workload load = tokens(std::int64_t{g.num_experts} * kMaxM);
  std::vector<std::int32_t> count(static_cast<std::size_t>(g.num_experts), 1);
  std::vector<std::uint16_t> y(load.x.size(), kPoison), expected(load.x.size(), kPoison);
  const auto view = [&](std::vector<std::uint16_t>& rows) {
    MutableTensorView v = view_of(rows);
    v.shape = {g.num_experts, kMaxM, g.hidden};
    return v;
  };
  ExpertBatch batch;
  batch.layout = Mode::kLowLatency, batch.x = load.x_view();
  batch.x.shape = {g.num_experts, kMaxM, g.hidden};
  batch.num_rows = TensorView(count.data(), DType::kInt32, {g.num_experts}, Device{});
  LocalCall call = layer.keep_batch(batch, view(y));
  for (const int rows : {1, 0, kMaxM}) {
    count[1] = rows;
    layer.forward_batch(batch, view(expected), {});
    call.run({});
    EXPECT_EQ(y, expected) << rows;
  }
  count[1] = kMaxM + 1;
  expect_refused("num_rows", [&] { call.run({}); });
}

}  // namespace
}  // namespace sluice::testing
