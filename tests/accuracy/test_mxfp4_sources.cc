// Where weights of MXFP4 come from: made-up originals round to the codes that are there, and the
// certificate of such a layer is made of both.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "accuracy_fixture.h"
#include "sluice/lab/synthetic.h"

namespace sluice::testing {
namespace {

ModelGeometry mxfp4_geometry() {
  ModelGeometry g = accuracy_geometry();
  g.weight_format = WeightFormat::kMxfp4;
  g.group_size = 32;
  return g;
}

/// Every original rounds to its code: `e2m1_from_float(w / scale)`, whose sign of 0 may be either.
void expect_originals_round(const SourceMatrix& m) {
  const QuantMatrix& q = m.quantized;
  const auto* const codes = q.codes.as<std::uint8_t>();
  int used[16] = {};
  for (std::int64_t i = 0; i < q.n() * q.k(); ++i) {
    const std::uint8_t code = unpack_nibble(codes, i);
    const float w = m.original[i] / scale_value(q.scales, i / 32);
    ASSERT_EQ(e2m1_to_float(e2m1_from_float(w)), e2m1_to_float(code)) << i << ": " << w;
    ++used[code];
  }
  for (const int code : {0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 15}) EXPECT_GT(used[code], 0) << code;
}

TEST(Mxfp4Source, MadeUpWeightsAreQuantizedByPowersOfTwo) {
  const auto source = make_synthetic_source(mxfp4_geometry(), 1);
  EXPECT_THAT(source->original_kind(), ::testing::HasSubstr("e2m1"));
  const SourceMatrix m = source->matrix(2, MatrixRole::kUp);
  EXPECT_EQ(m.quantized.format, WeightFormat::kMxfp4);
  expect_originals_round(m);
  for (std::int64_t g = 0; g < m.quantized.n() * m.quantized.k() / 32; ++g) {
    float amax = 0;
    for (std::int64_t i = 32 * g; i < 32 * g + 32; ++i) {
      amax = std::max(amax, std::fabs(m.original[i]));
    }
    const float largest = amax / scale_value(m.quantized.scales, g);
    ASSERT_TRUE(largest >= 4 && largest < 8) << largest;
  }
}

TEST(Mxfp4Source, OriginalsOfACheckpointAreDrawnFromItsCells) {
  const auto dir =
      std::filesystem::temp_directory_path() / ("sluice-mxfp4-" + std::to_string(::getpid()));
  write_synthetic_checkpoint(
      {.geometry = mxfp4_geometry(), .format = "deepseek-fp4", .scale_dtype = DType::kFloat8E8M0},
      dir);
  const Checkpoint checkpoint = Checkpoint::open(dir);
  const auto source = make_checkpoint_source(checkpoint, checkpoint.moe_layers().front(), 9);
  expect_originals_round(source->matrix(1, MatrixRole::kGate));
  std::filesystem::remove_all(dir);
}

/// What W4A8 adds to 4-bit weights alone: positive, and less than what the weights cost.
TEST(Mxfp4Source, ACertificateSaysWhatTheActivationsAdd) {
  const auto source = make_synthetic_source(mxfp4_geometry(), 4);
  AccuracyConfig config;
  config.recipes = {parse_recipe("direct")};
  const SuiteCertificate suite =
      certify(*source, make_suite("gaussian", mxfp4_geometry(), 24, 1), config);
  const RecipeCertificate& direct = suite.recipes.at(0);
  EXPECT_NEAR(direct.activation1.relative_l2, 0.0257, 0.0015);
  ASSERT_TRUE(direct.roundings.weights && direct.added_percent);
  EXPECT_GT(*direct.roundings.weights, 0.1);  // About 0.11 for each weight, more behind SwiGLU.
  EXPECT_LT(*direct.roundings.weights, 0.3);
  EXPECT_GT(*direct.added_percent, 0);
  EXPECT_LT(*direct.added_percent, 5);
}

}  // namespace
}  // namespace sluice::testing
