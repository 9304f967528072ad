// The synthetic writer: what it writes loads, depends on nothing but its arguments, and looks like
// a quantized model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "expect_error.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"
#include "sluice/quant.h"
#include "synthetic/random_weights.h"
#include "temp_dir.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using testing::expect_error;
using testing::TempDir;

SyntheticCheckpoint tiny() {
  return {.geometry = preset_geometry("tiny")};
}

std::map<std::string, std::string> contents(const fs::path& dir) {
  std::map<std::string, std::string> result;
  for (const auto& file : fs::directory_iterator(dir)) {
    result[file.path().filename().string()] = testing::read_file(file.path());
  }
  return result;
}

TEST(Synthetic, WrittenCheckpointLoads) {
  const TempDir dir;
  write_synthetic_checkpoint(tiny(), dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  EXPECT_EQ(checkpoint.format(), "w4afp8");
  EXPECT_THAT(checkpoint.moe_layers(), ElementsAre(3));
  EXPECT_EQ(checkpoint.geometry().name, "tiny");
  EXPECT_EQ(checkpoint.geometry().routed_scaling_factor, 2.5f);
  const ExpertWeights weights = checkpoint.load_experts(3, 0, 8);
  EXPECT_EQ(weights.experts.size(), 8U);
  constexpr std::size_t kWeights = 8 * 3 * 256 * 128;
  EXPECT_EQ(weights.bytes(), kWeights / 2 + kWeights / 128 * 4);
  ASSERT_TRUE(weights.static_scales);
  EXPECT_TRUE(checkpoint.warnings(3).empty());
}

TEST(Synthetic, EveryPresetHasAWholeGeometry) {
  EXPECT_THAT(preset_names(),
              ElementsAre("tiny", "r1-slice", "r1-layer", "kimi-k2", "kimi-k2-int4", "kimi-k2.5",
                          "kimi-k3", "kimi-k3-mxfp4", "glm-5", "deepseek-v4-flash",
                          "deepseek-v4-pro", "deepseek-v4-flash-mxfp4", "deepseek-v4-pro-mxfp4",
                          "qwen3.8", "qwen3-235b", "qwen3-30b", "gpt-oss-120b", "gpt-oss-20b"));
  for (const std::string& name : preset_names()) {
    const ModelGeometry g = preset_geometry(name);
    EXPECT_EQ(g.name, name);
    EXPECT_EQ(g.hidden % 128, 0);
    EXPECT_EQ(g.intermediate % 128, 0);
    EXPECT_LE(g.num_topk, g.num_experts);
    EXPECT_TRUE(allows_group_size(g.weight_format, g.group_size));
    const bool is_gpt_oss = name.starts_with("gpt-oss");
    EXPECT_EQ(g.weight_format == WeightFormat::kMxfp4, name.ends_with("-mxfp4") || is_gpt_oss);
    EXPECT_EQ(g.has_bias, is_gpt_oss);
    EXPECT_EQ(g.token_width(), is_gpt_oss ? 2880 : g.hidden);
  }
  EXPECT_EQ(preset_geometry("r1-layer").num_experts, 256);
  EXPECT_EQ(preset_geometry("kimi-k2").num_experts, 384);
  EXPECT_EQ(preset_geometry("kimi-k2").group_size, 128);
  EXPECT_EQ(preset_geometry("kimi-k2-int4").group_size, 32);
  EXPECT_EQ(to_string(preset_geometry("glm-5").activation), "swiglu");
  EXPECT_EQ(to_string(preset_geometry("deepseek-v4-pro").activation), "swiglu:limit=10");
  EXPECT_EQ(preset_geometry("gpt-oss-120b").hidden, 2944);
  EXPECT_EQ(to_string(preset_geometry("gpt-oss-120b").activation),
            "swiglu-oai:alpha=1.702,limit=7");
  EXPECT_EQ(to_string(preset_geometry("kimi-k3").activation), "situ:beta=4,linear_beta=25");
  expect_error(ErrorCode::kInvalidArgument, {"'huge'", "tiny, r1-slice"},
               [] { (void)preset_geometry("huge"); });
}

TEST(Synthetic, SameSeedSameBytes) {
  const TempDir dir;
  SyntheticCheckpoint spec = tiny();
  write_synthetic_checkpoint(spec, dir / "a");
  write_synthetic_checkpoint(spec, dir / "b");
  EXPECT_EQ(contents(dir / "a"), contents(dir / "b"));
  spec.seed = 2;
  write_synthetic_checkpoint(spec, dir / "c");
  EXPECT_NE(contents(dir / "a"), contents(dir / "c"));
}

/// Of seed 1, layer 3, expert 5, gate: a change of the generator changes every checkpoint that
/// somebody made with it, so it must be deliberate.
TEST(Synthetic, BytesAreFixedForAllTime) {
  SyntheticExpert expert;
  fill_expert(tiny(), 3, 5, expert);
  std::uint64_t digest = 0xcbf29ce484222325U;
  for (const auto& matrix : expert.matrices) {
    for (const std::uint8_t b : matrix.codes) digest = (digest ^ b) * 0x100000001b3U;
    for (const float s : matrix.scales) {
      digest = (digest ^ std::bit_cast<std::uint32_t>(s)) * 0x100000001b3U;
    }
  }
  EXPECT_EQ(digest, 6814390964480335219U);
}

TEST(Synthetic, AnExpertDependsOnItsPlaceAlone) {
  const TempDir dir;
  SyntheticCheckpoint spec = tiny();
  write_synthetic_checkpoint(spec, dir / "small");
  spec.num_layers = 2;
  spec.first_layer = 2;
  spec.max_shard_bytes = 40'000;
  write_synthetic_checkpoint(spec, dir / "large");
  const auto bytes_of = [](const fs::path& path) {
    const Checkpoint checkpoint = Checkpoint::open(path);
    const ExpertWeights weights = checkpoint.load_experts(3, 6, 1);
    const TensorView& codes = weights.experts.front().down.codes;
    return std::string(codes.as<char>(), codes.bytes());
  };
  EXPECT_EQ(bytes_of(dir / "small"), bytes_of(dir / "large"));
  const Checkpoint large = Checkpoint::open(dir / "large");
  EXPECT_THAT(large.moe_layers(), ElementsAre(2, 3));
  EXPECT_GT(contents(dir / "large").size(), 10U);  // shards
  EXPECT_EQ(large.static_scales(3)->s1, Checkpoint::open(dir / "small").static_scales(3)->s1);
}

TEST(Synthetic, Bf16ScalesAndNoInputScales) {
  const TempDir dir;
  SyntheticCheckpoint spec = tiny();
  spec.scale_dtype = DType::kBFloat16;
  spec.with_input_scales = false;
  write_synthetic_checkpoint(spec, dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const ExpertWeights weights = checkpoint.load_experts(3, 0, 1);
  EXPECT_EQ(weights.experts[0].gate.scales.dtype, DType::kBFloat16);
  EXPECT_FALSE(weights.static_scales);
  EXPECT_FALSE(fs::exists(dir / "model" / "act_scales.safetensors"));
}

TEST(Synthetic, CodesLookLikeAmaxOverSevenRounding) {
  SyntheticExpert expert;
  SyntheticCheckpoint spec = tiny();
  spec.geometry.hidden = 1024;
  spec.geometry.intermediate = 512;
  fill_expert(spec, 3, 0, expert);
  for (const SyntheticMatrix& m : expert.matrices) {
    std::array<double, 16> share{};
    const auto total = static_cast<std::int64_t>(m.n) * m.k;
    int largest = 0;
    for (std::int64_t i = 0; i < total; ++i) {
      const int code = unpack_int4(m.codes.data(), i);
      share[static_cast<std::size_t>(code + 8)] += 1.0 / static_cast<double>(total);
      largest = i % 128 == 0 ? 0 : largest;
      largest = std::max(largest, std::abs(code));
      if (i % 128 != 127) continue;
      ASSERT_EQ(largest, 7) << "group " << i / 128;
    }
    EXPECT_EQ(share[0], 0.0);  // -8
    EXPECT_NEAR(share[8], 0.155, 0.01);
    for (int code = 1; code <= 7; ++code) {
      const auto c = static_cast<std::size_t>(code);
      EXPECT_NEAR(share[8 + c], share[8 - c], 0.01);
      // The largest of each group is 7 by construction, which lifts 7 a little above 6.
      EXPECT_LT(share[8 + c], code == 7 ? 0.012 : share[7 + c]);
    }
  }
}

/// Float64 forward of one expert for unit inputs: sizes must be ordinary at every point.
TEST(Synthetic, OutputsAreOfOrdinarySize) {
  SyntheticCheckpoint spec = tiny();
  spec.geometry.hidden = 1024;
  spec.geometry.intermediate = 512;
  SyntheticExpert expert;
  double sum = 0;
  std::int64_t count = 0;
  std::vector<std::uint16_t> x(4 * 1024);
  synthetic_activations({.first_token = 1},
                        {{.data = x.data(), .dtype = DType::kBFloat16, .shape = {4, 1024}}});
  for (int e = 0; e < 4; ++e) {
    fill_expert(spec, 3, e, expert);
    const auto multiply = [](const SyntheticMatrix& m, const std::vector<double>& in) {
      std::vector<double> out(static_cast<std::size_t>(m.n));
      for (std::int64_t i = 0; i < static_cast<std::int64_t>(m.n) * m.k; ++i) {
        out[static_cast<std::size_t>(i / m.k)] +=
            unpack_int4(m.codes.data(), i) *
            static_cast<double>(m.scales[static_cast<std::size_t>(i / 128)]) *
            in[static_cast<std::size_t>(i % m.k)];
      }
      return out;
    };
    std::vector<double> in(1024);
    for (std::size_t c = 0; c < 1024; ++c) {
      in[c] = bf16_to_float(x[static_cast<std::size_t>(e) * 1024 + c]);
    }
    auto g = multiply(expert.matrices[0], in);
    const auto u = multiply(expert.matrices[1], in);
    for (std::size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
    for (const double y : multiply(expert.matrices[2], g)) sum += y * y, ++count;
  }
  const double size = std::sqrt(sum / static_cast<double>(count));
  EXPECT_GT(size, 0.1);
  EXPECT_LT(size, 30.0);
}

TEST(Synthetic, InputScalesAreCalibratedOnItsOwnActivations) {
  const TempDir dir;
  SyntheticCheckpoint spec = tiny();
  spec.geometry.hidden = 1024;
  write_synthetic_checkpoint(spec, dir / "model");
  const Checkpoint checkpoint = Checkpoint::open(dir / "model");
  const StaticScales scales = checkpoint.static_scales(3).value();
  constexpr std::int64_t kTokens = 1000;
  std::vector<std::uint16_t> x(kTokens * 1024);
  synthetic_activations({.token_seed = 77},
                        {{.data = x.data(), .dtype = DType::kBFloat16, .shape = {kTokens, 1024}}});
  std::int64_t num_saturated = 0;
  float amax = 0;
  for (const std::uint16_t bits : x) {
    const float value = std::fabs(bf16_to_float(bits));
    amax = std::max(amax, value);
    num_saturated += value > scales.s1 * kE4m3Max;
  }
  EXPECT_LT(num_saturated, 10);                   // of a million
  EXPECT_GT(amax, 0.25f * scales.s1 * kE4m3Max);  // and the range is used
  for (const InputScales& s : checkpoint.input_scales(3)) EXPECT_EQ(s.w1, s.w3);
}

TEST(Synthetic, ActivationsHaveOutliersAndDependOnThePositionAlone) {
  constexpr int kHidden = 4096, kTokens = 256;
  std::vector<std::uint16_t> x(kTokens * kHidden), part(16 * kHidden);
  synthetic_activations(
      {}, {{.data = x.data(), .dtype = DType::kBFloat16, .shape = {kTokens, kHidden}}});
  synthetic_activations({.first_token = 100},
                        {{.data = part.data(), .dtype = DType::kBFloat16, .shape = {16, kHidden}}});
  EXPECT_TRUE(std::equal(part.begin(), part.end(), x.begin() + 100 * kHidden));
  double sum = 0;
  std::vector<double> channel(kHidden);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double value = bf16_to_float(x[i]);
    sum += value * value;
    channel[i % kHidden] += value * value;
  }
  const double mean = sum / static_cast<double>(x.size());
  EXPECT_NEAR(std::sqrt(mean), 1.0, 0.5);
  const auto outliers =
      std::ranges::count_if(channel, [&](double c) { return c / kTokens > 25 * mean; });
  EXPECT_GT(outliers, 1);
  EXPECT_LT(outliers, kHidden / 100);
  // The first token is massive: one channel holds most of it.
  double first = 0, largest = 0;
  for (std::size_t c = 0; c < kHidden; ++c) {
    const double value = bf16_to_float(x[c]);
    first += value * value;
    largest = std::max(largest, value * value);
  }
  EXPECT_GT(largest, 0.3 * first);
}

TEST(Synthetic, ActivationsRefuseOtherTensors) {
  std::vector<float> x(256);
  expect_error(ErrorCode::kInvalidArgument, {"bfloat16", "[2, 128] float32"}, [&] {
    synthetic_activations({}, {{.data = x.data(), .dtype = DType::kFloat32, .shape = {2, 128}}});
  });
}

TEST(Synthetic, ReportsProgress) {
  const TempDir dir;
  double last = 0;
  write_synthetic_checkpoint(tiny(), dir / "model", [&](double done) {
    EXPECT_GE(done, last);
    last = done;
  });
  EXPECT_EQ(last, 1);
}

TEST(Synthetic, RefusesADirectoryThatHoldsSomething) {
  const TempDir dir;
  write_synthetic_checkpoint(tiny(), dir / "model");
  const auto before = contents(dir / "model");
  expect_error(ErrorCode::kInvalidArgument,
               {(dir / "model").string(), "already holds a checkpoint"},
               [&] { write_synthetic_checkpoint(tiny(), dir / "model"); });
  EXPECT_EQ(contents(dir / "model"), before);
  fs::create_directory(dir / "notes");
  testing::write_file(dir / "notes" / "todo.txt", "x");
  expect_error(ErrorCode::kInvalidArgument, {"not empty (todo.txt)"},
               [&] { write_synthetic_checkpoint(tiny(), dir / "notes"); });
  testing::write_file(dir / "file", "x");
  expect_error(ErrorCode::kInvalidArgument, {"not a directory"},
               [&] { write_synthetic_checkpoint(tiny(), dir / "file"); });
}

TEST(Synthetic, TakesAnEmptyDirectoryAndATrailingSlash) {
  const TempDir dir;
  fs::create_directory(dir / "model");
  write_synthetic_checkpoint(tiny(), (dir / "model").string() + "/");
  EXPECT_EQ(Checkpoint::open(dir / "model").geometry().num_experts, 8);
}

TEST(Synthetic, LeavesNothingBehindWhenInterrupted) {
  const TempDir dir;
  struct Stop {};
  EXPECT_THROW(write_synthetic_checkpoint(tiny(), dir / "model", [](double) { throw Stop(); }),
               Stop);
  EXPECT_TRUE(fs::is_empty(dir.path()));
}

TEST(Synthetic, RefusesWhenTheDiskIsTooSmall) {
  const TempDir dir;
  SyntheticCheckpoint spec{.geometry = preset_geometry("kimi-k2")};
  spec.num_layers = 1000;  // 9 TB
  std::error_code ignored;
  if (fs::space(dir.path(), ignored).available > std::uintmax_t{8} << 40) {
    GTEST_SKIP() << "this disk has more than 8 TiB free";
  }
  expect_error(ErrorCode::kIo, {"bytes are free", "are needed"},
               [&] { write_synthetic_checkpoint(spec, dir / "model"); });
  EXPECT_TRUE(fs::is_empty(dir.path()));
}

TEST(Synthetic, RefusesImpossibleSpecs) {
  const TempDir dir;
  const auto expect_refused = [&](const std::vector<std::string>& parts, auto&& change) {
    SyntheticCheckpoint spec = tiny();
    change(spec);
    expect_error(ErrorCode::kInvalidArgument, parts,
                 [&] { write_synthetic_checkpoint(spec, dir / "model"); });
  };
  expect_refused({"format 'gptq'"}, [](auto& s) { s.format = "gptq"; });
  expect_refused({"group_size 32"}, [](auto& s) { s.geometry.group_size = 32; });
  expect_refused({"hidden 200", "128"}, [](auto& s) { s.geometry.hidden = 200; });
  expect_refused({"intermediate 0"}, [](auto& s) { s.geometry.intermediate = 0; });
  expect_refused({"num_experts 0"}, [](auto& s) { s.geometry.num_experts = 0; });
  expect_refused({"num_topk 9", "8 experts"}, [](auto& s) { s.geometry.num_topk = 9; });
  expect_refused({"num_layers 0"}, [](auto& s) { s.num_layers = 0; });
  expect_refused({"first_layer -1"}, [](auto& s) { s.first_layer = -1; });
  expect_refused({"scale_dtype int8"}, [](auto& s) { s.scale_dtype = DType::kInt8; });
  expect_refused({"max_shard_bytes"}, [](auto& s) { s.max_shard_bytes = 0; });
  expect_refused({"routed_scaling_factor"}, [](auto& s) { s.geometry.routed_scaling_factor = 0; });
  EXPECT_TRUE(fs::is_empty(dir.path()));
}

}  // namespace
}  // namespace sluice
