// One certificate for both devices: the same payload bytes, and outputs within the stated limit.
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdio>
#include <filesystem>

#include "sluice/lab/accuracy.h"
#include "sluice/lab/synthetic.h"
#include "support/cuda_fixture.h"

namespace sluice::testing {
namespace {

class CudaAccuracyTest : public CudaBackendTest {
 protected:
  void SetUp() override {
    CudaBackendTest::SetUp();
    if (IsSkipped()) return;
    backend_.reset();  // Ranks make their own.
    for (const int group_size : {128, 32}) {
      const auto dir = dir_ / std::to_string(group_size);
      write_synthetic_checkpoint({.geometry = {.name = "certified",
                                               .num_experts = 8,
                                               .num_topk = 4,
                                               .hidden = 1024,
                                               .intermediate = 512,
                                               .group_size = group_size},
                                  .format = group_size == 32 ? "compressed-tensors" : "w4afp8"},
                                 dir);
      checkpoints_.push_back(Checkpoint::open(dir));
    }
  }
  ~CudaAccuracyTest() override {
    std::error_code ignored;
    std::filesystem::remove_all(dir_, ignored);
  }
  static EngineRanks ranks(const Checkpoint& checkpoint, Device::Kind kind, int num_ranks,
                           Mode mode) {
    return {.checkpoint = &checkpoint,
            .layer = checkpoint.moe_layers().front(),
            .num_ranks = num_ranks,
            .mode = mode,
            .make_backend = backends_on(kind)};
  }
  static TokenSuite suite(const Checkpoint& checkpoint, const std::string& name) {
    return make_suite(name, checkpoint.geometry(), 37, 2);
  }

  std::filesystem::path dir_ = std::filesystem::temp_directory_path() /
                               ("sluice-cuda-accuracy-" + std::to_string(::getpid()));
  std::vector<Checkpoint> checkpoints_;
};

TEST_F(CudaAccuracyTest, CpuAndCudaHaveOneCertificate) {
  for (const Checkpoint& checkpoint : checkpoints_) {
    const int layer = checkpoint.moe_layers().front();
    const auto source = make_checkpoint_source(checkpoint, layer, 1);
    for (const std::string& name : suite_names()) {
      const TokenSuite tokens = suite(checkpoint, name);
      std::vector<SuiteCertificate> certificates;
      const std::pair<Device::Kind, Mode> runs[] = {{Device::Kind::kHost, Mode::kLowLatency},
                                                    {Device::Kind::kCuda, Mode::kLowLatency},
                                                    {Device::Kind::kCuda, Mode::kNormal}};
      for (const auto& [kind, mode] : runs) {
        const EngineRanks engines = ranks(checkpoint, kind, 2, mode);
        AccuracyConfig config;
        config.static_scales = checkpoint.static_scales(layer);
        config.engine = &engines;
        certificates.push_back(certify(*source, tokens, config));
      }
      double farthest = 0, differ = 0;
      for (std::size_t i = 0; i < certificates[0].recipes.size(); ++i) {
        const RecipeCertificate& cpu = certificates[0].recipes[i];
        if (!cpu.engine) continue;
        for (std::size_t run = 0; run < certificates.size(); ++run) {
          SCOPED_TRACE(::testing::Message()
                       << "groups of " << checkpoint.geometry().group_size << ' ' << name << ' '
                       << to_string(cpu.recipe) << " run " << run);
          const RecipeCertificate& r = certificates[run].recipes[i];
          ASSERT_TRUE(r.engine);
          EXPECT_TRUE(r.engine->same_bytes);
          EXPECT_TRUE(r.engine->passed()) << r.engine->distance << " of " << r.engine->limit;
          EXPECT_EQ(r.output.relative_l2, cpu.output.relative_l2);
          EXPECT_EQ(r.engine->limit, engine_limit(runs[run].first));
          farthest = std::max(farthest, r.engine->distance);
          differ = std::max(
              differ, std::abs(r.engine->output.relative_l2 - cpu.engine->output.relative_l2));
        }
      }
      EXPECT_GT(farthest, 0) << "no recipe ran";
      EXPECT_LE(differ, 0.002) << name;
      std::printf("groups of %d, %s: distance %.2e, errors differ by %.2e\n",
                  checkpoint.geometry().group_size, name.c_str(), farthest, differ);
    }
  }
}

TEST_F(CudaAccuracyTest, ProofsOfBothDevicesHaveOneDigest) {
  for (const Checkpoint& checkpoint : checkpoints_) {
    const std::vector<TokenSuite> suites = {suite(checkpoint, "outliers"),
                                            suite(checkpoint, "dead-expert")};
    for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
      const auto prove = [&](Device::Kind kind, int num_ranks) {
        return prove_identity(ranks(checkpoint, kind, num_ranks, mode), suites);
      };
      const IdentityProof cpu = prove(Device::Kind::kHost, 2);
      EXPECT_TRUE(cpu.passed());
      for (const int num_ranks : {1, 2, 4}) {
        const IdentityProof cuda = prove(Device::Kind::kCuda, num_ranks);
        EXPECT_TRUE(cuda.passed()) << to_string(mode) << ", " << num_ranks << " ranks";
        EXPECT_EQ(cuda.direct, cpu.direct) << to_string(mode) << ", " << num_ranks << " ranks";
      }
    }
  }
}

}  // namespace
}  // namespace sluice::testing
