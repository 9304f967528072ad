// Eight ranks on one device: where experts are changes no bit, and graphs captured before experts
// move go on with them in their new slots.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "layer/placed_fixture.h"
#include "sluice/lab/ranks.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

constexpr int kRanks = 8, kSlots = 24;

/// One rank: its tokens on the device, and a stream of its own.
class DeviceRank {
 public:
  DeviceRank(int rank, int num_ranks)
      : backend_(make_backend({.device = {Device::Kind::kCuda, 0},
                               .local_rank = rank,
                               .num_local_ranks = num_ranks})),
        stream_(backend_->stream()) {}

  struct Call {
    Workload load;
    std::unique_ptr<DeviceBuffer> x, idx, weights, y;
  };
  Call call_of(const Workload& load) {
    return {load, upload(load.x), upload(load.topk_idx), upload(load.topk_weights),
            upload(std::vector<std::uint16_t>(load.x.size(), 0x7fc1))};
  }
  void queue(Layer& layer, Mode mode, const Call& c) {
    const Shape entries{c.load.num_tokens, group_geometry().num_topk};
    const Device device = backend_->device();
    const Shape rows{c.load.num_tokens, group_geometry().hidden};
    MutableTensorView y;
    y.data = c.y->data(), y.dtype = DType::kBFloat16, y.device = device, y.shape = rows;
    layer.forward(mode, {c.x->data(), DType::kBFloat16, rows, device},
                  {.topk_idx = {c.idx->data(), DType::kInt32, entries, device},
                   .topk_weights = {c.weights->data(), DType::kFloat32, entries, device}},
                  y, stream_);
  }
  /// The output, which is poisoned again.
  std::vector<std::uint16_t> take(const Call& c) {
    std::vector<std::uint16_t> bits(c.load.x.size());
    const std::vector<std::uint16_t> poison(bits.size(), 0x7fc1);
    backend_->copy_to_host(bits.data(), c.y->data(), bits.size() * 2, stream_);
    backend_->copy_from_host(c.y->data(), poison.data(), poison.size() * 2, stream_);
    return bits;
  }
  std::vector<std::uint16_t> forward_of(Layer& layer, Mode mode, const Call& c) {
    queue(layer, mode, c);
    return take(c);
  }
  [[nodiscard]] Backend& backend() { return *backend_; }
  [[nodiscard]] Stream stream() const { return stream_; }

 private:
  template <class T>
  std::unique_ptr<DeviceBuffer> upload(const std::vector<T>& host) {
    auto buffer = backend_->allocate(std::max<std::size_t>(1, host.size() * sizeof(T)));
    backend_->copy_from_host(buffer->data(), host.data(), host.size() * sizeof(T), stream_);
    return buffer;
  }
  std::unique_ptr<Backend> backend_;
  Stream stream_;
};

class CudaRebalance : public CudaBackendTest {
 protected:
  /// [layer][mode][rank][stream of tokens], from one rank where expert e is in slot e.
  using Outputs = std::array<std::array<std::array<std::vector<std::uint16_t>, 2>, kRanks>, 2>;
  std::vector<Outputs> outputs_of_one_rank(int num_layers) {
    const auto transport = make_inproc_transports(1);
    DeviceRank alone(0, 1);
    LayerGroup group = LayerGroup::create(group_config(), *transport.front(), alone.backend());
    std::vector<Outputs> all(static_cast<std::size_t>(num_layers));
    for (int i = 0; i < num_layers; ++i) {
      Layer layer = group.add_layer(files_.checkpoint(), files_.layer(i), recipes_of_layer(i));
      for (std::size_t m = 0; m < 2; ++m) {
        for (std::size_t r = 0; r < kRanks; ++r) {
          for (std::size_t s = 0; s < 2; ++s) {
            const auto call = alone.call_of(tokens_of(static_cast<int>(r), s));
            all[static_cast<std::size_t>(i)][m][r][s] = alone.forward_of(layer, kModes[m], call);
          }
        }
      }
    }
    return all;
  }
  LayersOnDisk files_;
};

TEST_F(CudaRebalance, NoPlacementChangesABit) {
  const std::vector<Outputs> expected = outputs_of_one_rank(kNumLayers);
  const auto transports = make_inproc_transports(kRanks);
  on_every_rank(kRanks, [&](int r) {
    const auto at = static_cast<std::size_t>(r);
    DeviceRank rank(r, kRanks);
    LayerGroup group = LayerGroup::create(slots_config(kSlots), *transports[at], rank.backend());
    // Memory is taken and given back while no rank has calls queued: both wait for the device.
    std::vector<DeviceRank::Call> calls;
    for (std::uint64_t tokens = 0; tokens < 2; ++tokens) {
      calls.push_back(rank.call_of(tokens_of(r, tokens)));
    }
    std::vector<Layer> layers;
    for (int i = 0; i < kNumLayers; ++i) {
      layers.push_back(group.add_layer(files_.checkpoint(), files_.layer(i), recipes_of_layer(i)));
    }
    for (std::size_t i = 0; i < layers.size(); ++i) {
      for (std::size_t replicas = 0; replicas <= 4; ++replicas) {
        if (replicas > 0) {
          (void)layers[i].rebalance(
              random_placement(8, kRanks, kSlots, static_cast<int>(replicas), 10 * i + replicas),
              rank.stream());
        }
        for (std::size_t m = 0; m < 2; ++m) {
          const std::size_t tokens = replicas % 2;
          EXPECT_EQ(rank.forward_of(layers[i], kModes[m], calls[tokens]),
                    expected[i][m][at][tokens])
              << "layer " << i << ", replicas " << replicas << ", " << to_string(kModes[m]);
        }
      }
    }
    (void)transports[at]->all_gather({}, std::chrono::seconds(20));
    group.check();
  });
}

TEST_F(CudaRebalance, GraphsGoOnAfterExpertsHaveMoved) {
  const std::vector<Outputs> expected = outputs_of_one_rank(1);
  const auto transports = make_inproc_transports(kRanks);
  on_every_rank(kRanks, [&](int r) {
    const auto at = static_cast<std::size_t>(r);
    DeviceRank rank(r, kRanks);
    LayerGroup group = LayerGroup::create(slots_config(kSlots), *transports[at], rank.backend());
    Layer layer = group.add_layer(files_.checkpoint(), files_.layer(0), recipes_of_layer(0));
    std::vector<DeviceRank::Call> calls;
    std::vector<std::unique_ptr<Recording>> graphs;
    const auto meet = [&] {  // Taking memory waits for the device, where nobody may be waiting.
      (void)transports[at]->all_gather({}, std::chrono::seconds(20));
    };
    for (std::size_t m = 0; m < 2; ++m) calls.push_back(rank.call_of(tokens_of(r, m)));
    meet();
    for (std::size_t m = 0; m < 2; ++m) {
      EXPECT_EQ(rank.forward_of(layer, kModes[m], calls[m]), expected[0][m][at][m]);
    }
    meet();
    for (std::size_t m = 0; m < 2; ++m) {
      graphs.push_back(
          ops(rank.backend()).record(rank.stream(), [&, m](const std::function<void()>&) {
            rank.queue(layer, kModes[m], calls[m]);
          }));
    }
    meet();
    int wrong = 0;
    for (std::uint64_t round = 0; round < 1000; ++round) {
      if (round % 50 == 25) {
        (void)layer.rebalance(random_placement(8, kRanks, kSlots, 4, round), rank.stream());
      }
      const std::size_t m = round % 2;
      graphs[m]->replay();
      wrong += rank.take(calls[m]) != expected[0][m][at][m];
    }
    EXPECT_EQ(wrong, 0);
    group.check();
    meet();
  });
}

}  // namespace
}  // namespace sluice::testing
