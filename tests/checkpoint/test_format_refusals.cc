// Each way in which a checkpoint of each layout can be wrong, and what the refusal must name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "checkpoint/formats/part_readers.h"
#include "format_fixture.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::expect_experts;
using testing::expect_refused;
using testing::f32_bytes;
using testing::kLayer;
using testing::name_of;
using testing::RawCheckpoint;
using testing::RawTensor;
using testing::read_all;
using testing::spec_of;
using testing::TempDir;

class EveryFormat : public ::testing::TestWithParam<std::string> {
 protected:
  [[nodiscard]] SyntheticCheckpoint spec() const {
    if (GetParam() == "gpt-oss") {
      SyntheticCheckpoint spec = spec_of(GetParam(), 32, DType::kFloat8E8M0);
      spec.geometry.has_bias = true;
      return spec;
    }
    if (GetParam() == "kimi-mxfp4" || GetParam() == "deepseek-fp4") {
      return spec_of(GetParam(), 32, DType::kFloat8E8M0);
    }
    return spec_of(GetParam(), GetParam() == "kimi-int4" ? 32 : 128);
  }
};

TEST_P(EveryFormat, NamesTheTensorThatIsMissingOrWrong) {
  const TempDir dir;
  write_synthetic_checkpoint(spec(), dir / "good");
  const auto tensors = RawCheckpoint(dir / "good").tensors();
  for (const auto& [name, tensor] : tensors) {
    // Of one expert, or of all of them together.
    const bool is_fused = GetParam() == "gpt-oss";
    if (!is_fused && name.find("experts.1.") == std::string::npos) continue;
    SCOPED_TRACE(name);
    const auto spoiled = [&](const char* what, const std::function<void(RawCheckpoint&)>& spoil,
                             const std::vector<std::string>& parts) {
      RawCheckpoint raw(dir / "good");
      spoil(raw);
      raw.write(dir / what);
      expect_error(ErrorCode::kUnsupported, parts, [&] { read_all(dir / what); });
      std::filesystem::remove_all(dir / what);
    };
    // The config's sizes and the other shapes say as much as weight_shape does.
    if (!name.ends_with("weight_shape")) {
      spoiled("missing", [&](RawCheckpoint& raw) { raw.erase(name); }, {name, "is missing"});
    }
    // A dtype of the same width, so that the container is in order.
    const std::string other = tensor.dtype == "BF16" || tensor.dtype == "F16"  ? "I16"
                              : tensor.dtype == "I64"                          ? "F64"
                              : tensor.dtype == "F32" || tensor.dtype == "I32" ? "U32"
                                                                               : "BOOL";
    spoiled("dtype", [&](RawCheckpoint& raw) { raw.at(name).dtype = other; },
            {".safetensors", name, "dtype " + other, tensor.dtype});
    spoiled("shape",
            [&](RawCheckpoint& raw) {
              auto& shape = raw.at(name).shape;
              shape.insert(shape.begin(), {1, 1});
            },
            {".safetensors", name, "shape [1, 1"});
  }
}

TEST_P(EveryFormat, RefusesShardsThatAreCut) {
  const TempDir dir;
  write_synthetic_checkpoint(spec(), dir / "model");
  const auto path = dir / "model" / "model-00001-of-00001.safetensors";
  const std::string whole = testing::read_file(path);
  std::uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  for (const std::size_t length :
       {std::size_t{0}, std::size_t{7}, std::size_t{8}, std::size_t{8 + header / 2},
        std::size_t{8 + header}, std::size_t{8 + header + 1}, whole.size() / 2, whole.size() - 1}) {
    std::filesystem::resize_file(path, length);
    expect_error(ErrorCode::kCorruptFile, {path.string()}, [&] { read_all(dir / "model"); });
    testing::write_file(path, whole);
  }
  read_all(dir / "model");
}

/// Whatever the header or the configs say, reading ends in an Error or in whole experts.
TEST_P(EveryFormat, SurvivesHeadersWithRandomDamage) {
  const TempDir dir;
  SyntheticCheckpoint small = spec();
  small.geometry.num_experts = 2;
  small.geometry.hidden = 128;
  write_synthetic_checkpoint(small, dir / "model");
  RandomStream random(stream_key({7, std::hash<std::string>{}(GetParam()) & 0xffff}));
  int num_refused = 0;
  constexpr int kRounds = 150;
  const std::vector<std::string> names = {"model-00001-of-00001.safetensors", "config.json"};
  for (int round = 0; round < kRounds; ++round) {
    const auto path = dir / "model" / names[static_cast<std::size_t>(round % 2)];
    const std::string whole = testing::read_file(path);
    std::size_t limit = whole.size();
    if (round % 2 == 0) {
      std::uint64_t header = 0;
      std::memcpy(&header, whole.data(), 8);
      limit = 8 + header;
    }
    std::string damaged = whole;
    for (std::uint64_t i = 0; i <= random.next() % 3; ++i) {
      damaged[random.next() % limit] = static_cast<char>(
          random.next() % 4 == 0 ? random.next()
                                 : static_cast<std::uint64_t>('0' + random.next() % 10));
    }
    testing::write_file(path, damaged);
    try {
      read_all(dir / "model");
    } catch (const Error&) {
      ++num_refused;
    }
    testing::write_file(path, whole);
  }
  EXPECT_GT(num_refused, kRounds / 4);
  read_all(dir / "model");
}

INSTANTIATE_TEST_SUITE_P(All, EveryFormat, ::testing::ValuesIn(synthetic_format_names()),
                         [](const auto& p) {
                           std::string name = p.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

TEST(CompressedTensors, RefusesByNameWhatItCannotRead) {
  const SyntheticCheckpoint spec = spec_of("compressed-tensors");
  const std::string zero = name_of(1, "up_proj.weight_zero_point");
  expect_refused(spec,
                 [&](RawCheckpoint& raw) {
                   raw.add(zero, {"I32", {1}, "abcd"});
                 },
                 ErrorCode::kUnsupported, {zero, "zero points", "symmetric"});
  const std::string order = name_of(0, "gate_proj.weight_g_idx");
  expect_refused(spec,
                 [&](RawCheckpoint& raw) {
                   raw.add(order, {"I32", {1}, "abcd"});
                 },
                 ErrorCode::kUnsupported, {order, "actorder"});
  const std::string input = name_of(2, "down_proj.input_scale");
  expect_refused(spec,
                 [&](RawCheckpoint& raw) {
                   raw.add(input, {"F32", {1}, f32_bytes({1})});
                 },
                 ErrorCode::kUnsupported, {input, "no static input_activations"});
  const std::string other = name_of(2, "down_proj.bias");
  expect_refused(spec,
                 [&](RawCheckpoint& raw) {
                   raw.add(other, {"F32", {1}, f32_bytes({1})});
                 },
                 ErrorCode::kUnsupported, {other, "is a bias", "not supported"});
}

TEST(CompressedTensors, ShapeTensorMustAgree) {
  const std::string name = name_of(1, "down_proj.weight_shape");
  expect_refused(spec_of("compressed-tensors"),
                 [&](RawCheckpoint& raw) {
                   std::string& bytes = raw.at(name).bytes;
                   const std::int64_t wrong = 512;
                   std::memcpy(bytes.data(), &wrong, 8);
                 },
                 ErrorCode::kCorruptFile,
                 {".safetensors", name, "says [512, 128]", "need [256, 128]"});
}

struct ConfigCase {
  std::string path;  // From quantization_config.
  nlohmann::ordered_json value;
  std::vector<std::string> parts;
};

TEST(CompressedTensors, RefusesSchemesThatAreNotSymmetricInt4) {
  const auto group = nlohmann::ordered_json{{"weights", {{"num_bits", 8}, {"type", "int"}}},
                                            {"input_activations", nullptr}};
  const ConfigCase cases[] = {
      {"/config_groups/group_0/weights/num_bits", 8, {"group_0.weights.num_bits = 8", "only 4"}},
      {"/config_groups/group_0/weights/type", "float", {"weights.type = 'float'", "'int'"}},
      {"/config_groups/group_0/weights/symmetric", false, {"symmetric = false", "zero points"}},
      {"/config_groups/group_0/weights/strategy", "channel", {"strategy = 'channel'", "'group'"}},
      {"/config_groups/group_0/weights/group_size", 64, {"group_size = 64", "32 and 128"}},
      {"/config_groups/group_0/weights/group_size", nullptr, {"group_size = null"}},
      {"/config_groups/group_0/weights/actorder", "group", {"actorder = 'group'", "g_idx"}},
      {"/config_groups/group_0/weights/actorder", 1, {"actorder = 1 is not a name"}},
      {"/config_groups/group_0/weights/dynamic", true, {"dynamic = 'true'", "static"}},
      {"/config_groups/group_0/weights/dynamic", 3, {"dynamic = 3 is not a name"}},
      {"/config_groups/group_0/weights", "int4", {"weights = \"int4\" is not an object"}},
      {"/config_groups/group_0/input_activations", "fp8", {"= \"fp8\" is not an object"}},
      {"/config_groups/W4A16", {"Linear"}, {"config_groups.W4A16 = [\"Linear\"] is not an object"}},
      {"/format", 4, {"format = 4 is not a name"}},
      {"/config_groups/group_0/input_activations/num_bits", 16, {"input_activations = 16-bit"}},
      {"/config_groups/group_0/input_activations/type", "int", {"8-bit 'int'", "8-bit float"}},
      {"/config_groups/group_0/input_activations/dynamic", false, {"must be per tensor"}},
      {"/config_groups/group_1", group, {"'group_0' and 'group_1', which differ"}},
      {"/config_groups", nlohmann::ordered_json::object(), {"config_groups = {}"}},
      {"/format", "int-quantized", {"format = 'int-quantized'", "'pack-quantized'"}},
      {"/sparsity_config", {{"format", "sparse-24"}}, {"sparsity_config"}},
      {"/moe_sparsity_config",
       {{"method", "novice"}},
       {"moe_sparsity_config", "pruned or replaced"}},
      {"/transform_config", {{"config_groups", 1}}, {"transform_config", "rotated"}},
  };
  for (const ConfigCase& c : cases) {
    SCOPED_TRACE(c.parts.front());
    std::vector<std::string> parts = c.parts;
    parts.emplace_back("config.json: quantization_config.");
    expect_refused(
        spec_of("compressed-tensors"),
        [&](RawCheckpoint& raw) {
          raw.config["quantization_config"][nlohmann::ordered_json::json_pointer(c.path)] = c.value;
        },
        ErrorCode::kUnsupported, parts);
  }
}

TEST(CompressedTensors, ActorderThatLeavesTheGroupsInPlaceIsFine) {
  const TempDir dir;
  const SyntheticCheckpoint spec = spec_of("compressed-tensors");
  write_synthetic_checkpoint(spec, dir / "good");
  RawCheckpoint raw(dir / "good");
  raw.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "static";
  raw.write(dir / "static");
  expect_experts(Checkpoint::open(dir / "static"), spec);
}

TEST(CompressedTensors, ScalesInHalfPrecisionAreExact) {
  EXPECT_EQ(f16_to_float(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_float(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_float(0x83ff), -1023 * 0x1p-24f);
  EXPECT_EQ(f16_to_float(0x7bff), 65504.0f);
  const TempDir dir;
  SyntheticCheckpoint spec = spec_of("compressed-tensors");
  write_synthetic_checkpoint(spec, dir / "good");
  RawCheckpoint raw(dir / "good");
  RawTensor& scale = raw.at(name_of(0, "up_proj.weight_scale"));
  scale.dtype = "F16";
  scale.bytes.clear();
  for (int i = 0; i < 256; ++i) {
    const auto bits = static_cast<std::uint16_t>(0x0001 + 101 * i);  // Subnormals, too.
    scale.bytes.append(reinterpret_cast<const char*>(&bits), 2);
  }
  raw.write(dir / "half");
  const ExpertWeights weights = Checkpoint::open(dir / "half").load_experts(kLayer, 0, 1);
  const TensorView& scales = weights.experts[0].up.scales;
  ASSERT_EQ(scales.dtype, DType::kFloat32);
  for (int i = 0; i < 256; ++i) {
    ASSERT_EQ(scales.as<float>()[i], f16_to_float(static_cast<std::uint16_t>(0x0001 + 101 * i)));
  }
}

std::string repeated(float value, std::size_t count) {
  return f32_bytes(std::vector<float>(count, value));
}

TEST(Modelopt, FoldsAPreQuantScaleThatIsOnePowerOfTwo) {
  for (const float factor : {1.0f, 4.0f, 0.125f}) {
    const TempDir dir;
    const SyntheticCheckpoint spec = spec_of("modelopt-w4a8-awq");
    write_synthetic_checkpoint(spec, dir / "good");
    const auto inputs = Checkpoint::open(dir / "good").input_scales(kLayer);
    RawCheckpoint raw(dir / "good");
    for (int e = 0; e < 3; ++e) {
      for (const char* stem : {"gate_proj", "up_proj", "down_proj"}) {
        const std::uint64_t k = std::string(stem) == "down_proj" ? 128 : 256;
        raw.add(name_of(e, std::string(stem) + ".pre_quant_scale"),
                {"F32", {k}, repeated(factor, k)});
      }
    }
    raw.write(dir / "scaled");
    const Checkpoint checkpoint = Checkpoint::open(dir / "scaled");
    expect_experts(checkpoint, spec, factor);
    const auto scaled = checkpoint.input_scales(kLayer);
    for (std::size_t e = 0; e < 3; ++e) {
      EXPECT_EQ(scaled[e].w1 * factor, inputs[e].w1);
      EXPECT_EQ(scaled[e].w2 * factor, inputs[e].w2);
    }
  }
}

TEST(Modelopt, RefusesByNameAPreQuantScaleThatCannotBeFolded) {
  const std::string name = name_of(1, "gate_proj.pre_quant_scale");
  std::vector<float> values(256, 2.0f);
  values[77] = 4.0f;
  const auto refused = [&](const std::set<int>& experts, const std::string& bytes,
                           const std::vector<std::string>& parts) {
    const auto add = [&](RawCheckpoint& raw) {
      for (const int e : experts) {
        raw.add(name_of(e, "gate_proj.pre_quant_scale"),
                {"F32", {bytes.size() / 4}, e == 1 ? bytes : repeated(1, bytes.size() / 4)});
      }
    };
    expect_refused(spec_of("modelopt-w4a8-awq"), add, ErrorCode::kUnsupported, parts);
  };
  refused({0, 1, 2}, f32_bytes(values), {".safetensors", name, "element 77 = 4", "exactly"});
  refused({0, 1, 2}, repeated(3, 256), {name, "element 0 = 3", "not a power of two"});
  refused({1}, repeated(1, 128), {name, "shape [128]", "[256]"});
  // The weights of expert 2 would be read as if there were no such scale.
  refused({0, 1}, repeated(2, 256), {name_of(2, "gate_proj.pre_quant_scale") + " is missing"});
}

TEST(Modelopt, RefusesConfigsThatItCannotHonour) {
  expect_refused(
      spec_of("modelopt-w4a8-awq"),
      [](RawCheckpoint& raw) { raw.hf_quant_config["quantization"]["has_zero_point"] = true; },
      ErrorCode::kUnsupported, {"hf_quant_config.json", "has_zero_point = true"});
  expect_refused(spec_of("modelopt-w4a8-awq"),
                 [](RawCheckpoint& raw) { raw.hf_quant_config["quantization"]["group_size"] = 64; },
                 ErrorCode::kUnsupported,
                 {"hf_quant_config.json", "group_size = 64", "32 and 128"});
}

/// Block scales divided by the second scale, as FP4 formats have them: another meaning.
TEST(TwoLevelScales, AreRefusedIfTheFirstIsRelativeToTheSecond) {
  for (const auto& [format, first, second] :
       {std::tuple{"modelopt-w4a8-awq", "gate_proj.weight_scale", "gate_proj.weight_scale_2"},
        {"angelslim", "gate_proj.weight_scale.int4", "gate_proj.weight_scale"}}) {
    const std::string scale = name_of(1, first);
    expect_refused(spec_of(format),
                   [&, second = std::string(second)](RawCheckpoint& raw) {
                     float divisor = 0;
                     std::memcpy(&divisor, raw.at(name_of(1, second)).bytes.data(), 4);
                     std::string& bytes = raw.at(scale).bytes;
                     for (std::size_t i = 0; i < bytes.size(); i += 4) {
                       float value = 0;
                       std::memcpy(&value, bytes.data() + i, 4);
                       value /= divisor;
                       std::memcpy(bytes.data() + i, &value, 4);
                     }
                   },
                   ErrorCode::kUnsupported,
                   {scale, name_of(1, second), "relative to a second one"});
  }
}

TEST(Fp8Block, RefusesNanAndOtherBlocks) {
  const std::string name = name_of(2, "up_proj.weight");
  expect_refused(spec_of("fp8-block"),
                 [&](RawCheckpoint& raw) { raw.at(name).bytes[256 * 3 + 9] = '\x7f'; },
                 ErrorCode::kCorruptFile, {name, "weight [3, 9] = nan"});
  expect_refused(spec_of("fp8-block"),
                 [](RawCheckpoint& raw) {
                   raw.config["quantization_config"]["weight_block_size"] = {64, 128};
                 },
                 ErrorCode::kUnsupported, {"weight_block_size = [64, 128]", "[128, 128]"});
}

/// A model's FP8 repack may leave the key behind.
TEST(Fp8Block, ExpertDtypeFp4IsNamedBesideTheTensorThatContradictsIt) {
  expect_refused(
      spec_of("fp8-block"), [](RawCheckpoint& raw) { raw.config["expert_dtype"] = "fp4"; },
      ErrorCode::kUnsupported,
      {"config.json: expert_dtype = 'fp4'", name_of(0, "gate_proj.weight") + " is F8_E4M3",
       "as fp8-block has them", "leave out the key"});
}

TEST(Fp8Block, WhatHfQuantConfigSaysMustBeFp8) {
  const TempDir dir;
  write_synthetic_checkpoint(spec_of("fp8-block"), dir / "model");
  const auto write = [&](const std::string& algo) {
    std::ofstream(dir / "model" / "hf_quant_config.json")
        << R"({"quantization": {"quant_algo": ")" << algo << R"("}})";
  };
  for (const char* const algo : {"FP8", "FP8_BLOCK_SCALES"}) {
    write(algo);
    EXPECT_EQ(Checkpoint::open(dir / "model").format(), "fp8-block") << algo;
  }
  write("NVFP4");
  expect_error(ErrorCode::kUnsupported,
               {"quant_method = 'fp8'", "hf_quant_config.json says quant_algo = 'NVFP4'"},
               [&] { (void)Checkpoint::open(dir / "model"); });
}

TEST(Bf16, RefusesInfinity) {
  const std::string name = name_of(0, "down_proj.weight");
  expect_refused(spec_of("bf16"),
                 [&](RawCheckpoint& raw) { raw.at(name).bytes.replace(2 * 130, 2, "\x80\x7f"); },
                 ErrorCode::kCorruptFile, {name, "weight [1, 2] = inf"});
}

}  // namespace
}  // namespace sluice
