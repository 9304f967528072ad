// Ranks on CUDA devices: where experts are changes no bit, graphs captured before experts move go
// on with them in their new slots, and an expert that does not arrive is named. Ranks are streams
// of this process or, with `--transport ipc --processes N`, processes. They use all devices.
#include <gmock/gmock.h>

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "exchange/faulty_transport.h"
#include "layer/placed_fixture.h"
#include "multirank/run_ranks.h"
#include "sluice/balance.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr std::chrono::seconds kPatience{60};

/// One rank: a group with slots, one that has all experts alone, and its tokens on the device.
/// Memory is taken and given back while no rank has calls queued: both wait for the device.
class PlacedRank {
 public:
  PlacedRank(const LayersOnDisk& files, LayerGroupConfig config, int num_layers,
             Transport& transport)
      : transport_(transport),
        backend_(
            make_backend(place_rank(Device::Kind::kCuda, transport.rank(), transport.num_ranks()))),
        stream_(backend_->stream()),
        group_(LayerGroup::create(config, transport, *backend_)),
        alone_(LayerGroup::create(group_config(), *alone_transport_.front(), *backend_)) {
    for (std::uint64_t tokens = 0; tokens < 2; ++tokens) {
      const Workload load = tokens_of(transport.rank(), tokens);
      calls_.push_back({load, upload(load.x), upload(load.topk_idx), upload(load.topk_weights),
                        upload(std::vector<std::uint16_t>(load.x.size(), 0x7fc1))});
    }
    for (int i = 0; i < num_layers; ++i) {
      const int layer = files.layer(i);
      layers_.push_back(group_.add_layer(files.checkpoint(), layer, recipes_of_layer(i)));
      alone_layers_.push_back(alone_.add_layer(files.checkpoint(), layer, recipes_of_layer(i)));
    }
    meet();
  }
  ~PlacedRank() {
    try {
      meet();
    } catch (const Error&) {
    }
  }
  PlacedRank(const PlacedRank&) = delete;
  PlacedRank& operator=(const PlacedRank&) = delete;

  void meet() { (void)transport_.all_gather({}, kPatience); }
  void queue(Layer& layer, Mode mode, std::size_t tokens) {
    const Call& c = calls_[tokens];
    const Device device = backend_->device();
    const Shape entries{c.load.num_tokens, group_geometry().num_topk};
    const Shape rows{c.load.num_tokens, group_geometry().hidden};
    MutableTensorView y;
    y.data = c.y->data(), y.dtype = DType::kBFloat16, y.device = device, y.shape = rows;
    layer.forward(mode, {c.x->data(), DType::kBFloat16, rows, device},
                  {.topk_idx = {c.idx->data(), DType::kInt32, entries, device},
                   .topk_weights = {c.weights->data(), DType::kFloat32, entries, device}},
                  y, stream_);
  }
  /// The output of the last call of these tokens, which is poisoned again.
  std::vector<std::uint16_t> take(std::size_t tokens) {
    const Call& c = calls_[tokens];
    std::vector<std::uint16_t> bits(c.load.x.size());
    const std::vector<std::uint16_t> poison(bits.size(), 0x7fc1);
    backend_->copy_to_host(bits.data(), c.y->data(), bits.size() * 2, stream_);
    backend_->copy_from_host(c.y->data(), poison.data(), poison.size() * 2, stream_);
    return bits;
  }
  std::vector<std::uint16_t> forward_of(Layer& layer, Mode mode, std::size_t tokens) {
    queue(layer, mode, tokens);
    return take(tokens);
  }
  std::vector<std::uint16_t> alone(std::size_t layer, Mode mode, std::size_t tokens) {
    return forward_of(alone_layers_[layer], mode, tokens);
  }
  [[nodiscard]] std::vector<Layer>& layers() { return layers_; }
  [[nodiscard]] LayerGroup& group() { return group_; }
  [[nodiscard]] Backend& backend() { return *backend_; }
  [[nodiscard]] Stream stream() const { return stream_; }

 private:
  struct Call {
    Workload load;
    std::unique_ptr<DeviceBuffer> x, idx, weights, y;
  };
  template <class T>
  std::unique_ptr<DeviceBuffer> upload(const std::vector<T>& host) {
    auto buffer = backend_->allocate(std::max<std::size_t>(1, host.size() * sizeof(T)));
    backend_->copy_from_host(buffer->data(), host.data(), host.size() * sizeof(T), stream_);
    return buffer;
  }

  Transport& transport_;
  std::vector<std::unique_ptr<Transport>> alone_transport_ = make_inproc_transports(1);
  std::unique_ptr<Backend> backend_;
  Stream stream_;
  LayerGroup group_, alone_;
  std::vector<Call> calls_;
  std::vector<Layer> layers_, alone_layers_;
};

class CudaRebalance : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (!cuda_backend()) GTEST_SKIP() << "no CUDA device on this machine";
    if (ranks_are_processes() && GetParam() > control_transport()->num_ranks()) {
      GTEST_SKIP() << "needs " << GetParam() << " processes";
    }
  }
  static int slots() { return 24 / GetParam() * GetParam(); }
};

TEST_P(CudaRebalance, NoPlacementChangesABit) {
  const LayersOnDisk files;
  const int ranks = GetParam();
  std::vector<int> slot_counts{slots()};
  if (8 % ranks == 0) slot_counts.push_back(8);  // The identity, and permutations of it.
  for (const int num_slots : slot_counts) {
    run_ranks(ranks, [&](Transport& transport) {
      PlacedRank rank(files, slots_config(num_slots), kNumLayers, transport);
      for (std::size_t i = 0; i < kNumLayers; ++i) {
        Layer& layer = rank.layers()[i];
        for (int replicas = 0; replicas <= 4; ++replicas) {
          const std::size_t tokens = static_cast<std::size_t>(replicas) % 2;
          std::array<std::vector<std::uint16_t>, 2> expected;
          for (std::size_t m = 0; m < 2; ++m) expected[m] = rank.alone(i, kModes[m], tokens);
          if (replicas > 0) {
            (void)layer.rebalance(
                random_placement(8, ranks, num_slots, replicas, 10 * i + std::size_t(replicas)),
                rank.stream());
          }
          for (std::size_t m = 0; m < 2; ++m) {
            EXPECT_EQ(rank.forward_of(layer, kModes[m], tokens), expected[m])
                << num_slots << " slots, layer " << i << ", replicas " << replicas << ", "
                << to_string(kModes[m]);
          }
        }
      }
      rank.meet();
      rank.group().check();
    });
  }
}

// In a thousand replays experts move, all at once and in parts.
TEST_P(CudaRebalance, GraphsGoOnAfterExpertsHaveMoved) {
  const LayersOnDisk files;
  const int ranks = GetParam();
  run_ranks(ranks, [&](Transport& transport) {
    PlacedRank rank(files, slots_config(slots()), 1, transport);
    Layer& layer = rank.layers().front();
    std::array<std::vector<std::uint16_t>, 2> expected;
    for (std::size_t m = 0; m < 2; ++m) {
      expected[m] = rank.alone(0, kModes[m], m);
      EXPECT_EQ(rank.forward_of(layer, kModes[m], m), expected[m]);
    }
    rank.meet();
    std::vector<std::unique_ptr<Recording>> graphs;
    for (std::size_t m = 0; m < 2; ++m) {
      graphs.push_back(ops(rank.backend()).record(rank.stream(), [&](const std::function<void()>&) {
        rank.queue(layer, kModes[m], m);
      }));
    }
    rank.meet();
    int wrong = 0, moved = 0;
    Placement wanted = layer.placement();
    for (std::uint64_t round = 0; round < 1000; ++round) {
      if (round % 50 == 25) wanted = random_placement(8, ranks, slots(), 4, round);
      if (round < 500) {
        moved += layer.rebalance(wanted, rank.stream()).num_rounds > 0;
      } else {
        const Placement next = placement_toward(layer.placement(), wanted, 1);
        moved += layer.rebalance(next, rank.stream(), {.keep_memory = true}).num_rounds > 0;
      }
      const std::size_t m = round % 2;
      graphs[m]->replay();
      wrong += rank.take(m) != expected[m];
    }
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(layer.placement(), wanted);
    EXPECT_GT(moved, 20);
    rank.group().check();
    rank.meet();
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, CudaRebalance, ::testing::Values(2, 3, 4, 8));

constexpr int kCulprit = 1;

/// Memory of rank 1's device that nobody reads; null before its experts may move.
using Nowhere = std::byte*;

/// Every rank sends its experts to the one before, with faults on rank 1; what each rank's move
/// threw.
std::vector<std::exception_ptr> move_with(
    int ranks, const std::function<Faults(const Nowhere& nowhere)>& make_faults) {
  const LayersOnDisk files;
  Nowhere nowhere = nullptr;  // Rank 1's thread alone uses it.
  const auto planted = [&](int rank, std::unique_ptr<Transport> t) -> std::unique_ptr<Transport> {
    if (rank != kCulprit) return t;
    return std::make_unique<FaultyTransport>(std::move(t), make_faults(nowhere));
  };
  const auto body = [&](Transport& transport) {
    LayerGroupConfig config = slots_config(8);
    config.peer_timeout = std::chrono::milliseconds(2000);
    PlacedRank rank(files, config, 1, transport);
    Layer& layer = rank.layers().front();
    EXPECT_EQ(rank.forward_of(layer, Mode::kNormal, 0), rank.alone(0, Mode::kNormal, 0));
    rank.meet();
    const auto memory = rank.backend().allocate(2 * layer.weight_bytes());
    if (transport.rank() == kCulprit) nowhere = memory->data();
    std::vector<int> turned;
    for (int e = 0; e < 8; ++e) turned.push_back((e + 8 / ranks) % 8);
    try {
      (void)layer.rebalance(Placement::create(8, ranks, turned), rank.stream());
    } catch (const Error&) {
      EXPECT_THROW(rank.queue(layer, Mode::kNormal, 0), Error) << "a half moved layer computes";
      throw;
    }
  };
  return try_ranks(ranks, body, planted);
}

class CudaRebalanceFaults : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda_backend()) GTEST_SKIP() << "no CUDA device on this machine";
    if (ranks_are_processes()) ranks_ = control_transport()->num_ranks();
    if (8 % ranks_ != 0) GTEST_SKIP() << "needs 2, 4 or 8 processes";
  }
  int ranks_ = 4;
};

TEST_F(CudaRebalanceFaults, AnExpertThatDoesNotArriveIsNamed) {
  const auto failures = move_with(ranks_, [](const Nowhere& nowhere) {
    return Faults{.on_share = [&](std::vector<std::shared_ptr<std::byte>>& of_ranks, std::size_t) {
      if (nowhere) of_ranks[kCulprit - 1] = {std::shared_ptr<void>(), nowhere};
    }};
  });
  for (std::size_t r = 0; r < failures.size(); ++r) {
    const auto failure = describe(failures[r]);
    ASSERT_TRUE(failure) << "rank " << r;
    EXPECT_THAT(failure->ranks, ElementsAre(kCulprit)) << failure->text;
    EXPECT_THAT(failure->text, HasSubstr(r == kCulprit - 1 ? "but what arrived has checksum"
                                                           : "gave up because of rank(s) 1"));
  }
}

TEST_F(CudaRebalanceFaults, ARankLostHalfWayIsNamed) {
  const int ranks = ranks_;
  const auto failures = move_with(ranks, [&](const Nowhere& nowhere) {
    return Faults{.on_signal = [&nowhere, ranks, lost = false](int, int flag,
                                                               std::uint64_t&) mutable -> bool {
      if (lost) return false;
      // The first flags that say that all has been sent.
      if (nowhere == nullptr || flag < ranks) return true;
      lost = true;
      throw Error(ErrorCode::kIo, "planted");
    }};
  });
  for (std::size_t r = 0; r < failures.size(); ++r) {
    const auto failure = describe(failures[r]);
    ASSERT_TRUE(failure) << "rank " << r;
    if (r == kCulprit) continue;
    EXPECT_THAT(failure->ranks, ElementsAre(kCulprit)) << failure->text;
  }
}

}  // namespace
}  // namespace sluice::testing
