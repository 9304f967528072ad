// Layers that share buffers on a device: the bits of separate engines, on one stream and on two, in
// graphs of all layers, and in a graph of two streams.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "layer/group_fixture.h"
#include "sluice/lab/ranks.h"
#include "support/counting.h"
#include "support/cuda_fixture.h"
#include "support/modes_and_wires.h"

namespace sluice::testing {
namespace {

class CudaLayerGroupTest : public CudaBackendTest {
 protected:
  /// One call's tensors on the device.
  struct Call {
    std::int64_t num_tokens = 0;
    std::size_t elements = 0;
    std::unique_ptr<DeviceBuffer> x, idx, weights, y;
  };
  Call call_of(std::uint64_t stream) {
    const Workload load = tokens_of(0, stream);
    return {load.num_tokens,
            load.x.size(),
            upload(load.x),
            upload(load.topk_idx),
            upload(load.topk_weights),
            upload(std::vector<std::uint16_t>(load.x.size(), 0x7fc1))};
  }
  [[nodiscard]] TensorView x_of(const Call& c) const {
    return {c.x->data(), DType::kBFloat16, Shape{c.num_tokens, group_geometry().hidden},
            backend_->device()};
  }
  [[nodiscard]] Routing routing_of(const Call& c) const {
    const Shape entries{c.num_tokens, group_geometry().num_topk};
    return {.topk_idx = {c.idx->data(), DType::kInt32, entries, backend_->device()},
            .topk_weights = {c.weights->data(), DType::kFloat32, entries, backend_->device()}};
  }
  [[nodiscard]] MutableTensorView y_of(const Call& c) const {
    MutableTensorView view;
    view.data = c.y->data(), view.dtype = DType::kBFloat16, view.device = backend_->device();
    view.shape = Shape{c.num_tokens, group_geometry().hidden};
    return view;
  }
  void forward_on(Stream stream, Layer& layer, Mode mode, const Call& c) const {
    layer.forward(mode, x_of(c), routing_of(c), y_of(c), stream);
  }
  /// After everything on the device; the output is poisoned again.
  std::vector<std::uint16_t> take(const Call& c) {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    auto bits = download<std::uint16_t>(*c.y, c.elements);
    const std::vector<std::uint16_t> poison(c.elements, 0x7fc1);
    backend_->copy_from_host(c.y->data(), poison.data(), poison.size() * 2, stream_);
    return bits;
  }
  static ModeRecipes recipes(int i) {
    const auto all = named_recipes();
    const auto at = [&](int n) { return all[static_cast<std::size_t>(n) % all.size()].recipe; };
    return {.low_latency = at(i), .normal = at(i + 2)};
  }
  LayerSpec spec(int i) const { return read_layer(files_.checkpoint(), files_.layer(i), 0, 1); }
  std::vector<Layer> make_layers(LayerGroup& group, int count = kNumLayers) const {
    std::vector<Layer> layers;
    for (int i = 0; i < count; ++i) layers.push_back(group.add_layer(spec(i), recipes(i)));
    return layers;
  }

  std::vector<std::unique_ptr<Transport>> transports_ = make_inproc_transports(1);
  LayersOnDisk files_;
};

TEST_F(CudaLayerGroupTest, MixedRecipesGiveTheBitsOfSeparateEngines) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  std::vector<Layer> layers = make_layers(group);
  const Call c = call_of(0);
  for (int i = 0; i < kNumLayers; ++i) {
    Engine engine = Engine::create({.layer = files_.layer(i),
                                    .low_latency = recipes(i).low_latency,
                                    .normal = recipes(i).normal,
                                    .max_tokens_per_rank = kTokens,
                                    .routed_scaling_factor = 2.5f},
                                   files_.checkpoint(), *transports_[0], *backend_);
    for (const Mode mode : kModes) {
      forward_on(stream_, layers[static_cast<std::size_t>(i)], mode, c);
      const auto together = take(c);
      forward_on(stream_, engine, mode, c);
      EXPECT_EQ(together, take(c)) << "layer " << i << ", " << to_string(mode);
    }
  }
}

TEST_F(CudaLayerGroupTest, CallsOnTwoStreamsTakeTurns) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  std::vector<Layer> layers = make_layers(group);
  const auto other = make_backend({.device = {Device::Kind::kCuda, 0}});
  const Stream streams[] = {stream_, other->stream()};
  std::vector<Call> calls;
  std::vector<std::vector<std::uint16_t>> expected;
  for (int i = 0; i < kNumLayers; ++i) {
    calls.push_back(call_of(static_cast<std::uint64_t>(i)));
    forward_on(stream_, layers[static_cast<std::size_t>(i)], kModes[i % 2], calls.back());
    expected.push_back(take(calls.back()));
  }
  for (int round = 0; round < 50; ++round) {
    for (std::size_t i = 0; i < layers.size(); ++i) {
      forward_on(streams[i % 2], layers[i], kModes[i % 2], calls[i]);
    }
    for (std::size_t i = 0; i < layers.size(); ++i) {
      ASSERT_EQ(take(calls[i]), expected[i]) << "round " << round << " layer " << i;
    }
  }
}

/// The kernels take one kind of scales for all experts of a layer; others would be misread.
TEST_F(CudaLayerGroupTest, ExpertsWithScalesOfTwoKindsAreRefused) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  LayerSpec mixed = read_layer(files_.checkpoint(), files_.layer(0), 0, 1);
  mixed.weights.experts[1].down.scales.dtype = DType::kBFloat16;
  try {
    (void)group.add_layer(mixed);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << error.what();
  }
}

TEST_F(CudaLayerGroupTest, AGraphOfAllLayersStaysValidWhenOthersAreAdded) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  std::vector<Layer> layers = make_layers(group, 2);
  std::vector<Call> calls;
  for (std::uint64_t i = 0; i < 4; ++i) calls.push_back(call_of(i));
  const auto all = [&] {
    for (std::size_t i = 0; i < 4; ++i) {
      forward_on(stream_, layers[i / 2], kModes[i % 2], calls[i]);
    }
  };
  all();  // Kernels load on their first launch, which may not be captured.
  std::vector<std::vector<std::uint16_t>> expected;
  for (const Call& c : calls) expected.push_back(take(c));
  const auto launch = capture(all);
  const auto replay = [&] {
    launch();
    for (std::size_t i = 0; i < calls.size(); ++i) EXPECT_EQ(take(calls[i]), expected[i]) << i;
  };
  replay();
  for (int i = 2; i < kNumLayers; ++i) {  // Other recipes: new exchanges, new rows.
    Layer layer = group.add_layer(spec(i), recipes(i));
    forward_on(stream_, layer, Mode::kNormal, calls[0]);
    (void)take(calls[0]);
    replay();
  }
}

/// As a server has them: one of the whole model for each batch size, all captured before any runs.
TEST_F(CudaLayerGroupTest, GraphsOfAllLayersForSeveralBatchSizes) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  std::vector<Layer> layers = make_layers(group);
  struct Batch {
    Call call;
    Mode mode;
    std::array<Call, 2> between;  // What a layer gives is what the next one gets.
    std::vector<std::uint16_t> expected = {};
    std::function<void()> launch = {};
  };
  std::vector<Batch> batches;
  for (const Mode mode : kModes) {
    for (const std::int64_t tokens : {1, 3, kTokens}) {
      const auto stream = static_cast<std::uint64_t>(tokens);
      Batch& b = batches.emplace_back(Batch{call_of(stream), mode, {call_of(0), call_of(0)}});
      for (Call* c : {&b.call, &b.between[0], &b.between[1]}) {
        c->num_tokens = tokens;
        c->elements = static_cast<std::size_t>(tokens * group_geometry().hidden);
      }
    }
  }
  const auto all = [&](const Batch& b) {
    TensorView x = x_of(b.call);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const Call& out = b.between[i % 2];
      layers[i].forward(b.mode, x, routing_of(b.call), y_of(out), stream_);
      x.data = out.y->data();
    }
  };
  const auto take_last = [&](const Batch& b) {
    const auto bits = take(b.between[(layers.size() - 1) % 2]);
    (void)take(b.between[layers.size() % 2]);
    return bits;
  };
  for (Batch& b : batches) {
    all(b);  // Kernels load on their first launch, which may not be captured.
    b.expected = take_last(b);
  }
  for (Batch& b : batches) b.launch = capture([&] { all(b); });
  for (int round = 0; round < 20; ++round) {
    for (std::size_t i = 0; i < batches.size(); ++i) {
      const Batch& b = batches[(i * 5 + static_cast<std::size_t>(round)) % batches.size()];
      b.launch();
      ASSERT_EQ(take_last(b), b.expected) << b.call.num_tokens << " tokens, round " << round;
    }
  }
}

TEST_F(CudaLayerGroupTest, TwoStreamsOfOneCaptureTakeTurns) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  std::vector<Layer> layers = make_layers(group, 2);
  const auto other = make_backend({.device = {Device::Kind::kCuda, 0}});
  const auto first = static_cast<cudaStream_t>(stream_.handle);
  const auto second = static_cast<cudaStream_t>(other->stream().handle);
  const Call calls[] = {call_of(0), call_of(1)};
  for (const Mode mode : kModes) {
    std::vector<std::vector<std::uint16_t>> expected;
    for (std::size_t i = 0; i < 2; ++i) {
      forward_on(stream_, layers[i], mode, calls[i]);
      expected.push_back(take(calls[i]));
    }
    cudaEvent_t fork = nullptr, join = nullptr;
    ASSERT_EQ(cudaEventCreate(&fork), cudaSuccess);
    ASSERT_EQ(cudaEventCreate(&join), cudaSuccess);
    const auto launch = capture([&] {
      EXPECT_EQ(cudaEventRecord(fork, first), cudaSuccess);
      EXPECT_EQ(cudaStreamWaitEvent(second, fork, 0), cudaSuccess);
      for (int repeat = 0; repeat < 4; ++repeat) {
        forward_on(stream_, layers[0], mode, calls[0]);
        forward_on(other->stream(), layers[1], mode, calls[1]);
      }
      EXPECT_EQ(cudaEventRecord(join, second), cudaSuccess);
      EXPECT_EQ(cudaStreamWaitEvent(first, join, 0), cudaSuccess);
    });
    for (int round = 0; round < 20; ++round) {
      launch();
      for (std::size_t i = 0; i < 2; ++i) {
        ASSERT_EQ(take(calls[i]), expected[i]) << to_string(mode) << " round " << round;
      }
    }
    EXPECT_EQ(cudaEventDestroy(fork), cudaSuccess);
    EXPECT_EQ(cudaEventDestroy(join), cudaSuccess);
  }
}

TEST_F(CudaLayerGroupTest, TwoLayersInFlightOnTwoStreams) {
  LayerGroupConfig config = group_config();
  config.num_in_flight = 2;
  LayerGroup group = LayerGroup::create(config, *transports_[0], *backend_);
  Layer a = group.add_layer(spec(0), {.low_latency = parse_recipe("static")});
  Layer b = group.add_layer(spec(1), {.low_latency = parse_recipe("static")});
  const auto other = make_backend({.device = {Device::Kind::kCuda, 0}});
  const Call of_a = call_of(0), of_b = call_of(1);
  for (const Mode mode : kModes) {
    forward_on(stream_, a, mode, of_a);
    const auto expected_a = take(of_a);
    forward_on(stream_, b, mode, of_b);
    const auto expected_b = take(of_b);
    for (int round = 0; round < 20; ++round) {
      Dispatched first = a.dispatch_send(mode, x_of(of_a), routing_of(of_a), stream_);
      Dispatched second = b.dispatch_send(mode, x_of(of_b), routing_of(of_b), other->stream());
      b.finish(std::move(second), y_of(of_b), other->stream());
      a.finish(std::move(first), y_of(of_a), stream_);
      ASSERT_EQ(take(of_a), expected_a) << round;
      ASSERT_EQ(take(of_b), expected_b) << round;
    }
  }
}

/// Counted by the kernels of a graph whenever it is replayed, with nothing waiting in between.
TEST_F(CudaLayerGroupTest, AGraphCountsTheRowsOfEachReplay) {
  LayerGroup group = LayerGroup::create(group_config(), *transports_[0], *backend_);
  std::vector<Layer> layers = make_layers(group, 2);
  const Call c = call_of(0);
  const auto both = [&] {
    for (const Mode mode : kModes) forward_on(stream_, layers[0], mode, c);
    forward_on(stream_, layers[1], Mode::kNormal, c);
  };
  both();  // Before counting: kernels load, and nothing is counted.
  layers[0].count_rows(true);
  const auto launch = capture(both);
  for (int i = 0; i < 3; ++i) launch();
  std::vector<std::int64_t> expected(8);
  for (const int e : tokens_of(0).topk_idx) {
    if (e >= 0) expected[static_cast<std::size_t>(e)] += 6;  // Two modes, three times.
  }
  (void)take(c);
  EXPECT_EQ(layers[0].counted_rows(stream_), expected);
  EXPECT_EQ(layers[0].counted_rows_of_all(stream_), expected);
  EXPECT_EQ(layers[1].counted_rows(stream_), std::vector<std::int64_t>(8));
  layers[0].reset_counted_rows(stream_);
  forward_on(stream_, layers[0], Mode::kLowLatency, c);
  for (std::int64_t& n : expected) n /= 6;
  EXPECT_EQ(layers[0].counted_rows(stream_), expected);
}

TEST_F(CudaLayerGroupTest, ThePlanIsWhatAGroupTakesLayerByLayer) {
  constexpr int kRanks = 2;
  auto transports = make_inproc_transports(kRanks);
  on_every_rank(kRanks, [&](int r) {
    CountingBackend backend(
        {.device = {Device::Kind::kCuda, 0}, .local_rank = r, .num_local_ranks = kRanks});
    CountingTransport transport(*transports[static_cast<std::size_t>(r)]);
    LayerGroup group = LayerGroup::create(group_config(), transport, backend);
    std::vector<PlannedLayer> planned;
    std::vector<Layer> layers;
    for (int i = 0; i < kNumLayers; ++i) {
      planned.push_back({.recipes = recipes(i)});
      layers.push_back(
          group.add_layer(read_layer(files_.checkpoint(), files_.layer(i), r, kRanks), recipes(i)));
      const LayerGroupMemory plan =
          LayerGroup::plan_memory(group_config(), planned, Device::Kind::kCuda, kRanks);
      const LayerGroupMemory taken = group.memory();
      EXPECT_EQ(taken.prepared_bytes, plan.prepared_bytes);
      EXPECT_EQ(taken.exchange_bytes, plan.exchange_bytes);
      EXPECT_EQ(taken.scratch_bytes, plan.scratch_bytes);
      EXPECT_EQ(backend.allocated_bytes + transport.window_bytes,
                plan.exchange_bytes + plan.scratch_bytes);
    }
    // Giving memory back waits for the device: every rank first.
    (void)transport.all_gather({}, group.config().peer_timeout);
  });
}

}  // namespace
}  // namespace sluice::testing
