// test_w4a8_config.cc - the host-side choices of the W4A8 kernels; needs no GPU.
#include <gtest/gtest.h>

#include "backend/cuda/w4a8.h"

namespace sluice::cuda {
namespace {

KernelConfig choose(int expected_m, int max_rows, int num_experts = 32) {
  return choose_config({.num_experts = num_experts, .expected_m = expected_m, .max_rows = max_rows},
                       {})
      .config;
}

TEST(W4A8Config, UpTo32RowsWeightBytesDecide) {
  EXPECT_EQ(choose(1, 0), KernelConfig::kDecode);
  EXPECT_EQ(choose(32, 0), KernelConfig::kDecode);
  EXPECT_EQ(choose(33, 0), KernelConfig::kPrefill64);
}

TEST(W4A8Config, TilesAreAsWideAsRowsAreExpected) {
  EXPECT_EQ(choose(64, 0), KernelConfig::kPrefill64);
  EXPECT_EQ(choose(65, 0), KernelConfig::kPrefill);
  EXPECT_EQ(choose(1024, 0), KernelConfig::kPrefill);
}

TEST(W4A8Config, ACapacityOfFewRowsDecidesAlone) {
  EXPECT_EQ(choose(1024, 32), KernelConfig::kDecode);
  EXPECT_EQ(choose(1024, 33), KernelConfig::kPrefill);
  EXPECT_EQ(choose(8, 1024), KernelConfig::kDecode);
}

TEST(W4A8Config, FewExpertsKeepSmallTilesUpTo64Rows) {
  EXPECT_EQ(choose(64, 0, 8), KernelConfig::kDecode);
  EXPECT_EQ(choose(65, 0, 8), KernelConfig::kPrefill);
  EXPECT_EQ(choose(64, 0, 9), KernelConfig::kPrefill64);
}

TEST(W4A8Config, OneScalePerRowKeepsOneKernelUpTo64Rows) {
  for (const int expected_m : {1, 64, 65, 1024}) {
    const ConfigChoice choice =
        choose_config({.num_experts = 32, .expected_m = expected_m, .has_row_scales = true}, {});
    EXPECT_EQ(choice.config, expected_m <= 64 ? KernelConfig::kDecode : KernelConfig::kPrefill);
  }
}

TEST(W4A8Config, OneCtaForEachSmAndAReason) {
  const ConfigChoice choice = choose_config({.num_experts = 8, .expected_m = 8}, {.num_sms = 78});
  EXPECT_EQ(choice.num_ctas, 78);
  EXPECT_STRNE(choice.reason, "");
  EXPECT_EQ(choose_config({.num_experts = 8, .expected_m = 8}, {.num_sms = 0}).num_ctas, 1);
}

// Rows of 64, K steps of 128: 4096 bytes of codes and the scales of 64 rows.
TEST(W4A8Config, PackedBytesAreCodesAndScales) {
  EXPECT_EQ(packed_expert_bytes({.n = 4096, .k = 7168}), 64u * 56 * (4096 + 64 * 2));
  EXPECT_EQ(packed_expert_bytes({.n = 128, .k = 128, .scale_type = ScaleType::kF32}),
            2u * (4096 + 64 * 4));
  EXPECT_EQ(packed_expert_bytes({.n = 128, .k = 256, .group = 32}), 2u * 2 * (4096 + 64 * 4 * 2));
  EXPECT_EQ(packed_expert_bytes({.n = 128,
                                 .k = 256,
                                 .group = 32,
                                 .scale_type = ScaleType::kE8M0,
                                 .format = WeightFormat::kMxfp4}),
            2u * 2 * (4096 + 64 * 4));
}

}  // namespace
}  // namespace sluice::cuda
