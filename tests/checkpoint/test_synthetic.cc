// The synthetic writer: what it writes loads, and looks like a quantized model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "temp_dir.h"
#include "sluice/checkpoint.h"
#include "sluice/error.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

using testing::TempDir;

TEST(Synthetic, WrittenCheckpointLoads) {
  const TempDir dir;
  write_synthetic_checkpoint({.geometry = preset_geometry("tiny")}, dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  EXPECT_EQ(checkpoint.format(), "w4afp8");
  EXPECT_THAT(checkpoint.moe_layers(), ::testing::ElementsAre(3));
  const ExpertWeights weights = checkpoint.load_experts(3, 0, 8);
  EXPECT_EQ(weights.experts.size(), 8U);
  constexpr std::size_t kWeights = 8 * 3 * 256 * 128;
  EXPECT_EQ(weights.bytes(), kWeights / 2 + kWeights / 128 * 4);
  ASSERT_TRUE(weights.static_scales);
}

}  // namespace
}  // namespace sluice
