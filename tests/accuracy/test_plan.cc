// `sluice plan`: the bytes it names are the bytes an engine then takes.
#include <gtest/gtest.h>

#include <unistd.h>

#include <filesystem>
#include <map>

#include "exchange/cuda/device_layout.h"
#include "exchange/cuda/exchange_kernels.h"
#include "sluice/engine.h"
#include "sluice/error.h"
#include "sluice/lab/ranks.h"
#include "sluice/lab/synthetic.h"
#include "sluice/transport.h"
#include "support/counting.h"

namespace sluice::testing {
namespace {

class Plan : public ::testing::Test {
 protected:
  ~Plan() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }
  std::filesystem::path dir_ =
      std::filesystem::temp_directory_path() / ("sluice-plan-" + std::to_string(::getpid()));
};

TEST_F(Plan, IsWhatAnEngineTakes) {
  const ModelGeometry geometry = preset_geometry("tiny");
  for (const DType scale_dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::filesystem::remove_all(dir_);
    write_synthetic_checkpoint({.geometry = geometry, .scale_dtype = scale_dtype}, dir_);
    const Checkpoint checkpoint = Checkpoint::open(dir_);
    const std::optional<Recipe> direct = parse_recipe("direct"), none;
    const std::optional<Recipe> bf16 = parse_recipe("bf16-static");
    for (const auto& [low_latency, normal] : {std::pair{direct, none}, std::pair{none, direct},
                                              std::pair{bf16, none}, std::pair{direct, bf16}}) {
      for (const int num_ranks : {1, 2, 4}) {
        const EngineConfig config{.layer = checkpoint.moe_layers().front(),
                                  .low_latency = low_latency,
                                  .normal = normal,
                                  .max_tokens_per_rank = 5};
        const LayerGroupMemory plan = Engine::plan_memory(
            config, checkpoint.geometry(), scale_dtype, Device::Kind::kHost, num_ranks);
        auto transports = make_inproc_transports(num_ranks);
        on_every_rank(num_ranks, [&](int r) {
          CountingBackend backend({.num_threads = 1});
          CountingTransport transport(*transports[static_cast<std::size_t>(r)]);
          const Engine engine = Engine::create(config, checkpoint, transport, backend);
          SCOPED_TRACE(::testing::Message() << num_ranks << " ranks");
          expect_taken(engine, backend, transport, plan);
          const ExpertWeights weights =
              checkpoint.load_experts(config.layer, 0, geometry.num_experts / num_ranks);
          EXPECT_EQ(weights.bytes(), plan.codes_bytes + plan.scales_bytes);
        });
      }
    }
  }
}

/// tests/accuracy/test_cuda_plan.cc counts what is taken on a device; this much needs none.
TEST_F(Plan, KnowsTheStateOfACudaExchange) {
  for (const int num_slots : {1, 3}) {
    const ExchangeConfig config{.num_experts = 8,
                                .num_topk = 2,
                                .hidden = 256,
                                .max_tokens_per_rank = 5,
                                .max_m = 10,
                                .num_in_flight = num_slots};
    const DeviceLayout layout(config, 2);
    ASSERT_EQ(layout.num_slots, num_slots);
    EXPECT_EQ(Exchange::workspace_bytes(config, 2, Device::Kind::kCuda),
              layout.window_bytes() + layout.private_bytes() + layout.state_bytes());
  }
}

TEST_F(Plan, GrowsWithTokensAndRefusesNonsense) {
  const ModelGeometry geometry = preset_geometry("r1-layer");
  const auto total = [&](int tokens, int ranks) {
    EngineConfig config;
    config.normal.reset();
    config.max_tokens_per_rank = tokens;
    return Engine::plan_memory(config, geometry, DType::kBFloat16, Device::Kind::kHost, ranks)
        .total_bytes();
  };
  EXPECT_LT(total(1, 8), total(2, 8));
  EXPECT_LT(total(2, 8), total(128, 8));
  // 32 local experts of 22.0 MB codes and 0.69 MB scales (docs/design.md).
  EXPECT_NEAR(static_cast<double>(total(1, 8)), 727e6, 10e6);
  EXPECT_THROW((void)total(1, 7), Error);
  EXPECT_THROW((void)total(0, 8), Error);
}

}  // namespace
}  // namespace sluice::testing
