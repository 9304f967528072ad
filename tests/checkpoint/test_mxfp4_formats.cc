// MXFP4 in the layouts of Kimi-K3 and DeepSeek-V4: the reader gives what the bytes mean, derived
// here from the files themselves, and refuses what is not as it should be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "format_fixture.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_reads_alike;
using testing::expect_refused;
using ::testing::HasSubstr;
using testing::kLayer;
using testing::name_of;
using testing::RawCheckpoint;
using testing::RawTensor;
using testing::spec_of;
using testing::TempDir;

struct Layout {
  const char *format, *recognised, *codes, *scales;
};
constexpr Layout kLayouts[] = {
    {"kimi-mxfp4", "compressed-tensors", "weight_packed", "weight_scale"},
    {"deepseek-fp4", "deepseek-fp4", "weight", "scale"},
};

SyntheticCheckpoint mxfp4_spec(const Layout& layout) {
  return spec_of(layout.format, 32, DType::kFloat8E8M0);
}

/// Weight (n, k) of a matrix, in words: two codes in a byte, the even one low; sign, exponent of
/// two bits with a bias of 1, one bit of mantissa; times 2^(scale - 127).
double weight_of(const RawTensor& codes, const RawTensor& scales, std::size_t n, std::size_t k) {
  const auto byte = static_cast<unsigned char>(codes.bytes[n * codes.shape[1] + k / 2]);
  const int code = k % 2 == 0 ? byte % 16 : byte / 16;
  const int exponent = code / 2 % 4, mantissa = code % 2;
  const double size = exponent == 0 ? mantissa * 0.5 : std::ldexp(1 + mantissa * 0.5, exponent - 1);
  const auto scale = static_cast<unsigned char>(scales.bytes[n * scales.shape[1] + k / 32]);
  return (code < 8 ? size : -size) * std::ldexp(1.0, scale - 127);
}

TEST(Mxfp4Formats, EveryWeightIsWhatItsBytesMean) {
  for (const Layout& layout : kLayouts) {
    SCOPED_TRACE(layout.format);
    const TempDir dir;
    write_synthetic_checkpoint(mxfp4_spec(layout), dir / "model");
    const Checkpoint checkpoint = Checkpoint::open(dir / "model");
    EXPECT_EQ(checkpoint.format(), layout.recognised);
    EXPECT_EQ(checkpoint.weight_format(), WeightFormat::kMxfp4);
    EXPECT_EQ(checkpoint.geometry().weight_format, WeightFormat::kMxfp4);
    EXPECT_EQ(checkpoint.geometry().group_size, 32);
    EXPECT_FALSE(checkpoint.static_scales(kLayer));
    EXPECT_TRUE(checkpoint.warnings(kLayer).empty());
    const ExpertWeights weights = checkpoint.load_experts(kLayer, 0, 3);
    RawCheckpoint raw(dir / "model");
    for (int e = 0; e < 3; ++e) {
      const Expert& expert = weights.experts[static_cast<std::size_t>(e)];
      for (const auto& [stem, m, role] : {std::tuple{"gate_proj.", &expert.gate, MatrixRole::kGate},
                                          {"up_proj.", &expert.up, MatrixRole::kUp},
                                          {"down_proj.", &expert.down, MatrixRole::kDown}}) {
        const RawTensor& codes = raw.at(name_of(e, stem + std::string(layout.codes)));
        const RawTensor& scales = raw.at(name_of(e, stem + std::string(layout.scales)));
        std::vector<float> floats(static_cast<std::size_t>(m->n() * m->k()));
        checkpoint.load_floats(kLayer, e, role, floats);
        for (std::int64_t i = 0; i < m->n() * m->k(); ++i) {
          const double expected = weight_of(codes, scales, static_cast<std::size_t>(i / m->k()),
                                            static_cast<std::size_t>(i % m->k()));
          const float value = code_value(m->format, m->codes.as<std::uint8_t>(), i) *
                              scale_value(m->scales, i / 32);
          ASSERT_EQ(value, expected) << stem << ' ' << i;
          ASSERT_EQ(floats[static_cast<std::size_t>(i)], expected) << stem << ' ' << i;
        }
      }
    }
    expect_reads_alike(checkpoint, kLayer, 0, 3);
    expect_reads_alike(checkpoint, kLayer, 1, 1);
  }
}

TEST(Mxfp4Formats, DeepseekIsRecognisedByTheTypeOfItsScalesToo) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec(kLayouts[1]), dir / "model");
  RawCheckpoint raw(dir / "model");
  ASSERT_EQ(raw.config["expert_dtype"], "fp4");
  EXPECT_THAT(Checkpoint::open(dir / "model").format_evidence(), HasSubstr("expert_dtype = 'fp4'"));
  raw.config.erase("expert_dtype");
  raw.write(dir / "silent");
  EXPECT_THAT(Checkpoint::open(dir / "silent").format_evidence(), HasSubstr("scale is F8_E8M0"));
  // As DeepSeek-V4.1 has it.
  raw.config["quantization_config"]["expert_dtype"] = "fp4";
  raw.config["quantization_config"]["weight_block_size"] = {32, 32};
  raw.write(dir / "inside");
  EXPECT_EQ(Checkpoint::open(dir / "inside").format(), "deepseek-fp4");
  raw.config["expert_dtype"] = "fp8";
  raw.write(dir / "both");
  expect_error(ErrorCode::kUnsupported,
               {"expert_dtype = 'fp8'", "quantization_config.expert_dtype = 'fp4'"},
               [&] { (void)Checkpoint::open(dir / "both"); });
  const auto refuse = [&](const char* name, std::vector<std::string> words) {
    raw.write(dir / name);
    expect_error(ErrorCode::kUnsupported, words, [&] { (void)Checkpoint::open(dir / name); });
  };
  raw.config.erase("expert_dtype");
  raw.config["quantization_config"]["weight_block_size"] = {7};
  refuse("one", {"weight_block_size = [7]", "rows and columns"});
  raw.config["quantization_config"]["weight_block_size"] = {32, 0};
  refuse("zero", {"weight_block_size = [32, 0]", "above 0"});
  raw.config["quantization_config"]["weight_block_size"] = {128, 128};
  raw.config["quantization_config"]["expert_dtype"] = "";
  refuse("empty-inside", {"expert_dtype = '' is not 'fp4' or 'fp8'"});
  raw.config["quantization_config"].erase("expert_dtype");
  raw.config["expert_dtype"] = "";
  refuse("empty", {"expert_dtype = '' is not 'fp4' or 'fp8'"});
  // FP8 by its own words, and its experts are not.
  raw.config["expert_dtype"] = "fp8";
  refuse("fp8", {"gate_proj.weight is I8 beside", "deepseek-fp4", "expert_dtype here is 'fp8'"});
}

/// hf_quant_config.json may say what the rest of the model is, or the same.
TEST(Mxfp4Formats, ExpertDtypeAgainstHfQuantConfigNamesBoth) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec(kLayouts[1]), dir / "model");
  const auto write = [&](const std::string& algo) {
    std::ofstream(dir / "model" / "hf_quant_config.json")
        << R"({"quantization": {"quant_algo": ")" << algo << R"("}})";
  };
  for (const char* const algo : {"FP8", "FP8_BLOCK_SCALES", "MIXED_PRECISION", "W4A8_MXFP4_FP8"}) {
    write(algo);
    EXPECT_EQ(Checkpoint::open(dir / "model").format(), "deepseek-fp4") << algo;
  }
  for (const char* const algo : {"NVFP4", "W4A16_AWQ"}) {
    write(algo);
    expect_error(ErrorCode::kUnsupported,
                 {"expert_dtype = 'fp4'", std::string("quant_algo = '") + algo + "'",
                  "hf_quant_config.json"},
                 [&] { (void)Checkpoint::open(dir / "model"); });
  }
}

/// A model's INT4 repack may leave the key behind: then one of two sentences is not true.
TEST(Mxfp4Formats, ExpertDtypeAgainstQuantMethodNamesBoth) {
  const TempDir dir;
  write_synthetic_checkpoint(spec_of("w4afp8", 128, DType::kFloat32), dir / "model");
  RawCheckpoint raw(dir / "model");
  const auto expect = [&](const char* name, std::vector<std::string> words) {
    raw.write(dir / name);
    expect_error(ErrorCode::kUnsupported, words, [&] { (void)Checkpoint::open(dir / name); });
    expect_error(ErrorCode::kUnsupported, words,
                 [&] { (void)describe_model(dir / name / "config.json"); });
  };
  raw.config["expert_dtype"] = "fp4";
  expect("beside", {"config.json: expert_dtype = 'fp4'", "makes the experts MXFP4",
                    "quantization_config.quant_method = 'w4afp8'", "int4 of w4afp8"});
  raw.config["expert_dtype"] = "fp8";
  expect("fp8", {"expert_dtype = 'fp8'", "makes the experts FP8", "quant_method = 'w4afp8'"});
  raw.config["expert_dtype"] = "fp6";
  expect("unknown", {"expert_dtype = 'fp6' is not known", "'fp4' or 'fp8'"});
  raw.config.erase("expert_dtype");
  raw.config["quantization_config"]["expert_dtype"] = "fp4";
  expect("inside", {"quantization_config.expert_dtype = 'fp4'", "quant_method = 'w4afp8'"});
  // The same key beside a container of MXFP4 says nothing new.
  write_synthetic_checkpoint(mxfp4_spec(kLayouts[0]), dir / "mxfp4");
  RawCheckpoint packed(dir / "mxfp4");
  packed.config["expert_dtype"] = "fp4";
  packed.write(dir / "agrees");
  EXPECT_EQ(Checkpoint::open(dir / "agrees").weight_format(), WeightFormat::kMxfp4);
}

TEST(Mxfp4Formats, ConfigAloneSaysMxfp4) {
  for (const Layout& layout : kLayouts) {
    const TempDir dir;
    write_synthetic_checkpoint(mxfp4_spec(layout), dir / "model");
    const ModelDescription model = describe_model(dir / "model" / "config.json");
    EXPECT_EQ(model.geometry.weight_format, WeightFormat::kMxfp4) << layout.format;
    EXPECT_EQ(model.geometry.group_size, 32);
  }
}

TEST(Mxfp4Formats, WhatIsNotAsItShouldBeIsRefused) {
  for (const Layout& layout : kLayouts) {
    const SyntheticCheckpoint spec = mxfp4_spec(layout);
    const std::string codes = name_of(1, std::string("up_proj.") + layout.codes);
    const std::string scales = name_of(1, std::string("up_proj.") + layout.scales);
    expect_refused(spec, [&](RawCheckpoint& raw) { raw.at(scales).bytes[5] = '\xff'; },
                   ErrorCode::kCorruptFile, {scales, "scale [0, 5] = nan"});
    expect_refused(spec, [&](RawCheckpoint& raw) { raw.erase(scales); }, ErrorCode::kUnsupported,
                   {scales, "is missing"});
    expect_refused(spec, [&](RawCheckpoint& raw) { raw.at(codes).dtype = "F8_E4M3"; },
                   ErrorCode::kUnsupported, {codes, "dtype F8_E4M3"});
    expect_refused(spec,
                   [&](RawCheckpoint& raw) {
                     RawTensor& t = raw.at(scales);
                     t.shape = {t.shape[1], t.shape[0]};
                   },
                   ErrorCode::kUnsupported, {scales, "transposed"});
    expect_refused(spec,
                   [&](RawCheckpoint& raw) {
                     raw.add(name_of(1, "up_proj.bias"), {"BF16", {128}, std::string(256, '\0')});
                   },
                   ErrorCode::kUnsupported, {"up_proj.bias", "is a bias"});
    expect_refused(
        spec,
        [&](RawCheckpoint& raw) {
          raw.add(name_of(1, "up_proj.weight_global_scale"), {"F32", {1}, std::string(4, '\0')});
        },
        ErrorCode::kUnsupported, {"weight_global_scale", "NVFP4"});
  }
}

TEST(Mxfp4Formats, ZerosOfEitherSignAreNoWarningButAMatrixOfThemIs) {
  const TempDir dir;
  write_synthetic_checkpoint(mxfp4_spec(kLayouts[0]), dir / "model");
  RawCheckpoint raw(dir / "model");
  RawTensor& codes = raw.at(name_of(0, "gate_proj.weight_packed"));
  for (std::size_t i = 0; i < 16; ++i) codes.bytes[i] = '\x80';  // One group, 0 and -0.
  raw.write(dir / "group");
  EXPECT_TRUE(Checkpoint::open(dir / "group").warnings(kLayer).empty());
  for (char& byte : codes.bytes) byte = '\x80';
  raw.write(dir / "matrix");
  const auto warnings = Checkpoint::open(dir / "matrix").warnings(kLayer);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].kind, "zero-weights");
}

TEST(Mxfp4Formats, TheSchemeMustBeMxfp4s) {
  const struct {
    const char* field;
    nlohmann::ordered_json value;
    const char* text;
  } cases[] = {{"num_bits", 8, "num_bits = 8; MXFP4 has 4"},
               {"type", "int", "type = 'int'"},
               {"group_size", 16, "group_size = 16; MXFP4 has 32"},
               {"strategy", "tensor_group", "strategy = 'tensor_group'"},
               {"symmetric", false, "symmetric = false"},
               {"dynamic", true, "dynamic = 'true'"},
               {"scale_dtype", "torch.float8_e4m3fn", "scale_dtype = 'torch.float8_e4m3fn'"}};
  for (const auto& c : cases) {
    expect_refused(
        mxfp4_spec(kLayouts[0]),
        [&](RawCheckpoint& raw) {
          raw.config["quantization_config"]["config_groups"]["group_0"]["weights"][c.field] =
              c.value;
        },
        ErrorCode::kUnsupported, {c.text});
  }
  expect_refused(
      mxfp4_spec(kLayouts[0]),
      [](RawCheckpoint& raw) {
        raw.config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {
            {"num_bits", 4}, {"type", "float"}, {"dynamic", true}, {"strategy", "group"}};
      },
      ErrorCode::kUnsupported, {"input_activations = 4-bit 'float'"});
}

}  // namespace
}  // namespace sluice
