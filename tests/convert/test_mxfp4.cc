// Conversions of MXFP4: bit for bit between its containers, to INT4 only if that is asked for.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "convert_fixture.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_same_tensors;
using testing::expect_same_weights;
using testing::kFirstLayer;
using testing::RawCheckpoint;
using testing::small_spec;
using testing::TempDir;

SyntheticCheckpoint mxfp4_spec(const char* format) {
  SyntheticCheckpoint spec = small_spec(format, 32);
  spec.scale_dtype = DType::kFloat8E8M0;
  return spec;
}

TEST(ConvertMxfp4, BetweenContainersGivesWhatTheIndependentWriterGives) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec("kimi-mxfp4"), dir / "kimi");
  write_synthetic_checkpoint(mxfp4_spec("deepseek-fp4"), dir / "deepseek");
  const ConvertReport there = convert_checkpoint(
      {.from = dir / "kimi", .to = dir / "made-deepseek", .format = "deepseek-fp4"});
  EXPECT_TRUE(there.is_verified);
  EXPECT_FALSE(there.is_requantized);
  EXPECT_EQ(there.scale_dtype, DType::kFloat8E8M0);
  EXPECT_EQ(there.weights_compared, 4 * 3 * 256 * 128);
  expect_same_tensors(dir / "deepseek", dir / "made-deepseek");
  expect_same_weights(dir / "kimi", dir / "made-deepseek");
  EXPECT_EQ(RawCheckpoint(dir / "made-deepseek").config["expert_dtype"], "fp4");
  const ConvertReport back = convert_checkpoint(
      {.from = dir / "made-deepseek", .to = dir / "made-kimi", .format = "compressed-tensors"});
  EXPECT_TRUE(back.is_verified);
  expect_same_tensors(dir / "kimi", dir / "made-kimi");
  const auto config = RawCheckpoint(dir / "made-kimi").config;
  EXPECT_FALSE(config.contains("expert_dtype"));
  EXPECT_EQ(config["quantization_config"]["format"], "mxfp4-pack-quantized");
  EXPECT_EQ(Checkpoint::open(dir / "made-kimi").weight_format(), WeightFormat::kMxfp4);
}

/// gpt-oss' fused tensors, with biases and widths that are no multiples of 128.
TEST(ConvertMxfp4, GptOssAndBackGivesWhatTheIndependentWriterGives) {
  SyntheticCheckpoint fused = synthetic_preset("gpt-oss-20b");
  fused.geometry.num_experts = 4, fused.geometry.num_topk = 2, fused.num_layers = 2;
  fused.geometry.set_widths(160, 96);
  SyntheticCheckpoint single = fused;
  single.format = "kimi-mxfp4";
  fused.max_shard_bytes = 100'000;
  const TempDir dir;
  write_synthetic_checkpoint(fused, dir / "fused");
  write_synthetic_checkpoint(single, dir / "single");
  const ConvertReport there = convert_checkpoint(
      {.from = dir / "fused", .to = dir / "made-single", .format = "compressed-tensors"});
  EXPECT_TRUE(there.is_verified);
  EXPECT_EQ(there.weights_compared, 2 * 4 * 3 * 160 * 96);
  expect_same_tensors(dir / "single", dir / "made-single");
  const ConvertReport back = convert_checkpoint({.from = dir / "made-single",
                                                 .to = dir / "made-fused",
                                                 .format = "gpt-oss",
                                                 .max_shard_bytes = 70'000});
  EXPECT_TRUE(back.is_verified);
  expect_same_tensors(dir / "fused", dir / "made-fused");
  EXPECT_EQ(RawCheckpoint(dir / "made-fused").config["quantization_config"]["quant_method"],
            "mxfp4");
  // Experts in shares fill their parts of the same tensors.
  for (const int first : {2, 0}) {
    (void)convert_checkpoint({.from = dir / "made-single",
                              .to = dir / "shares",
                              .format = "gpt-oss",
                              .first_expert = first,
                              .num_experts = 2});
  }
  expect_same_tensors(dir / "fused", dir / "shares");
  for (const char* format : {"w4afp8", "deepseek-fp4", "compressed-tensors"}) {
    expect_error(ErrorCode::kUnsupported, {"have biases", "gate_up_proj_bias", "no place for"},
                 [&] {
                   (void)convert_checkpoint({.from = dir / "fused",
                                             .to = dir / "no",
                                             .format = format,
                                             .scale_rule = ScaleRule::kAmax7,
                                             .group_size = 32});
                 });
  }
  write_synthetic_checkpoint(mxfp4_spec("kimi-mxfp4"), dir / "bare");
  expect_error(
      ErrorCode::kUnsupported,
      {"gpt-oss holds MXFP4 with biases", "these weights would be MXFP4 without biases"}, [&] {
        (void)convert_checkpoint({.from = dir / "bare", .to = dir / "no", .format = "gpt-oss"});
      });
}

TEST(ConvertMxfp4, BecomesInt4ByARuleAlone) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec("deepseek-fp4"), dir / "from");
  for (const char* format : {"w4afp8", "compressed-tensors"}) {
    const ConvertReport report = convert_checkpoint({.from = dir / "from",
                                                     .to = dir / format,
                                                     .format = format,
                                                     .scale_rule = ScaleRule::kAmax7});
    EXPECT_TRUE(report.is_verified);
    EXPECT_TRUE(report.is_requantized);
    EXPECT_EQ(report.requantized_because, "mxfp4 becomes INT4");
    EXPECT_GT(report.relative_error, 0.03);  // Eleven of its sixteen values lie between INT4's.
    EXPECT_LT(report.relative_error, 0.2);
    const Checkpoint made = Checkpoint::open(dir / format);
    EXPECT_EQ(made.weight_format(), WeightFormat::kInt4);
    (void)made.load_experts(kFirstLayer, 0, 4);
  }
  expect_error(
      ErrorCode::kUnsupported, {"w4afp8 does not have", "a scale rule", "--scale amax7"}, [&] {
        (void)convert_checkpoint({.from = dir / "from", .to = dir / "no", .format = "w4afp8"});
      });
}

TEST(ConvertMxfp4, WhatItsContainersCannotHoldIsRefused) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec("kimi-mxfp4"), dir / "mxfp4");
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "int4");
  write_synthetic_checkpoint(small_spec("bf16"), dir / "bf16");
  // Nothing quantizes to MXFP4, with a rule or without.
  for (const char* const format : {"deepseek-fp4", "gpt-oss"}) {
    for (const auto rule : {std::optional<ScaleRule>(), std::optional(ScaleRule::kAmax7)}) {
      expect_error(
          ErrorCode::kUnsupported, {std::string(format) + " holds MXFP4", "would be INT4"}, [&] {
            (void)convert_checkpoint(
                {.from = dir / "bf16", .to = dir / "no", .format = format, .scale_rule = rule});
          });
    }
  }
  expect_error(ErrorCode::kUnsupported, {"deepseek-fp4 holds MXFP4"}, [&] {
    (void)convert_checkpoint({.from = dir / "int4", .to = dir / "no", .format = "deepseek-fp4"});
  });
  expect_error(ErrorCode::kUnsupported, {"deepseek-fp4 holds MXFP4"}, [&] {
    (void)convert_checkpoint({.from = dir / "mxfp4",
                              .to = dir / "no",
                              .format = "deepseek-fp4",
                              .scale_rule = ScaleRule::kAmax7});
  });
  expect_error(ErrorCode::kInvalidArgument, {"group size 128", "MXFP4 has groups of 32"}, [&] {
    (void)convert_checkpoint({.from = dir / "mxfp4",
                              .to = dir / "no",
                              .format = "compressed-tensors",
                              .group_size = 128});
  });
  expect_error(ErrorCode::kInvalidArgument, {"scale_dtype float32", "e8m0"}, [&] {
    (void)convert_checkpoint({.from = dir / "mxfp4",
                              .to = dir / "no",
                              .format = "compressed-tensors",
                              .scale_dtype = DType::kFloat32});
  });
}

TEST(ConvertMxfp4, TheRestOfTheModelMustBeWhatTheContainerSays) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec("kimi-mxfp4"), dir / "kimi");
  RawCheckpoint raw(dir / "kimi");
  raw.add("model.norm.weight", {"BF16", {4}, std::string(8, 'x')});
  raw.write(dir / "bf16-rest");
  expect_error(ErrorCode::kUnsupported, {"the rest of the model is FP8"}, [&] {
    (void)convert_checkpoint(
        {.from = dir / "bf16-rest", .to = dir / "no", .format = "deepseek-fp4"});
  });
  const ConvertReport alone = convert_checkpoint({.from = dir / "bf16-rest",
                                                  .to = dir / "alone",
                                                  .format = "deepseek-fp4",
                                                  .experts_only = true});
  EXPECT_TRUE(alone.is_verified);
  write_synthetic_checkpoint(mxfp4_spec("deepseek-fp4"), dir / "deepseek");
  RawCheckpoint fp8(dir / "deepseek");
  fp8.add("model.layers.0.self_attn.o_proj.weight", {"F8_E4M3", {4}, std::string(4, 'x')});
  fp8.write(dir / "fp8-rest");
  expect_error(ErrorCode::kUnsupported, {"o_proj.weight", "F8_E4M3"}, [&] {
    (void)convert_checkpoint(
        {.from = dir / "fp8-rest", .to = dir / "no", .format = "compressed-tensors"});
  });
}

}  // namespace
}  // namespace sluice
