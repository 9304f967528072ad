// The local call on a device: its two kernels against the plainest code, byte by byte, and the bits
// of an engine of one rank, on one stream and on two, in graphs, and while buffers grow.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <memory>
#include <vector>

#include "backend/token_rows_fixture.h"
#include "layer/group_fixture.h"
#include "sluice/local_experts.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

constexpr float kFactor = 2.5f;

class CudaLocalExpertsTest : public CudaBackendTest {
 protected:
  /// One call's tensors on the device.
  struct Call {
    Workload load;
    std::unique_ptr<DeviceBuffer> x, idx, weights, y;
  };
  Call call_of(std::int64_t num_tokens, std::uint64_t first = 0) {
    const ModelGeometry g = group_geometry();
    Call c;
    c.load = make_workload(
        {.num_experts = g.num_experts, .num_topk = g.num_topk, .hidden = g.hidden, .seed = 7},
        static_cast<std::int64_t>(first), num_tokens);
    upload_call(c);
    return c;
  }
  void upload_call(Call& c) {
    c.x = upload(c.load.x), c.idx = upload(c.load.topk_idx),
    c.weights = upload(c.load.topk_weights);
    c.y = upload(std::vector<std::uint16_t>(c.load.x.size(), 0x7fc1));
  }
  [[nodiscard]] TensorView x_of(const Call& c) const {
    return {c.x->data(), DType::kBFloat16, c.load.x_view().shape, backend_->device()};
  }
  [[nodiscard]] Routing routing_of(const Call& c) const {
    Routing routing = c.load.routing_view();
    routing.topk_idx.data = c.idx->data(), routing.topk_idx.device = backend_->device();
    routing.topk_weights.data = c.weights->data();
    routing.topk_weights.device = backend_->device();
    return routing;
  }
  [[nodiscard]] MutableTensorView y_of(const Call& c) const {
    MutableTensorView view;
    view.data = c.y->data(), view.dtype = DType::kBFloat16, view.device = backend_->device();
    view.shape = c.load.x_view().shape;
    return view;
  }
  void forward_on(Stream stream, LocalExperts& layer, const Call& c) const {
    layer.forward(x_of(c), routing_of(c), y_of(c), stream);
  }
  /// After everything on the device; the output is poisoned again.
  std::vector<std::uint16_t> take(const Call& c) {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    auto bits = download<std::uint16_t>(*c.y, c.load.x.size());
    const std::vector<std::uint16_t> poison(c.load.x.size(), 0x7fc1);
    backend_->copy_from_host(c.y->data(), poison.data(), poison.size() * 2, stream_);
    return bits;
  }
  std::vector<std::uint16_t> forward(LocalExperts& layer, const Call& c) {
    forward_on(stream_, layer, c);
    return take(c);
  }
  static LocalGroupConfig config(std::int64_t max_tokens) {
    const ModelGeometry g = group_geometry();
    return {.hidden = g.hidden,
            .intermediate = g.intermediate,
            .max_entries = max_tokens * g.num_topk,
            .routed_scaling_factor = kFactor};
  }
  ExpertWeights weights(int i = 0, int first = 0, int count = group_geometry().num_experts) const {
    return files_.checkpoint().load_experts(files_.layer(i), first, count);
  }
  /// What an engine of one rank gives.
  std::vector<std::uint16_t> engine(int layer, const Recipe& recipe, const Call& c) {
    Engine engine = Engine::create({.layer = files_.layer(layer),
                                    .low_latency = std::nullopt,
                                    .normal = recipe,
                                    .max_tokens_per_rank = static_cast<int>(c.load.num_tokens),
                                    .routed_scaling_factor = kFactor},
                                   files_.checkpoint(), *transports_[0], *backend_);
    engine.forward(Mode::kNormal, x_of(c), routing_of(c), y_of(c), stream_);
    const auto y = take(c);
    engine.check();
    return y;
  }

  std::vector<std::unique_ptr<Transport>> transports_ = make_inproc_transports(1);
  LayersOnDisk files_;
};

TEST_F(CudaLocalExpertsTest, KernelsGiveTheBytesOfThePlainestCode) {
  check_token_rows(*backend_, {.num_tokens = 1, .num_topk = 1, .num_experts = 1, .width = 128});
  check_token_rows(*backend_, {.num_tokens = 1, .num_topk = 8, .num_experts = 32, .width = 7168});
  check_token_rows(*backend_, {.num_tokens = 37,
                               .num_topk = 8,
                               .first_expert = 5,
                               .num_experts = 33,
                               .width = 1152,
                               .wide_idx = true});
  // Several tokens for each CTA, and more entries than one chunk of a CTA has.
  check_token_rows(*backend_, {.num_tokens = 1000,
                               .num_topk = 9,
                               .first_expert = 2,
                               .num_experts = 300,
                               .width = 256,
                               .wide_idx = true});
  check_token_rows(
      *backend_,
      {.num_tokens = 264 * 33, .num_topk = 32, .first_expert = 1, .num_experts = 2, .width = 128});
}

TEST_F(CudaLocalExpertsTest, EveryRecipeGivesTheBitsOfAnEngine) {
  for (const std::int64_t tokens : {1, 5, 300}) {
    const Call c = call_of(tokens);
    for (const auto& [name, recipe] : named_recipes()) {
      LocalExperts layer = LocalExperts::create(config(tokens), weights(), *backend_, recipe);
      EXPECT_EQ(forward(layer, c), engine(0, recipe, c)) << name << ", " << tokens << " tokens";
    }
  }
}

TEST_F(CudaLocalExpertsTest, PartsAndSentinels) {
  LocalExperts all = LocalExperts::create(config(40), weights(), *backend_);
  LocalExperts part = LocalExperts::create(config(40), weights(0, 3, 4), *backend_);
  Call c = call_of(40);
  const auto of_part = forward(part, c);
  Call only = call_of(40);
  for (std::int32_t& e : only.load.topk_idx) e = e >= 3 && e < 7 ? e : -1;
  upload_call(only);
  EXPECT_EQ(of_part, forward(all, only));
  std::vector<std::int64_t> wide(c.load.topk_idx.begin(), c.load.topk_idx.end());
  const std::int64_t sentinels[] = {-1,
                                    8,
                                    -9,
                                    std::numeric_limits<std::int64_t>::max(),
                                    std::numeric_limits<std::int64_t>::min(),
                                    std::int64_t{3} + (std::int64_t{1} << 32)};
  std::size_t next = 0;
  for (std::int64_t& e : wide) {
    if (e < 3 || e >= 7) e = sentinels[next++ % std::size(sentinels)];
  }
  const auto idx = upload(wide);
  Routing routing = routing_of(c);
  routing.topk_idx.data = idx->data(), routing.topk_idx.dtype = DType::kInt64;
  part.forward(x_of(c), routing, y_of(c), stream_);
  EXPECT_EQ(take(c), of_part);
  // Nothing is here: rows of zeros. No token: nothing is done.
  std::ranges::fill(c.load.topk_idx, 8);
  upload_call(c);
  EXPECT_EQ(forward(part, c), std::vector<std::uint16_t>(c.load.x.size(), 0));
  EXPECT_TRUE(forward(part, call_of(0)).empty());
  // Every entry to one expert.
  std::ranges::fill(c.load.topk_idx, 4);
  upload_call(c);
  EXPECT_EQ(forward(part, c), forward(all, c));
}

TEST_F(CudaLocalExpertsTest, ATokenHasItsBitsInACallOfAnySize) {
  LocalExperts layer = LocalExperts::create(config(700), weights(), *backend_);
  const auto all = forward(layer, call_of(700));
  const auto hidden = static_cast<std::size_t>(group_geometry().hidden);
  for (const auto& [first, count] : {std::pair{0, 1}, {17, 2}, {100, 64}, {333, 300}}) {
    const auto some = forward(layer, call_of(count, static_cast<std::uint64_t>(first)));
    EXPECT_TRUE(
        std::equal(some.begin(), some.end(),
                   all.begin() + static_cast<long>(static_cast<std::size_t>(first) * hidden)))
        << first;
  }
}

TEST_F(CudaLocalExpertsTest, GraphsOfAllLayersStayValidWhileBuffersGrow) {
  LocalGroup group = LocalGroup::create(config(16), *backend_);
  std::vector<LocalExperts> layers;
  for (int i = 0; i < 3; ++i) {
    layers.push_back(
        group.add_layer(weights(i), named_recipes()[static_cast<std::size_t>(i)].recipe));
  }
  std::vector<Call> calls;
  for (const std::int64_t tokens : {1, 16, 7}) calls.push_back(call_of(tokens));
  std::vector<std::vector<std::uint16_t>> expected;
  for (std::size_t i = 0; i < 3; ++i) expected.push_back(forward(layers[i], calls[i]));
  const auto launch = capture([&] {
    for (std::size_t i = 0; i < 3; ++i) forward_on(stream_, layers[i], calls[i]);
  });
  const auto replay = [&] {
    launch();
    for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(take(calls[i]), expected[i]) << i;
  };
  replay();
  group.reserve(config(200).max_entries);
  const Call large = call_of(200);
  const auto of_large = forward(layers[0], large);
  EXPECT_EQ(of_large, engine(0, named_recipes()[0].recipe, large));
  replay();
  // Other tokens in the same memory.
  Call other = call_of(16, 50);
  const auto of_other = forward(layers[1], other);
  backend_->copy_from_host(calls[1].x->data(), other.load.x.data(), other.load.x.size() * 2,
                           stream_);
  backend_->copy_from_host(calls[1].idx->data(), other.load.topk_idx.data(),
                           other.load.topk_idx.size() * 4, stream_);
  backend_->copy_from_host(calls[1].weights->data(), other.load.topk_weights.data(),
                           other.load.topk_weights.size() * 4, stream_);
  expected[1] = of_other;
  for (int i = 0; i < 5; ++i) replay();
}

TEST_F(CudaLocalExpertsTest, CallsOnTwoStreamsTakeTurns) {
  LocalGroup group = LocalGroup::create(config(64), *backend_);
  std::vector<LocalExperts> layers;
  std::vector<Call> calls;
  std::vector<std::vector<std::uint16_t>> expected;
  for (int i = 0; i < 4; ++i) {
    layers.push_back(group.add_layer(weights(i)));
    calls.push_back(call_of(i % 2 == 0 ? 64 : 3, static_cast<std::uint64_t>(100 * i)));
    expected.push_back(forward(layers.back(), calls.back()));
  }
  const auto other = make_backend({.device = {Device::Kind::kCuda, 0}});
  const Stream streams[] = {stream_, other->stream()};
  for (int round = 0; round < 100; ++round) {
    for (std::size_t i = 0; i < layers.size(); ++i) forward_on(streams[i % 2], layers[i], calls[i]);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      ASSERT_EQ(take(calls[i]), expected[i]) << "round " << round << " layer " << i;
    }
  }
}

/// Keeps a stream from going on until it is released, or for five seconds.
class Barrier {
 public:
  explicit Barrier(Stream stream) {
    const auto wait = [](void* flag) {
      const auto end = Clock::now() + std::chrono::seconds(5);
      while (!*static_cast<std::atomic<bool>*>(flag) && Clock::now() < end) {
      }
    };
    EXPECT_EQ(cudaLaunchHostFunc(static_cast<cudaStream_t>(stream.handle), wait, &is_open_),
              cudaSuccess);
  }
  void open() { is_open_ = true; }
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(Clock::now() - begin_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::atomic<bool> is_open_{false};
  Clock::time_point begin_ = Clock::now();
};

// All of them are queued before the first one runs, so each must keep its own parameters.
TEST_F(CudaLocalExpertsTest, CallsThatShareAGraphKeepTheirOwnParameters) {
  LocalGroup group = LocalGroup::create(config(300), *backend_);
  std::vector<LocalExperts> layers;
  std::vector<Recipe> recipes;
  for (int i = 0; i < 3; ++i) {
    recipes.push_back(named_recipes()[static_cast<std::size_t>(i)].recipe);
    layers.push_back(group.add_layer(weights(i), recipes.back()));
  }
  std::vector<Call> calls;
  std::vector<std::vector<std::uint16_t>> expected;
  for (int i = 0; i < 24; ++i) {
    const std::int64_t tokens = i % 5 == 4 ? 300 : 1 + i % 3 * 7;
    calls.push_back(call_of(tokens, static_cast<std::uint64_t>(10 * i)));
    expected.push_back(engine(i % 3, recipes[static_cast<std::size_t>(i % 3)], calls.back()));
  }
  for (int round = 0; round < 3; ++round) {
    Barrier barrier(stream_);
    for (std::size_t i = 0; i < calls.size(); ++i) forward_on(stream_, layers[i % 3], calls[i]);
    EXPECT_LT(barrier.seconds(), 3) << "queueing waited for the device";
    barrier.open();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (std::size_t i = 0; i < calls.size(); ++i) {
      ASSERT_EQ(take(calls[i]), expected[i]) << "round " << round << " call " << i;
    }
  }
}

TEST_F(CudaLocalExpertsTest, KeptCallsGiveTheBitsOfOthersAsKernelsAndAsGraphs) {
  LocalGroup group = LocalGroup::create(config(16), *backend_);
  LocalExperts layer = group.add_layer(weights());
  Call call = call_of(5);
  LocalCall kept = layer.keep(x_of(call), routing_of(call), y_of(call));
  const auto other_backend = make_backend({.device = {Device::Kind::kCuda, 0}});
  const Stream streams[] = {stream_, other_backend->stream()};
  std::vector<std::vector<std::uint16_t>> expected;
  std::vector<Call> loads;
  for (const std::uint64_t first : {0, 40, 80}) {
    loads.push_back(call_of(5, first));
    expected.push_back(forward(layer, loads.back()));
  }
  const Call large = call_of(200);
  // Long enough to become a graph; other tokens each time, on either stream, while buffers grow.
  for (std::size_t i = 0; i < 60; ++i) {
    const Workload& load = loads[i % 3].load;
    backend_->copy_from_host(call.x->data(), load.x.data(), load.x.size() * 2, stream_);
    backend_->copy_from_host(call.idx->data(), load.topk_idx.data(), load.topk_idx.size() * 4,
                             stream_);
    backend_->copy_from_host(call.weights->data(), load.topk_weights.data(),
                             load.topk_weights.size() * 4, stream_);
    kept.run(streams[i / 3 % 2]);
    ASSERT_EQ(take(call), expected[i % 3]) << i;
    if (i == 30) group.reserve(config(200).max_entries);
    if (i > 30 && i % 7 == 0) forward_on(streams[i % 2], layer, large);
  }
  // In a capture: its kernels.
  const auto launch = capture([&] { kept.run(stream_); });
  for (int i = 0; i < 3; ++i) {
    launch();
    EXPECT_EQ(take(call), expected[59 % 3]);
  }
}

}  // namespace
}  // namespace sluice::testing
