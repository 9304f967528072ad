// gpt-oss' layout: six tensors of all experts, gate and up row by row. The reader gives what the
// bytes mean, derived here from the files themselves, and refuses what is not as it should be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "format_fixture.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_reads_alike;
using testing::expect_refused;
using ::testing::HasSubstr;
using testing::RawCheckpoint;
using testing::RawTensor;
using testing::TempDir;

constexpr int kFirst = 0;  // gpt-oss has experts from layer 0 on.

SyntheticCheckpoint gpt_oss_spec(int hidden = 160, int intermediate = 96) {
  SyntheticCheckpoint spec = synthetic_preset("gpt-oss-20b");
  spec.geometry.num_experts = 3, spec.geometry.num_topk = 2;
  spec.geometry.set_widths(hidden, intermediate);
  return spec;
}

std::string name_of(const std::string& part) {
  return "model.layers.0.mlp.experts." + part;
}

/// Weight (row, k) of an expert's part of a tensor, in words: blocks of 16 bytes, two codes in a
/// byte, the even one low; sign, exponent of two bits with a bias of 1, one bit of mantissa; times
/// 2^(scale - 127) of its 32.
double weight_of(const RawTensor& blocks, const RawTensor& scales, std::size_t expert,
                 std::size_t row, std::size_t k) {
  const std::size_t rows = blocks.shape[1], groups = blocks.shape[2];
  const std::size_t group = (expert * rows + row) * groups + k / 32;
  const auto byte = static_cast<unsigned char>(blocks.bytes[group * 16 + k % 32 / 2]);
  const int code = k % 2 == 0 ? byte % 16 : byte / 16;
  const int exponent = code / 2 % 4, mantissa = code % 2;
  const double size = exponent == 0 ? mantissa * 0.5 : std::ldexp(1 + mantissa * 0.5, exponent - 1);
  const auto scale = static_cast<unsigned char>(scales.bytes[group]);
  return (code < 8 ? size : -size) * std::ldexp(1.0, scale - 127);
}

float bias_of(const RawTensor& bias, std::size_t expert, std::size_t row) {
  std::uint16_t bits;
  std::memcpy(&bits, &bias.bytes[2 * (expert * bias.shape[1] + row)], 2);
  return bf16_to_float(bits);
}

TEST(GptOss, EveryWeightAndBiasIsWhatItsBytesMean) {
  const TempDir dir;
  write_synthetic_checkpoint(gpt_oss_spec(), dir / "model");
  RawCheckpoint raw(dir / "model");
  EXPECT_EQ(raw.tensors().size(), 6u);
  EXPECT_EQ(raw.at(name_of("gate_up_proj_blocks")).shape,
            (std::vector<std::uint64_t>{3, 192, 5, 16}));
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  EXPECT_EQ(checkpoint.format(), "gpt-oss");
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("quant_method = 'mxfp4'"));
  EXPECT_THAT(checkpoint.format_evidence(), HasSubstr("gate_up_proj_blocks is U8 [192, 5, 16]"));
  EXPECT_TRUE(checkpoint.warnings().empty());
  EXPECT_TRUE(checkpoint.warnings(kFirst).empty());
  const ModelGeometry& g = checkpoint.geometry();
  EXPECT_EQ(std::pair(g.hidden, g.token_width()), std::pair(256, 160));
  EXPECT_EQ(std::pair(g.intermediate, g.inner_width()), std::pair(128, 96));
  EXPECT_TRUE(g.has_bias);
  EXPECT_EQ(to_string(checkpoint.activation(kFirst)), "swiglu-oai:alpha=1.702,limit=7");
  const ExpertWeights weights = checkpoint.load_experts(kFirst, 0, 3);
  for (std::size_t e = 0; e < 3; ++e) {
    const Expert& expert = weights.experts[e];
    // Gate is row 0, 2, 4 .. of its tensor, and up is row 1, 3, 5 ...
    for (const auto& [stem, m, role, first, step] :
         {std::tuple{"gate_up_proj", &expert.gate, MatrixRole::kGate, 0u, 2u},
          {"gate_up_proj", &expert.up, MatrixRole::kUp, 1u, 2u},
          {"down_proj", &expert.down, MatrixRole::kDown, 0u, 1u}}) {
      const RawTensor& blocks = raw.at(name_of(std::string(stem) + "_blocks"));
      const RawTensor& scales = raw.at(name_of(std::string(stem) + "_scales"));
      const RawTensor& bias = raw.at(name_of(std::string(stem) + "_bias"));
      const std::size_t n = role == MatrixRole::kDown ? 160 : 96, k = 256 - n;
      std::vector<float> floats(n * k);
      checkpoint.load_floats(kFirst, static_cast<int>(e), role, floats);
      ASSERT_EQ(m->n() % 128, 0);
      ASSERT_EQ(m->k() % 128, 0);
      for (std::size_t i = 0; i < static_cast<std::size_t>(m->n() * m->k()); ++i) {
        const auto width = static_cast<std::size_t>(m->k());
        const std::size_t row = i / width, col = i % width;
        const bool is_there = row < n && col < k;
        const double expected =
            is_there ? weight_of(blocks, scales, e, first + row * step, col) : 0;
        const auto at = static_cast<std::int64_t>(i);
        const float value = code_value(m->format, m->codes.as<std::uint8_t>(), at) *
                            scale_value(m->scales, at / 32);
        ASSERT_EQ(value, expected) << stem << ' ' << row << ' ' << col;
        if (is_there) {
          ASSERT_EQ(floats[row * k + col], expected);
        }
      }
      ASSERT_EQ(m->bias.dim(0), m->n());
      for (std::size_t row = 0; row < static_cast<std::size_t>(m->n()); ++row) {
        ASSERT_EQ(m->bias.as<float>()[row], row < n ? bias_of(bias, e, first + row * step) : 0);
      }
    }
  }
  expect_reads_alike(checkpoint, kFirst, 0, 3);
  expect_reads_alike(checkpoint, kFirst, 2, 1);
}

TEST(GptOss, ConfigAloneSaysSo) {
  const TempDir dir;
  write_synthetic_checkpoint(gpt_oss_spec(), dir / "model");
  const ModelDescription model = describe_model(dir / "model" / "config.json");
  EXPECT_EQ(model.geometry.weight_format, WeightFormat::kMxfp4);
  EXPECT_TRUE(model.geometry.has_bias);
  EXPECT_EQ(model.geometry.token_width(), 160);
}

TEST(GptOss, WhatIsNotAsItShouldBeIsRefused) {
  const SyntheticCheckpoint spec = gpt_oss_spec();
  const std::string blocks = name_of("gate_up_proj_blocks"), scales = name_of("down_proj_scales"),
                    bias = name_of("gate_up_proj_bias");
  const auto unsupported = ErrorCode::kUnsupported, corrupt = ErrorCode::kCorruptFile;
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.at(scales).bytes[5] = '\xff'; }, corrupt,
                 {scales + ", expert 0: scale", "nan (0xff)"});
  expect_refused(spec,
                 [&](RawCheckpoint& raw) {
                   std::string& bytes = raw.at(scales).bytes;
                   bytes[bytes.size() / 3 * 2 + 5] = '\xff';  // Of three experts.
                 },
                 corrupt, {scales + ", expert 2: scale [", "nan (0xff)"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.at(scales).bytes[5] = '\xf5'; }, unsupported,
                 {scales, "= 2^118 is not below 2^118"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.at(bias).bytes.replace(6, 2, "\xc0\x7f"); },
                 corrupt, {bias + ", expert 0: bias [3] = nan"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.erase(bias); }, unsupported,
                 {bias, "is missing", "gpt-oss needs it"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.erase(name_of("down_proj_blocks")); },
                 unsupported, {"down_proj_blocks", "is missing"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.at(blocks).dtype = "I8"; }, unsupported,
                 {blocks, "dtype I8, not U8"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.config["num_local_experts"] = 6; },
                 unsupported, {"shape [3, ", "config.json has 6 experts"});
  expect_refused(spec, [&](RawCheckpoint& raw) { raw.config["hidden_size"] = 192; }, unsupported,
                 {blocks, "shape [192, 5, 16]", "[192, 6, 16]"});
  expect_refused(spec,
                 [&](RawCheckpoint& raw) {
                   raw.add("model.layers.0.mlp.experts.0.gate_proj.weight",
                           {"I8", {96, 80}, std::string(96 * 80, '\0')});
                 },
                 unsupported, {"gate_proj.weight", "is of one"});
}

/// Without blocks, a bias of all experts belongs to a layout that is not read.
TEST(GptOss, ItsNamesAloneMakeNoExperts) {
  const TempDir dir;
  write_synthetic_checkpoint(gpt_oss_spec(), dir / "model");
  RawCheckpoint raw(dir / "model");
  for (const char* const part : {"gate_up_proj_blocks", "down_proj_blocks"})
    raw.erase(name_of(part));
  raw.write(dir / "bare");
  expect_error(ErrorCode::kUnsupported, {"no tensor named"},
               [&] { (void)Checkpoint::open(dir / "bare"); });
}

/// The same weights and biases, expert by expert, in compressed-tensors.
TEST(GptOss, CompressedTensorsOfMxfp4MayHaveBiases) {
  SyntheticCheckpoint fused = gpt_oss_spec(), single = gpt_oss_spec();
  single.format = "kimi-mxfp4";
  const TempDir dir;
  write_synthetic_checkpoint(fused, dir / "fused");
  write_synthetic_checkpoint(single, dir / "single");
  const Checkpoint a = Checkpoint::open(dir / "fused"), b = Checkpoint::open(dir / "single");
  EXPECT_EQ(b.format(), "compressed-tensors");
  EXPECT_TRUE(b.geometry().has_bias);
  const ExpertWeights x = a.load_experts(kFirst, 0, 3), y = b.load_experts(kFirst, 0, 3);
  for (std::size_t e = 0; e < 3; ++e) {
    for (const auto member : {&Expert::gate, &Expert::up, &Expert::down}) {
      const QuantMatrix &p = x.experts[e].*member, &q = y.experts[e].*member;
      for (const auto& [one, other] :
           {std::pair{p.codes, q.codes}, {p.scales, q.scales}, {p.bias, q.bias}}) {
        ASSERT_EQ(one.shape, other.shape);
        ASSERT_EQ(std::memcmp(one.data, other.data, one.bytes()), 0);
      }
    }
  }
  expect_reads_alike(b, kFirst, 0, 3);
  RawCheckpoint raw(dir / "single");
  raw.erase("model.layers.0.mlp.experts.1.up_proj.bias");
  raw.write(dir / "missing");
  expect_error(ErrorCode::kUnsupported, {"experts.1.up_proj.bias", "is missing"},
               [&] { (void)Checkpoint::open(dir / "missing"); });
}

}  // namespace
}  // namespace sluice
