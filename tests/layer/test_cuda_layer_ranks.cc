// Layers over several ranks on CUDA devices: rows that leave from the experts' kernel give the bits
// of rows that combine reads, and of one rank that has all experts. Ranks are streams of this
// process or, with `--transport ipc --processes N`, processes. Skips itself where there is no
// device.
#include <gmock/gmock.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "backend/ops.h"
#include "layer/group_fixture.h"
#include "multirank/run_ranks.h"
#include "support/cuda_fixture.h"
#include "support/modes_and_wires.h"

namespace sluice::testing {
namespace {

#ifdef SLUICE_PLANTED_FAULT
constexpr std::chrono::milliseconds kTimeout{3'000};  // Of ranks whose peer has seen the fault.
#else
constexpr std::chrono::milliseconds kTimeout{20'000};
#endif

struct Case {
  ModelGeometry geometry;
  int max_tokens = 0;  ///< Of each rank.
  int rounds = 0;      ///< For each recipe and mode.
  std::chrono::milliseconds timeout = kTimeout;
};

/// Few rows: decode kernels, and a last row tile of 128 channels.
Case few_rows() {
  return {
      {.name = "few", .num_experts = 8, .num_topk = 3, .hidden = 384, .intermediate = 128}, 5, 12};
}
/// Some hundred rows for each expert: prefill kernels, tiles of every width.
Case many_rows(int group_size) {
  return {{.name = "many",
           .num_experts = 8,
           .num_topk = 4,
           .hidden = 640,
           .intermediate = 256,
           .group_size = group_size},
          500,
          3};
}

LayerGroupConfig config_of(const Case& c, bool send_from_experts) {
  return {.geometry = c.geometry,
          .low_latency = {.max_tokens_per_rank = c.max_tokens},
          .normal = {.max_tokens_per_rank = c.max_tokens},
          .routed_scaling_factor = 2.5f,
          .send_from_experts = send_from_experts,
          .peer_timeout = c.timeout};
}

ModeRecipes recipes(int i) {
  const auto all = named_recipes();
  const Recipe recipe = all[static_cast<std::size_t>(i) % all.size()].recipe;
  return {.low_latency = recipe, .normal = recipe};
}

/// Layers of the same weights in one group.
struct Layers {
  LayerGroup group;
  std::vector<Layer> layers = {};

  Layers(const Case& c, bool send, const LayersOnDisk& files, Transport& transport,
         Backend& backend)
      : group(LayerGroup::create(config_of(c, send), transport, backend)) {
    for (int i = 0; i < kNumLayers; ++i) {
      layers.push_back(group.add_layer(files.checkpoint(), files.layer(i), recipes(i)));
    }
  }
};

/// One rank, and what its tokens give on a rank that has all experts. Everything is allocated
/// before any rank has work queued.
class LayerRank {
 public:
  LayerRank(const Case& c, int num_ranks, const LayersOnDisk& files, Transport& transport)
      : case_(c),
        transport_(transport),
        backend_(make_backend(place_rank(Device::Kind::kCuda, transport.rank(), num_ranks))),
        apart_(c, false, files, transport, *backend_),
        sent_(c, true, files, transport, *backend_),
        alone_(c, false, files, *alone_transport_.front(), *backend_) {
    const auto elements = static_cast<std::size_t>(c.max_tokens * c.geometry.hidden);
    const auto entries = static_cast<std::size_t>(c.max_tokens * c.geometry.num_topk);
    x_ = backend_->allocate(elements * 2), y_ = backend_->allocate(elements * 2);
    idx_ = backend_->allocate(entries * 4), weights_ = backend_->allocate(entries * 4);
    barrier();
  }
  ~LayerRank() {
    try {
      barrier();  // Nobody frees memory while another rank still works.
    } catch (const Error&) {
    }
  }
  LayerRank(const LayerRank&) = delete;
  LayerRank& operator=(const LayerRank&) = delete;

  void barrier() { (void)transport_.all_gather({}, std::chrono::milliseconds(60'000)); }
  [[nodiscard]] int rank() const { return transport_.rank(); }
  [[nodiscard]] Layers& apart() { return apart_; }
  [[nodiscard]] Layers& sent() { return sent_; }
  [[nodiscard]] Layers& alone() { return alone_; }
  [[nodiscard]] Stream stream() { return backend_->stream(); }
  [[nodiscard]] BackendOps& backend() { return ops(*backend_); }

  /// Other tokens, other routing and another number of them for each `round` and rank; none now and
  /// then. Some entries are empty.
  void load(int round) {
    const ModelGeometry& g = case_.geometry;
    const int own = round * 31 + rank();
    tokens_ = own % 7 == 3 ? 0 : case_.max_tokens - own % std::min(case_.max_tokens, 3);
    Workload load = make_workload({.num_experts = g.num_experts,
                                   .num_topk = g.num_topk,
                                   .hidden = g.hidden,
                                   .seed = 7 + static_cast<std::uint64_t>(round)},
                                  std::int64_t{rank()} * case_.max_tokens, tokens_);
    for (std::size_t i = 5; i < load.topk_idx.size(); i += 11) load.topk_idx[i] = -1;
    put(*x_, load.x.data(), load.x.size() * 2);
    put(*idx_, load.topk_idx.data(), load.topk_idx.size() * 4);
    put(*weights_, load.topk_weights.data(), load.topk_weights.size() * 4);
    const std::vector<std::uint16_t> poison(load.x.size(), 0x7fc1);
    put(*y_, poison.data(), poison.size() * 2);
  }
  [[nodiscard]] TensorView x() const {
    return {x_->data(), DType::kBFloat16, Shape{tokens_, case_.geometry.hidden},
            backend_->device()};
  }
  [[nodiscard]] Routing routing() const {
    const Shape entries{tokens_, case_.geometry.num_topk};
    return {.topk_idx = {idx_->data(), DType::kInt32, entries, backend_->device()},
            .topk_weights = {weights_->data(), DType::kFloat32, entries, backend_->device()}};
  }
  [[nodiscard]] MutableTensorView y() const {
    MutableTensorView view;
    view.data = y_->data(), view.dtype = DType::kBFloat16, view.device = backend_->device();
    view.shape = Shape{tokens_, case_.geometry.hidden};
    return view;
  }
  void forward(Layers& of, int layer, Mode mode) {
    of.layers[static_cast<std::size_t>(layer)].forward(mode, x(), routing(), y(), stream());
  }
  /// What the last call gave; poison takes its place.
  std::vector<std::uint16_t> take() {
    std::vector<std::uint16_t> bits(static_cast<std::size_t>(tokens_ * case_.geometry.hidden));
    backend_->copy_to_host(bits.data(), y_->data(), bits.size() * 2, stream());
    const std::vector<std::uint16_t> poison(bits.size(), 0x7fc1);
    put(*y_, poison.data(), poison.size() * 2);
    return bits;
  }
  std::vector<std::uint16_t> bits_of(Layers& of, int layer, Mode mode) {
    forward(of, layer, mode);
    return take();
  }

 private:
  void put(DeviceBuffer& to, const void* from, std::size_t bytes) {
    if (bytes > 0) backend_->copy_from_host(to.data(), from, bytes, stream());
  }

  const Case& case_;
  Transport& transport_;
  std::vector<std::unique_ptr<Transport>> alone_transport_ = make_inproc_transports(1);
  std::unique_ptr<Backend> backend_;
  Layers apart_, sent_, alone_;
  std::unique_ptr<DeviceBuffer> x_, y_, idx_, weights_;
  std::int64_t tokens_ = 0;
};

class CudaLayerRanksTest : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!cuda_backend()) GTEST_SKIP() << "no CUDA device on this machine";
    if (ranks_are_processes() && GetParam() > control_transport()->num_ranks()) {
      GTEST_SKIP() << "needs " << GetParam() << " processes";
    }
  }
  /// body(rank) on every rank.
  template <class Body>
  static void run(const Case& c, const Body& body, bool ends_well = true) {
    const bool has_groups_of_128 = c.geometry.group_size == 128;
    const LayersOnDisk files({.geometry = c.geometry,
                              .format = has_groups_of_128 ? "w4afp8" : "compressed-tensors",
                              .num_layers = kNumLayers,
                              .with_static_activations = !has_groups_of_128});
    run_ranks(GetParam(), [&](Transport& transport) {
      LayerRank rank(c, GetParam(), files, transport);
      body(rank);
      if (!ends_well) return rank.barrier();
      rank.sent().group.check();
      rank.apart().group.check();
    });
  }
  /// Every recipe in both modes, on tokens that no other call has.
  static void expect_same_bits(const Case& c) {
    run(c, [&](LayerRank& rank) {
      int call = 0;
      for (int round = 0; round < c.rounds; ++round) {
        for (int i = 0; i < kNumLayers; ++i) {
          for (const Mode mode : kModes) {
            rank.load(call++);
            SCOPED_TRACE(::testing::Message() << "rank " << rank.rank() << ", layer " << i << ", "
                                              << to_string(mode) << ", round " << round);
            const auto alone = rank.bits_of(rank.alone(), i, mode);
            ASSERT_EQ(rank.bits_of(rank.sent(), i, mode), alone);
            ASSERT_EQ(rank.bits_of(rank.apart(), i, mode), alone);
          }
        }
      }
    });
  }
};

TEST_P(CudaLayerRanksTest, FewRows) {
  expect_same_bits(few_rows());
}
TEST_P(CudaLayerRanksTest, ManyRows) {
  expect_same_bits(many_rows(128));
}
TEST_P(CudaLayerRanksTest, ManyRowsOfWeightsInGroupsOf32) {
  expect_same_bits(many_rows(32));
}

/// Calls follow each other without a wait of the host, each layer's rows on the way while the next
/// one's are sent: rows of the last call, or of a rank that is late, would show.
TEST_P(CudaLayerRanksTest, CallsInARowAndGraphsOfThem) {
  const Case c = few_rows();
  run(c, [&](LayerRank& rank) {
    constexpr int kCalls = 24;
    std::vector<std::unique_ptr<DeviceBuffer>> outputs;
    rank.load(2);
    const std::size_t bytes = static_cast<std::size_t>(rank.y().shape.num_elements()) * 2;
    for (int i = 0; i < kCalls; ++i) outputs.push_back(rank.backend().allocate(bytes + 16));
    const auto call = [&](Layers& of) {
      for (int i = 0; i < kCalls; ++i) {
        MutableTensorView y = rank.y();
        y.data = outputs[static_cast<std::size_t>(i)]->data();
        of.layers[static_cast<std::size_t>(i % kNumLayers)].forward(
            kModes[i / kNumLayers % 2], rank.x(), rank.routing(), y, rank.stream());
      }
    };
    const auto take = [&] {
      std::vector<std::vector<std::byte>> all;
      for (const auto& output : outputs) {
        all.emplace_back(bytes);
        rank.backend().copy_to_host(all.back().data(), output->data(), bytes, rank.stream());
        const std::vector<std::byte> poison(bytes, std::byte{0x7f});
        rank.backend().copy_from_host(output->data(), poison.data(), bytes, rank.stream());
      }
      return all;
    };
    rank.barrier();
    call(rank.alone());
    const auto want = take();
    rank.barrier();
    call(rank.sent());
    ASSERT_EQ(take(), want);
    rank.barrier();
    {
      const auto graph = rank.backend().record(
          rank.stream(), [&](const std::function<void()>&) { call(rank.sent()); });
      rank.barrier();
      for (int round = 0; round < 20; ++round) {
        graph->replay();
        ASSERT_EQ(take(), want) << "round " << round;
      }
      rank.barrier();
    }
  });
}

/// Layers of one exchange take turns in whether their rows go home or are fetched: neither finds
/// what the other has left.
TEST_P(CudaLayerRanksTest, RecipesThatShareAnExchangeTakeTurns) {
  const Case c = few_rows();
  run(c, [&](LayerRank& rank) {
    // direct and requant-static have one wire format; so have direct-bf16 and bf16-static.
    for (int round = 0; round < 10; ++round) {
      for (const int layer : {0, 3, 0, 3, 1, 2}) {
        const Mode mode = kModes[round % 2];
        rank.load(100 + round * 6 + layer);
        const auto want = rank.bits_of(rank.alone(), layer, mode);
        ASSERT_EQ(rank.bits_of(rank.sent(), layer, mode), want)
            << "round " << round << " layer " << layer;
      }
    }
  });
}

/// Rank 1 calls another layer of the same exchange, or the same layer in another mode: every rank
/// says so in the end.
TEST_P(CudaLayerRanksTest, RanksThatMakeDifferentCallsAreNamed) {
  Case c = few_rows();
  c.timeout = std::chrono::milliseconds(1'500);
  for (const bool other_mode : {false, true}) {
    SCOPED_TRACE(other_mode ? "another mode" : "another layer");
    const auto body = [&](LayerRank& rank) {
      const bool differs = rank.rank() == 1;
      const int layer = differs && !other_mode ? 3 : 0;  // direct and requant-static.
      const Mode mode = kModes[differs && other_mode ? 1 : 0];
      rank.load(1);
      const auto want = rank.bits_of(rank.alone(), 0, Mode::kLowLatency);
      ASSERT_EQ(rank.bits_of(rank.sent(), 0, Mode::kLowLatency), want);
      rank.barrier();
      try {
        for (int call = 0; call < 2; ++call) {  // The second one throws what the first has found.
          rank.forward(rank.sent(), layer, mode);
          rank.backend().synchronize(rank.stream());
        }
        ADD_FAILURE() << "rank " << rank.rank() << " took rows of another call";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kTransport) << error.what();
        EXPECT_THAT(error.what(), ::testing::HasSubstr("ranks must make the same calls"));
        EXPECT_THAT(error.what(), ::testing::HasSubstr(rank.sent().layers[0].name()));
        EXPECT_THAT(error.what(), ::testing::HasSubstr(other_mode ? "in normal mode"
                                                                  : rank.sent().layers[3].name()));
        if (!differs) {
          EXPECT_THAT(error.ranks(), ::testing::ElementsAre(1)) << error.what();
        }
      }
    };
    run(c, body, false);
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, CudaLayerRanksTest, ::testing::Values(2, 4, 8));

/// A group whose max_m reserves fewer rows than a rank's tokens have entries has no room for them.
TEST(CudaLayerRanksWithoutRoom, RowsAreFetched) {
  if (!cuda_backend()) GTEST_SKIP() << "no CUDA device on this machine";
  if (ranks_are_processes()) GTEST_SKIP() << "as processes the same";
  const ModelGeometry g{
      .name = "tight", .num_experts = 8, .num_topk = 8, .hidden = 256, .intermediate = 128};
  const LayersOnDisk files({.geometry = g, .num_layers = 1});
  constexpr int kRanks = 4, kTokensOfRank = 4;
  run_ranks(kRanks, [&](Transport& transport) {
    const auto backend = make_backend(place_rank(Device::Kind::kCuda, transport.rank(), kRanks));
    // Two local experts of 15 rows: one less than a rank's 32 entries need.
    LayerGroup group =
        LayerGroup::create({.geometry = g,
                            .low_latency = {.max_tokens_per_rank = kTokensOfRank, .max_m = 15},
                            .peer_timeout = kTimeout},
                           transport, *backend);
    Layer layer = group.add_layer(files.checkpoint(), files.layer(0));
    // 15 tokens over all ranks, each of which has all experts.
    const std::int64_t tokens = transport.rank() == 0 ? 3 : 4;
    const Workload load = make_workload(
        {.num_experts = g.num_experts, .num_topk = g.num_topk, .hidden = g.hidden, .seed = 5},
        transport.rank() * kTokensOfRank, tokens);
    const auto put = [&](const auto& values) {
      auto buffer = backend->allocate(values.size() * sizeof(values[0]));
      backend->copy_from_host(buffer->data(), values.data(), values.size() * sizeof(values[0]),
                              backend->stream());
      return buffer;
    };
    const auto x = put(load.x), y = put(load.x), idx = put(load.topk_idx);
    const auto weights = put(load.topk_weights);
    const Shape entries{tokens, g.num_topk}, shape{tokens, g.hidden};
    MutableTensorView out;
    out.data = y->data(), out.dtype = DType::kBFloat16, out.shape = shape;
    out.device = backend->device();
    const auto alone_transport = make_inproc_transports(1);
    LayerGroup alone =
        LayerGroup::create({.geometry = g, .low_latency = {.max_tokens_per_rank = kTokensOfRank}},
                           *alone_transport[0], *backend);
    Layer whole = alone.add_layer(files.checkpoint(), files.layer(0));
    (void)transport.all_gather({}, kTimeout);
    const auto bits_of = [&](Layer& of) {
      of.forward(Mode::kLowLatency, {x->data(), DType::kBFloat16, shape, backend->device()},
                 {.topk_idx = {idx->data(), DType::kInt32, entries, backend->device()},
                  .topk_weights = {weights->data(), DType::kFloat32, entries, backend->device()}},
                 out, backend->stream());
      std::vector<std::uint16_t> bits(load.x.size());
      backend->copy_to_host(bits.data(), y->data(), bits.size() * 2, backend->stream());
      return bits;
    };
    const auto want = bits_of(whole);
    EXPECT_EQ(bits_of(layer), want) << "rank " << transport.rank();
    group.check();
    (void)transport.all_gather({}, kTimeout);
  });
}

}  // namespace
}  // namespace sluice::testing
