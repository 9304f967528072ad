// Float weights to INT4: each rule against its definition, derived a second time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "convert/quantize_weights.h"
#include "convert_fixture.h"
#include "synthetic/random_weights.h"

namespace sluice {
namespace {

using testing::RawCheckpoint;
using testing::small_spec;
using testing::TempDir;

std::vector<float> random_weights(std::uint64_t seed, std::size_t count, float outlier = 1) {
  RandomStream random(seed);
  std::vector<float> w(count);
  for (float& x : w) x = 0.02f * random.normal();
  w[count / 3] *= outlier;
  return w;
}

double error_of(std::span<const float> weights, double scale) {
  double sum = 0;
  for (const float w : weights) {
    const double code = std::clamp(std::nearbyint(w / scale), -8.0, 7.0);
    sum += (w - code * scale) * (w - code * scale);
  }
  return sum;
}

TEST(Quantize, AmaxRules) {
  const auto w = random_weights(1, 128);
  float amax = 0;
  for (const float x : w) amax = std::max(amax, std::fabs(x));
  EXPECT_EQ(group_scale(w, ScaleRule::kAmax7), amax / 7);
  EXPECT_EQ(group_scale(w, ScaleRule::kAmax8), amax / 8);
}

/// No scale of a fine grid over the whole range does better.
TEST(Quantize, MseIsTheLeastOverAFineGrid) {
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    for (const std::size_t size : {32, 128}) {
      const auto w = random_weights(seed, size, seed % 3 == 0 ? 6.0f : 1.0f);
      float amax = 0;
      for (const float x : w) amax = std::max(amax, std::fabs(x));
      const float best = group_scale(w, ScaleRule::kMse);
      EXPECT_GE(best, amax / 16 * 0.999f);
      EXPECT_LE(best, amax / 6 * 1.001f);
      const double least = error_of(w, best);
      constexpr int kSteps = 20'000;
      for (int i = 0; i <= kSteps; ++i) {
        const double s = amax / 16.0 + (amax / 6.0 - amax / 16.0) * i / kSteps;
        ASSERT_GE(error_of(w, s), least * (1 - 1e-5)) << "seed " << seed << ", scale " << s;
      }
      EXPECT_LE(least, error_of(w, group_scale(w, ScaleRule::kAmax7)) * (1 + 1e-5));
      EXPECT_LE(least, error_of(w, group_scale(w, ScaleRule::kAmax8)) * (1 + 1e-5));
    }
  }
}

/// No scale of bf16 at all in the range does better, also where bf16 holds the weights exactly.
TEST(Quantize, MseIsTheLeastAmongScalesOfBf16) {
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    auto w = random_weights(seed, seed % 2 == 0 ? 32 : 128, seed % 3 == 0 ? 6.0f : 1.0f);
    const bool is_exact = seed % 4 == 0;
    if (is_exact) {
      const float s = bf16_to_float(static_cast<std::uint16_t>(0x3c00 + 7 * seed));
      for (float& x : w) x = s * std::clamp(std::nearbyint(x / 0.01f), -7.0f, 7.0f);
      w[1] = 7 * s;
    }
    float amax = 0;
    for (const float x : w) amax = std::max(amax, std::fabs(x));
    const float best = group_scale(w, ScaleRule::kMse, DType::kBFloat16);
    EXPECT_EQ(best, bf16_to_float(bf16_from_float(best)));
    const double least = error_of(w, best);
    int num_tried = 0;
    for (std::uint16_t bits = bf16_from_float(amax / 16); bits <= bf16_from_float(amax / 6);
         ++bits) {
      const double s = bf16_to_float(bits);
      if (s < amax / 16.0 || s > amax / 6.0) continue;
      ASSERT_GE(error_of(w, s), least * (1 - 1e-12)) << "seed " << seed << ", scale " << s;
      num_tried += 1;
    }
    EXPECT_GT(num_tried, 100);
    EXPECT_TRUE(!is_exact || least == 0) << "seed " << seed << ", error " << least;
  }
}

TEST(Quantize, GroupsWithoutAScale) {
  std::vector<float> w(256, 0.0f);
  w[128] = std::numeric_limits<float>::denorm_min();  // amax / 7 is 0 in float32.
  std::vector<std::uint8_t> codes(128, 0xff);
  std::vector<float> scales(2);
  ThreadPool pool(1, available_cores());
  for (const ScaleRule rule : {ScaleRule::kAmax7, ScaleRule::kAmax8, ScaleRule::kMse}) {
    quantize_weights(w, 1, 256, {.rule = rule}, pool, codes, scales);
    EXPECT_THAT(scales, ::testing::Each(0x1p-24f));
    EXPECT_THAT(codes, ::testing::Each(0));
    quantize_weights(w, 1, 256, {.rule = rule, .scale_dtype = DType::kBFloat16}, pool, codes,
                     scales);
    EXPECT_THAT(scales, ::testing::Each(0x1p-24f));
    EXPECT_THAT(codes, ::testing::Each(0));
  }
}

TEST(Quantize, TheSameBitsHoweverManyThreads) {
  const auto w = random_weights(5, 64 * 256);
  std::vector<std::uint8_t> codes1(w.size() / 2), codes3(w.size() / 2);
  std::vector<float> scales1(w.size() / 32), scales3(w.size() / 32);
  const QuantizeRule rule = {.rule = ScaleRule::kMse, .group_size = 32};
  ThreadPool one(1, available_cores()), three(3, available_cores());
  quantize_weights(w, 64, 256, rule, one, codes1, scales1);
  quantize_weights(w, 64, 256, rule, three, codes3, scales3);
  EXPECT_EQ(codes1, codes3);
  EXPECT_EQ(scales1, scales3);
}

struct RuleCase {
  ScaleRule rule;
  const char* format;
  int group;
  DType dtype;
};

class Requantize : public ::testing::TestWithParam<RuleCase> {};

/// From the file to the file: scales and codes of the result follow the rule, derived here again.
TEST_P(Requantize, FollowsItsRule) {
  const RuleCase& c = GetParam();
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("bf16"), dir / "from");
  const ConvertReport report = convert_checkpoint({.from = dir / "from",
                                                   .to = dir / "to",
                                                   .format = c.format,
                                                   .scale_rule = c.rule,
                                                   .group_size = c.group,
                                                   .scale_dtype = c.dtype});
  EXPECT_TRUE(report.is_requantized);
  EXPECT_TRUE(report.is_verified);
  EXPECT_GT(report.relative_error, 0.02);
  EXPECT_LT(report.relative_error, 0.12);
  EXPECT_GE(report.worst_relative_error, report.relative_error);
  EXPECT_THAT(report.worst_matrix, ::testing::HasSubstr("model.layers.3.mlp.experts."));

  RawCheckpoint source(dir / "from");
  const ExpertWeights weights = Checkpoint::open(dir / "to").load_experts(3, 0, 4);
  double errors = 0, squares = 0;
  for (int e = 0; e < 4; ++e) {
    const Expert& expert = weights.experts[static_cast<std::size_t>(e)];
    for (const auto& [stem, m] : {std::pair{"gate_proj", &expert.gate},
                                  {"up_proj", &expert.up},
                                  {"down_proj", &expert.down}}) {
      const auto& raw = source.at(fmt::format("model.layers.3.mlp.experts.{}.{}.weight", e, stem));
      std::vector<float> w(raw.bytes.size() / 2);
      for (std::size_t i = 0; i < w.size(); ++i) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, raw.bytes.data() + 2 * i, 2);
        w[i] = bf16_to_float(bits);
      }
      const auto group = static_cast<std::size_t>(c.group);
      for (std::size_t g = 0; g < w.size() / group; ++g) {
        const auto part = std::span(w).subspan(g * group, group);
        const float scale = group_scale(part, c.rule, c.dtype);
        const float stored = m->scales.dtype == DType::kFloat32
                                 ? m->scales.as<float>()[g]
                                 : bf16_to_float(m->scales.as<std::uint16_t>()[g]);
        ASSERT_EQ(stored, scale);
        for (std::size_t i = 0; i < group; ++i) {
          const int code =
              unpack_int4(m->codes.as<std::uint8_t>(), static_cast<std::int64_t>(g * group + i));
          ASSERT_EQ(code, static_cast<int>(std::clamp(std::nearbyint(part[i] / scale), -8.f, 7.f)));
          const double error = static_cast<double>(part[i]) - code * static_cast<double>(scale);
          errors += error * error;
          squares += static_cast<double>(part[i]) * part[i];
        }
      }
    }
  }
  EXPECT_NEAR(report.relative_error, std::sqrt(errors / squares), 1e-9);
}

INSTANTIATE_TEST_SUITE_P(
    All, Requantize,
    ::testing::Values(RuleCase{ScaleRule::kAmax7, "w4afp8", 128, DType::kFloat32},
                      RuleCase{ScaleRule::kAmax8, "w4afp8", 128, DType::kBFloat16},
                      RuleCase{ScaleRule::kMse, "w4afp8", 128, DType::kFloat32},
                      RuleCase{ScaleRule::kAmax7, "compressed-tensors", 32, DType::kBFloat16},
                      RuleCase{ScaleRule::kMse, "compressed-tensors", 32, DType::kBFloat16}));

TEST(RequantizeFp8, EveryRuleIsVerified) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("fp8-block"), dir / "from");
  double previous = 1;
  for (const ScaleRule rule : {ScaleRule::kAmax7, ScaleRule::kMse}) {
    const ConvertReport report =
        convert_checkpoint({.from = dir / "from",
                            .to = dir / (std::string("to-") + to_string(rule)),
                            .format = "w4afp8",
                            .scale_rule = rule});
    EXPECT_TRUE(report.is_verified);
    EXPECT_EQ(report.source_format, "fp8-block");
    EXPECT_LT(report.relative_error, previous);
    previous = report.relative_error;
  }
}

}  // namespace
}  // namespace sluice
