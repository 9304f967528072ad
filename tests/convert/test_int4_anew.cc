// INT4 that a target cannot hold, quantized anew where that is asked for, and nowhere else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "convert/quantize_weights.h"
#include "convert/verify.h"
#include "convert_fixture.h"
#include "sluice/lab/synthetic.h"

namespace sluice {
namespace {

using testing::dequantized;
using testing::expect_error;
using ::testing::HasSubstr;
using testing::RawCheckpoint;
using testing::small_spec;
using testing::TempDir;

constexpr std::array kMembers = {&Expert::gate, &Expert::up, &Expert::down};
constexpr std::array kStems = {"gate_proj", "up_proj", "down_proj"};

/// Codes and scales of `made` follow `rule` from the weights `w`; adds to the sums of squares.
void expect_quantized(std::span<const float> w, const QuantMatrix& made, ScaleRule rule,
                      double& errors, double& squares) {
  const auto group = static_cast<std::size_t>(made.group_size);
  for (std::size_t g = 0; g < w.size() / group; ++g) {
    const auto part = w.subspan(g * group, group);
    const float scale = made.scales.dtype == DType::kFloat32
                            ? made.scales.as<float>()[g]
                            : bf16_to_float(made.scales.as<std::uint16_t>()[g]);
    ASSERT_EQ(scale, group_scale(part, rule, made.scales.dtype));
    for (std::size_t i = 0; i < group; ++i) {
      const int code =
          unpack_int4(made.codes.as<std::uint8_t>(), static_cast<std::int64_t>(g * group + i));
      ASSERT_EQ(code, static_cast<int>(std::clamp(std::nearbyint(part[i] / scale), -8.f, 7.f)));
      const double error = static_cast<double>(part[i]) - code * static_cast<double>(scale);
      errors += error * error;
      squares += static_cast<double>(part[i]) * part[i];
    }
  }
}

/// Kimi's groups of 32 become W4AFP8's of 128.
TEST(Int4Anew, GroupsOf32BecomeGroupsOf128) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "from");
  for (const ScaleRule rule : {ScaleRule::kAmax7, ScaleRule::kMse}) {
    const auto to = dir / (std::string("to-") + to_string(rule));
    const ConvertReport report = convert_checkpoint(
        {.from = dir / "from", .to = to, .format = "w4afp8", .scale_rule = rule});
    EXPECT_TRUE(report.is_requantized);
    EXPECT_TRUE(report.is_verified);
    EXPECT_EQ(report.requantized_because, "groups of 32 become groups of 128");
    const ExpertWeights source = Checkpoint::open(dir / "from").load_experts(3, 0, 4);
    const ExpertWeights made = Checkpoint::open(to).load_experts(3, 0, 4);
    EXPECT_EQ(made.geometry.group_size, 128);
    double errors = 0, squares = 0;
    for (std::size_t e = 0; e < 4; ++e) {
      for (const auto member : kMembers) {
        expect_quantized(dequantized(source.experts[e].*member), made.experts[e].*member, rule,
                         errors, squares);
      }
    }
    EXPECT_NEAR(report.relative_error, std::sqrt(errors / squares), 1e-9);
    EXPECT_GT(report.relative_error, 0.01);
  }
}

/// AWQ's factors of the input's channels end up in the weights.
TEST(Int4Anew, APreQuantScaleIsFoldedIn) {
  const TempDir dir;
  SyntheticCheckpoint spec = small_spec("modelopt-w4a8-awq");
  write_synthetic_checkpoint(spec, dir / "plain");
  spec.with_pre_quant_scale = true;
  write_synthetic_checkpoint(spec, dir / "awq");
  const ConvertReport report = convert_checkpoint({.from = dir / "awq",
                                                   .to = dir / "to",
                                                   .format = "compressed-tensors",
                                                   .scale_rule = ScaleRule::kMse,
                                                   .drop_input_scales = true});
  EXPECT_TRUE(report.is_verified);
  EXPECT_FALSE(report.has_input_scales);
  EXPECT_EQ(report.geometry.group_size, 128);
  EXPECT_THAT(report.requantized_because, HasSubstr("experts.0.gate_proj.pre_quant_scale"));
  // The same seed has the same codes and scales without the factors.
  const ExpertWeights plain = Checkpoint::open(dir / "plain").load_experts(3, 0, 4);
  const ExpertWeights made = Checkpoint::open(dir / "to").load_experts(3, 0, 4);
  RawCheckpoint raw(dir / "awq");
  double errors = 0, squares = 0;
  for (std::size_t e = 0; e < 4; ++e) {
    for (std::size_t m = 0; m < kMembers.size(); ++m) {
      std::vector<float> w = dequantized(plain.experts[e].*kMembers[m]);
      const std::string& bytes =
          raw.at(fmt::format("model.layers.3.mlp.experts.{}.{}.pre_quant_scale", e, kStems[m]))
              .bytes;
      const std::size_t k = bytes.size() / 2;
      for (std::size_t i = 0; i < w.size(); ++i) {
        std::uint16_t bits = 0;
        std::memcpy(&bits, bytes.data() + 2 * (i % k), 2);
        w[i] *= bf16_to_float(bits);
      }
      expect_quantized(w, made.experts[e].*kMembers[m], ScaleRule::kMse, errors, squares);
    }
  }
  EXPECT_NEAR(report.relative_error, std::sqrt(errors / squares), 1e-9);
}

/// A factor that load() can fold is in the floats too, where other groups force a second rounding.
TEST(Int4Anew, AUniformPreQuantScaleIsNotLost) {
  const TempDir dir;
  SyntheticCheckpoint spec = small_spec("modelopt-w4a8-awq");
  spec.with_pre_quant_scale = true;
  write_synthetic_checkpoint(spec, dir / "awq");
  RawCheckpoint raw(dir / "awq");
  for (auto& [file_name, file] : raw.files) {
    for (auto& [name, tensor] : file) {
      if (!name.ends_with("pre_quant_scale")) continue;
      for (std::size_t i = 0; i < tensor.bytes.size(); i += 2) {
        tensor.bytes.replace(i, 2, std::string("\x00\x3e", 2));  // 2^-3 as BF16.
      }
    }
  }
  raw.write(dir / "uniform");
  const ConvertReport report = convert_checkpoint({.from = dir / "uniform",
                                                   .to = dir / "to",
                                                   .format = "compressed-tensors",
                                                   .scale_rule = ScaleRule::kAmax7,
                                                   .group_size = 32});
  EXPECT_EQ(report.requantized_because, "groups of 128 become groups of 32");
  const Checkpoint from = Checkpoint::open(dir / "uniform");
  const ExpertWeights source = from.load_experts(3, 0, 4);
  const ExpertWeights made = Checkpoint::open(dir / "to").load_experts(3, 0, 4);
  constexpr std::array kRoles = {MatrixRole::kGate, MatrixRole::kUp, MatrixRole::kDown};
  double errors = 0, squares = 0;
  for (std::size_t e = 0; e < 4; ++e) {
    for (std::size_t m = 0; m < kMembers.size(); ++m) {
      const std::vector<float> w = dequantized(source.experts[e].*kMembers[m]);
      std::vector<float> floats(w.size());
      from.load_floats(3, static_cast<int>(e), kRoles[m], floats);
      ASSERT_EQ(floats, w);
      expect_quantized(w, made.experts[e].*kMembers[m], ScaleRule::kAmax7, errors, squares);
    }
  }
  EXPECT_NEAR(report.relative_error, std::sqrt(errors / squares), 1e-9);
}

/// Verification of what was INT4 and is quantized anew finds one code that is not the nearest.
TEST(Int4Anew, IsVerifiedWeightByWeight) {
  const TempDir dir;
  SyntheticCheckpoint spec = small_spec("modelopt-w4a8-awq");
  spec.with_pre_quant_scale = true;
  write_synthetic_checkpoint(spec, dir / "from");
  (void)convert_checkpoint({.from = dir / "from",
                            .to = dir / "to",
                            .format = "w4afp8",
                            .scale_rule = ScaleRule::kAmax7,
                            .drop_input_scales = true});
  RawCheckpoint raw(dir / "to");
  char& byte = raw.at("model.layers.3.mlp.experts.1.up_proj.weight").bytes[5 * 128];
  byte = static_cast<char>(byte ^ 0x02);
  raw.write(dir / "bad");
  const CheckpointData source = CheckpointData::open(dir / "from");
  ThreadPool pool(2, available_cores());
  expect_error(ErrorCode::kCorruptFile, {"experts.1.up_proj [5, 0]", "half a step"}, [&] {
    (void)verify_result(source, CheckpointData::open(dir / "bad"),
                        {.layers = {3}, .is_requantized = true}, pool, [](double) {});
  });
}

TEST(Int4Anew, OnlyWhereItMustAndOnlyIfAskedFor) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "kimi");
  SyntheticCheckpoint spec = small_spec("modelopt-w4a8-awq");
  write_synthetic_checkpoint(spec, dir / "plain");
  spec.with_pre_quant_scale = true;
  write_synthetic_checkpoint(spec, dir / "awq");
  const auto refuse = [&](const ConvertOptions& options, ErrorCode code,
                          const std::vector<std::string>& parts) {
    expect_error(code, parts, [&] { (void)convert_checkpoint(options); });
    EXPECT_FALSE(std::filesystem::exists(options.to));
  };
  ConvertOptions o = {.from = dir / "kimi", .to = dir / "to", .format = "w4afp8"};
  refuse(o, ErrorCode::kUnsupported, {"groups of 32", "a scale rule, --scale amax7, amax8 or mse"});
  o.format = "compressed-tensors", o.scale_rule = ScaleRule::kAmax7;
  refuse(o, ErrorCode::kInvalidArgument, {"compressed-tensors, whose INT4", "are kept"});
  o = {
      .from = dir / "plain", .to = dir / "to", .format = "w4afp8", .scale_rule = ScaleRule::kAmax7};
  refuse(o, ErrorCode::kInvalidArgument, {"modelopt-w4a8-awq, whose INT4", "are kept"});
  // The factors cannot be taken out of the input scales, so those must be given up in words.
  o.from = dir / "awq";
  refuse(o, ErrorCode::kUnsupported, {"pre_quant_scale", "input scale", "--drop-input-scales"});
  o.scale_rule.reset(), o.drop_input_scales = true;
  refuse(o, ErrorCode::kUnsupported, {"gate_proj.pre_quant_scale", "sluice convert --scale"});
  // A factor that is none.
  RawCheckpoint raw(dir / "awq");
  raw.at("model.layers.3.mlp.experts.2.up_proj.pre_quant_scale").bytes.replace(6, 2, "\x80\x7f");
  raw.write(dir / "infinite");
  o.from = dir / "infinite", o.scale_rule = ScaleRule::kAmax7;
  refuse(o, ErrorCode::kCorruptFile,
         {".safetensors", "experts.2.up_proj.pre_quant_scale", "[3] = inf"});
}

/// Offset codes that a format reads as signed are no weights to quantize.
TEST(Int4Anew, NibblesThatContradictTheFormatAreRefused) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "good");
  RawCheckpoint raw(dir / "good");
  for (auto& [file_name, file] : raw.files) {
    for (auto& [name, tensor] : file) {
      if (!name.ends_with("weight_packed")) continue;
      for (char& byte : tensor.bytes) {
        byte = static_cast<char>(static_cast<unsigned char>(byte) ^ 0x88U);
      }
    }
  }
  raw.write(dir / "bad");
  expect_error(ErrorCode::kCorruptFile, {"not stored as the format says"}, [&] {
    (void)convert_checkpoint({.from = dir / "bad",
                              .to = dir / "to",
                              .format = "w4afp8",
                              .scale_rule = ScaleRule::kAmax7,
                              .verify = false});
  });
}

}  // namespace
}  // namespace sluice
