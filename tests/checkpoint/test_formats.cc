// Every published layout: what make-checkpoint writes element by element, the reader must give back
// as the values it was made from. Signed nibbles are told from those with an offset.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "checkpoint/formats/nibbles.h"
#include "format_fixture.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_experts;
using testing::expect_refused;
using testing::expect_same;
using ::testing::HasSubstr;
using testing::kLayer;
using testing::name_of;
using testing::RawCheckpoint;
using testing::RawTensor;
using testing::spec_of;
using testing::TempDir;

struct Case {
  const char* format;
  const char* recognised;
  int group;
  DType scale_dtype;
};

class Int4Formats : public ::testing::TestWithParam<Case> {};

TEST_P(Int4Formats, ReadsWhatTheIndependentWriterMade) {
  const Case& c = GetParam();
  const TempDir dir;
  const SyntheticCheckpoint spec = spec_of(c.format, c.group, c.scale_dtype);
  write_synthetic_checkpoint(spec, dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  EXPECT_EQ(checkpoint.format(), c.recognised);
  EXPECT_EQ(checkpoint.weight_format(), WeightFormat::kInt4);
  EXPECT_EQ(checkpoint.geometry().group_size, c.group);
  EXPECT_TRUE(checkpoint.warnings(kLayer).empty());
  expect_experts(checkpoint, spec);
  // Any part of the layer alone is the same part.
  const ExpertWeights one = checkpoint.load_experts(kLayer, 2, 1);
  SyntheticExpert expected;
  fill_expert(spec, kLayer, 2, expected);
  expect_same(one.experts[0].down, expected.matrices[2], c.scale_dtype);
}

INSTANTIATE_TEST_SUITE_P(
    All, Int4Formats,
    ::testing::Values(Case{"w4afp8", "w4afp8", 128, DType::kFloat32},
                      Case{"w4afp8", "w4afp8", 128, DType::kBFloat16},
                      Case{"compressed-tensors", "compressed-tensors", 128, DType::kBFloat16},
                      Case{"compressed-tensors", "compressed-tensors", 32, DType::kFloat32},
                      Case{"kimi-int4", "compressed-tensors", 32, DType::kBFloat16},
                      Case{"angelslim", "angelslim", 128, DType::kBFloat16},
                      Case{"angelslim", "angelslim", 128, DType::kFloat32},
                      Case{"modelopt-w4a8-awq", "modelopt-w4a8-awq", 128, DType::kFloat32},
                      Case{"modelopt-w4a8-awq", "modelopt-w4a8-awq", 32, DType::kBFloat16}),
    [](const auto& p) {
      std::string name = fmt::format("{}_{}_{}", p.param.format, p.param.group,
                                     p.param.scale_dtype == DType::kFloat32 ? "f32" : "bf16");
      std::ranges::replace(name, '-', '_');
      return name;
    });

TEST(Formats, InputScalesAreTheSameInEveryLayoutThatHasThem) {
  const TempDir dir;
  write_synthetic_checkpoint(spec_of("w4afp8"), dir / "w4afp8");
  const auto expected = Checkpoint::open(dir / "w4afp8").static_scales(kLayer);
  ASSERT_TRUE(expected);
  for (const char* format : {"angelslim", "modelopt-w4a8-awq", "compressed-tensors"}) {
    SyntheticCheckpoint spec = spec_of(format);
    spec.with_static_activations = spec.format == "compressed-tensors";
    write_synthetic_checkpoint(spec, dir / format);
    const auto scales = Checkpoint::open(dir / format).static_scales(kLayer);
    ASSERT_TRUE(scales) << format;
    EXPECT_EQ(scales->s1, expected->s1) << format;
    EXPECT_EQ(scales->s2, expected->s2) << format;
  }
}

TEST(Formats, WithoutAnActivationSchemeThereAreNoStaticScales) {
  const TempDir dir;
  write_synthetic_checkpoint(spec_of("kimi-int4", 32), dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  EXPECT_FALSE(checkpoint.static_scales(kLayer));
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("groups of 32, no scheme for activations"));
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("gate_proj.weight_packed is I32 [128, 32]"));
}

TEST(Formats, FloatsAreRecognisedAndNotLoaded) {
  for (const char* format : {"bf16", "fp8-block"}) {
    const TempDir dir;
    write_synthetic_checkpoint(spec_of(format), dir / "model");
    const Checkpoint checkpoint = Checkpoint::open(dir / "model");
    EXPECT_EQ(checkpoint.format(), format);
    EXPECT_EQ(checkpoint.weight_format(), std::nullopt);
    EXPECT_FALSE(checkpoint.static_scales(kLayer));
    checkpoint.check(kLayer);
    expect_error(ErrorCode::kUnsupported, {"the experts are " + std::string(format), "convert"},
                 [&] { (void)checkpoint.load_experts(kLayer, 0, 1); });
  }
}

TEST(Formats, FloatsAreReadAsTheFileHasThem) {
  const TempDir dir;
  write_synthetic_checkpoint(spec_of("bf16"), dir / "bf16");
  write_synthetic_checkpoint(spec_of("fp8-block"), dir / "fp8");
  RawCheckpoint bf16(dir / "bf16"), fp8(dir / "fp8");
  const CheckpointData bf16_data = CheckpointData::open(dir / "bf16");
  const CheckpointData fp8_data = CheckpointData::open(dir / "fp8");
  for (const MatrixLayout& matrix : matrix_layouts(bf16_data.geometry())) {
    std::vector<float> values(static_cast<std::size_t>(matrix.n * matrix.k));
    bf16_data.format->load_floats(bf16_data.layer_tensors(kLayer).experts[1], matrix, values);
    const RawTensor& raw = bf16.at(name_of(1, matrix.part("weight")));
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, raw.bytes.data() + 2 * i, 2);
      ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), bits << 16);
    }
    fp8_data.format->load_floats(fp8_data.layer_tensors(kLayer).experts[1], matrix, values);
    const RawTensor& codes = fp8.at(name_of(1, matrix.part("weight")));
    const RawTensor& scales = fp8.at(name_of(1, matrix.part("weight_scale_inv")));
    const auto columns = static_cast<std::size_t>(matrix.k);
    for (std::size_t i = 0; i < values.size(); ++i) {
      float scale = 0;
      const std::size_t block = i / columns / 128 * (columns / 128) + i % columns / 128;
      std::memcpy(&scale, scales.bytes.data() + 4 * block, 4);
      ASSERT_EQ(values[i], e4m3_to_float(static_cast<std::uint8_t>(codes.bytes[i])) * scale);
    }
  }
}

TEST(Nibbles, VerdictFollowsTheHistogram) {
  using Verdict = NibbleEvidence::Verdict;
  const SyntheticCheckpoint spec = spec_of("w4afp8");
  SyntheticExpert expert;
  fill_expert(spec, kLayer, 0, expert);
  auto codes = expert.matrices[0].codes;
  const auto evidence = [&] { return nibble_evidence(std::as_bytes(std::span(codes))); };
  EXPECT_EQ(evidence().verdict, Verdict::kSigned);
  EXPECT_THAT(evidence().text(), HasSubstr("signed: nibbles around 0 occur"));
  for (std::uint8_t& byte : codes) byte ^= 0x88;
  EXPECT_EQ(evidence().verdict, Verdict::kOffset);
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint8_t>(i * 37);
  EXPECT_EQ(evidence().verdict, Verdict::kNone);
  codes.resize(8);
  std::ranges::fill(codes, 0);
  EXPECT_EQ(evidence().verdict, Verdict::kNone) << "16 nibbles prove nothing";
}

void for_each_weight(RawCheckpoint& raw, const std::function<void(RawTensor&)>& change) {
  for (auto& [file_name, file] : raw.files) {
    for (auto& [name, tensor] : file) {
      if (name.ends_with("proj.weight")) change(tensor);
    }
  }
}

/// U8 does not say what its nibbles are; they do.
TEST(Nibbles, UnsignedBytesAreReadByEvidence) {
  const SyntheticCheckpoint spec = spec_of("w4afp8");
  for (const bool has_offset : {false, true}) {
    const TempDir dir;
    write_synthetic_checkpoint(spec, dir / "good");
    RawCheckpoint raw(dir / "good");
    for_each_weight(raw, [&](RawTensor& tensor) {
      tensor.dtype = "U8";
      for (char& byte : tensor.bytes) {
        if (has_offset) byte = static_cast<char>(static_cast<unsigned char>(byte) ^ 0x88U);
      }
    });
    raw.write(dir / "u8");
    const Checkpoint checkpoint = Checkpoint::open(dir / "u8");
    EXPECT_THAT(checkpoint.format_evidence(),
                HasSubstr(has_offset ? "U8 nibbles: offset 8" : "U8 nibbles: signed"));
    expect_experts(checkpoint, spec);
  }
  expect_refused(
      spec,
      [](RawCheckpoint& raw) {
        for_each_weight(raw, [](RawTensor& tensor) {
          tensor.dtype = "U8";
          for (std::size_t i = 0; i < tensor.bytes.size(); ++i) {
            tensor.bytes[i] = static_cast<char>(i * 37);
          }
        });
      },
      ErrorCode::kUnsupported,
      {"experts.0.gate_proj.weight", "dtype U8", "signed or have an offset", "undecided"});
}

/// A format that says how its nibbles are stored, and nibbles that say otherwise.
TEST(Nibbles, ContradictionIsRefused) {
  const auto flip = [](const char* suffix) {
    return [suffix](RawCheckpoint& raw) {
      for (auto& [file_name, file] : raw.files) {
        for (auto& [name, tensor] : file) {
          if (!name.ends_with(suffix) || name.find("experts.2.") == std::string::npos) continue;
          for (char& byte : tensor.bytes) {
            byte = static_cast<char>(static_cast<unsigned char>(byte) ^ 0x88U);
          }
        }
      }
    };
  };
  expect_refused(spec_of("w4afp8"), flip("_proj.weight"), ErrorCode::kCorruptFile,
                 {"experts.2.", "read as w4afp8", "not stored as the format says"});
  expect_refused(spec_of("compressed-tensors"), flip("weight_packed"), ErrorCode::kCorruptFile,
                 {"experts.2.", "read as compressed-tensors", "not stored as the format says"});
  expect_refused(spec_of("modelopt-w4a8-awq"), flip("_proj.weight"), ErrorCode::kCorruptFile,
                 {"experts.2.", "read as modelopt-w4a8-awq"});
}

TEST(SyntheticFormats, RefusesWhatIsNotPublished) {
  const TempDir dir;
  const auto refuse = [&](const SyntheticCheckpoint& spec, const std::vector<std::string>& parts) {
    expect_error(ErrorCode::kInvalidArgument, parts,
                 [&] { write_synthetic_checkpoint(spec, dir / "model"); });
  };
  refuse(spec_of("gguf"), {"'gguf'", "w4afp8, compressed-tensors, kimi-int4"});
  refuse(spec_of("w4afp8", 32), {"group_size 32", "w4afp8 has 128"});
  refuse(spec_of("kimi-int4", 128), {"group_size 128", "has 32"});
  refuse(spec_of("compressed-tensors", 64), {"group_size 64", "32 nor 128"});
  SyntheticCheckpoint statics = spec_of("bf16");
  statics.with_static_activations = true;
  refuse(statics, {"compressed-tensors only", "bf16"});
  SyntheticCheckpoint factors = spec_of("angelslim");
  factors.with_pre_quant_scale = true;
  refuse(factors, {"modelopt-w4a8-awq alone", "angelslim"});
}

}  // namespace
}  // namespace sluice
