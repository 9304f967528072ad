// The bytes that `sluice plan --backend cuda` names are those that engines then take on the device.
#include <gtest/gtest.h>

#include <unistd.h>

#include <filesystem>

#include "sluice/engine.h"
#include "sluice/lab/ranks.h"
#include "sluice/lab/synthetic.h"
#include "sluice/transport.h"
#include "support/counting.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

class CudaPlanTest : public CudaBackendTest {
 protected:
  void SetUp() override {
    CudaBackendTest::SetUp();
    backend_.reset();  // Ranks make their own.
  }
  ~CudaPlanTest() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }
  std::filesystem::path dir_ =
      std::filesystem::temp_directory_path() / ("sluice-cuda-plan-" + std::to_string(::getpid()));
};

TEST_F(CudaPlanTest, IsWhatEnginesTake) {
  const ModelGeometry geometry = {
      .name = "plan", .num_experts = 8, .num_topk = 3, .hidden = 384, .intermediate = 640};
  for (const DType scale_dtype : {DType::kFloat32, DType::kBFloat16}) {
    std::filesystem::remove_all(dir_);
    write_synthetic_checkpoint({.geometry = geometry, .scale_dtype = scale_dtype}, dir_);
    const Checkpoint checkpoint = Checkpoint::open(dir_);
    const std::optional<Recipe> direct = parse_recipe("direct"), none;
    const std::optional<Recipe> bf16 = parse_recipe("bf16-static"),
                                twice = parse_recipe("requant-static");
    for (const auto& [low_latency, normal] : {std::pair{direct, none}, std::pair{none, direct},
                                              std::pair{bf16, none}, std::pair{twice, bf16}}) {
      for (const int num_ranks : {1, 2, 4}) {
        const EngineConfig config{.layer = checkpoint.moe_layers().front(),
                                  .low_latency = low_latency,
                                  .normal = normal,
                                  .max_tokens_per_rank = 37};
        const LayerGroupMemory plan = Engine::plan_memory(
            config, checkpoint.geometry(), scale_dtype, Device::Kind::kCuda, num_ranks);
        auto transports = make_inproc_transports(num_ranks);
        on_every_rank(num_ranks, [&](int r) {
          CountingBackend backend(
              {.device = {Device::Kind::kCuda, 0}, .local_rank = r, .num_local_ranks = num_ranks});
          CountingTransport transport(*transports[static_cast<std::size_t>(r)]);
          const Engine engine = Engine::create(config, checkpoint, transport, backend);
          SCOPED_TRACE(::testing::Message() << num_ranks << " ranks");
          expect_taken(engine, backend, transport, plan);
          (void)transport.all_gather({}, config.peer_timeout);
        });
      }
    }
  }
}

}  // namespace
}  // namespace sluice::testing
