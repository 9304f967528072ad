// Layers that were loaded onto a device have the bytes of mapped ones, with weights of -8 or none.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "layer/group_fixture.h"
#include "sluice/loading.h"
#include "sluice/local_experts.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

class CudaLoadingTest : public CudaBackendTest {};

TEST_F(CudaLoadingTest, GivesTheBytesOfMappedWeightsInEveryLayout) {
  struct Case {
    const char* format;
    int group;
    DType scale_dtype;
  };
  const auto transports = make_inproc_transports(1);
  for (const Case& c : {Case{"w4afp8", 128, DType::kFloat32},
                        {"w4afp8", 128, DType::kBFloat16},
                        {"compressed-tensors", 128, DType::kBFloat16},
                        {"compressed-tensors", 32, DType::kFloat32},
                        {"kimi-int4", 32, DType::kBFloat16},
                        {"angelslim", 128, DType::kBFloat16},
                        {"modelopt-w4a8-awq", 128, DType::kFloat32}}) {
    SCOPED_TRACE(c.format);
    ModelGeometry geometry = group_geometry();
    geometry.group_size = c.group;
    const LayersOnDisk files(
        {.geometry = geometry, .format = c.format, .num_layers = 3, .scale_dtype = c.scale_dtype});
    LayerGroup group = LayerGroup::create(group_config(), *transports[0], *backend_);
    for (const int threads : {1, 5}) {
      const std::vector<Layer> loaded = group.add_layers(
          files.checkpoint(), files.checkpoint().moe_layers(), {}, {.num_threads = threads});
      for (std::size_t i = 0; i < loaded.size(); ++i) {
        const Layer mapped =
            group.add_layer(read_layer(files.checkpoint(), files.layer(static_cast<int>(i)), 0, 1));
        EXPECT_EQ(loaded[i].weight_bytes(), mapped.weight_bytes());
        EXPECT_EQ(loaded[i].weight_digest(), mapped.weight_digest()) << "layer " << i;
      }
    }
  }
}

TEST_F(CudaLoadingTest, AFailureLeavesTheMemoryOfTheDeviceAsItWas) {
  const LayersOnDisk files({.geometry = group_geometry(), .num_layers = 2});
  LocalGroup group =
      LocalGroup::create({.hidden = 256, .intermediate = 128, .max_entries = 8}, *backend_);
  const std::vector<int>& layers = files.checkpoint().moe_layers();
  struct Stop {};
  const auto fail = [&](int times) {
    for (int i = 0; i < times; ++i) {
      EXPECT_THROW((void)group.add_layers(files.checkpoint(), layers, 0, 8, {},
                                          {.progress = [](double) { throw Stop(); }}),
                   Stop);
    }
  };
  // The runtime keeps some pages of its own for what was allocated once.
  fail(20);
  std::size_t before = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  constexpr int kTimes = 40;
  fail(kTimes);
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  const std::size_t layer_bytes = files.checkpoint().load_experts(layers[0], 0, 8).bytes();
  EXPECT_LT(before - std::min(before, after), kTimes * layer_bytes / 2);
  EXPECT_EQ(group.memory().prepared_bytes, 0U);
}

}  // namespace
}  // namespace sluice::testing
