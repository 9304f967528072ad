// Every published layout: what make-checkpoint writes element by element, the reader must give back
// as the values it was made from; and each way in which such a checkpoint can be wrong.
#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "checkpoint/checkpoint_impl.h"
#include "checkpoint/formats/nibbles.h"
#include "checkpoint/formats/part_readers.h"
#include "checkpoint/synthetic.h"
#include "expect_error.h"
#include "raw_checkpoint.h"
#include "sluice/checkpoint.h"
#include "sluice/quant.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::f32_bytes;
using ::testing::HasSubstr;
using testing::RawCheckpoint;
using testing::RawTensor;
using testing::TempDir;

constexpr int kLayer = 3;

SyntheticCheckpoint spec_of(const std::string& format, int group = 128,
                            DType scale_dtype = DType::kFloat32) {
  ModelGeometry geometry = preset_geometry("tiny");
  geometry.num_experts = 3;
  geometry.group_size = group;
  return {.geometry = geometry, .format = format, .scale_dtype = scale_dtype};
}

std::string name_of(int expert, const std::string& part) {
  return "model.layers.3.mlp.experts." + std::to_string(expert) + "." + part;
}

float scale_at(const Int4Matrix& m, std::int64_t i) {
  return m.scales.dtype == DType::kFloat32 ? m.scales.as<float>()[i]
                                           : bf16_to_float(m.scales.as<std::uint16_t>()[i]);
}

/// Codes byte for byte, scales as they are after rounding to their dtype, times `factor`.
void expect_same(const Int4Matrix& m, const SyntheticMatrix& expected, DType stored,
                 float factor = 1) {
  ASSERT_EQ(m.group_size, expected.group);
  ASSERT_EQ(m.n(), expected.n);
  ASSERT_EQ(m.k(), expected.k);
  ASSERT_EQ(std::memcmp(m.codes.data, expected.codes.data(), expected.codes.size()), 0);
  ASSERT_EQ(static_cast<std::size_t>(m.scales.shape.num_elements()), expected.scales.size());
  for (std::size_t i = 0; i < expected.scales.size(); ++i) {
    const float s = stored == DType::kBFloat16 ? bf16_to_float(bf16_from_float(expected.scales[i]))
                                               : expected.scales[i];
    ASSERT_EQ(scale_at(m, static_cast<std::int64_t>(i)), s * factor) << "scale " << i;
  }
}

void expect_experts(const Checkpoint& checkpoint, const SyntheticCheckpoint& spec,
                    float factor = 1) {
  const ExpertWeights weights = checkpoint.load_experts(kLayer, 0, 3);
  ASSERT_EQ(weights.geometry.group_size, spec.geometry.group_size);
  for (int e = 0; e < 3; ++e) {
    SyntheticExpert expected;
    fill_expert(spec, kLayer, e, expected);
    const Expert& expert = weights.experts[static_cast<std::size_t>(e)];
    expect_same(expert.gate, expected.matrices[0], spec.scale_dtype, factor);
    expect_same(expert.up, expected.matrices[1], spec.scale_dtype, factor);
    expect_same(expert.down, expected.matrices[2], spec.scale_dtype, factor);
  }
}

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
  EXPECT_TRUE(checkpoint.is_int4());
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
    EXPECT_FALSE(checkpoint.is_int4());
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

/// Opens and loads everything, whatever the format.
void read_all(const std::filesystem::path& dir) {
  const CheckpointData data = CheckpointData::open(dir);
  for (const int layer : data.moe_layers) {
    data.check_layer(layer);
    (void)data.input_scales(layer);
    for (int e = 0; e < data.geometry().num_experts; ++e) {
      ExpertStorage storage;
      if (data.format->is_int4()) {
        (void)data.load_expert(layer, e, storage);
        continue;
      }
      for (const MatrixLayout& matrix : matrix_layouts(data.geometry())) {
        std::vector<float> values(static_cast<std::size_t>(matrix.n * matrix.k));
        data.format->load_floats(data.layer_tensors(layer).experts[static_cast<std::size_t>(e)],
                                 matrix, values);
      }
    }
  }
}

/// A checkpoint of `spec` that `spoil` has changed; reading it must fail.
void expect_refused(const SyntheticCheckpoint& spec,
                    const std::function<void(RawCheckpoint&)>& spoil, ErrorCode code,
                    const std::vector<std::string>& parts) {
  const TempDir dir;
  write_synthetic_checkpoint(spec, dir / "good");
  RawCheckpoint raw(dir / "good");
  raw.write(dir / "same");
  read_all(dir / "same");
  spoil(raw);
  raw.write(dir / "bad");
  SCOPED_TRACE(spec.format);
  expect_error(code, parts, [&] { read_all(dir / "bad"); });
}

class EveryFormat : public ::testing::TestWithParam<std::string> {
 protected:
  [[nodiscard]] SyntheticCheckpoint spec() const {
    return spec_of(GetParam(), GetParam() == "kimi-int4" ? 32 : 128);
  }
};

TEST_P(EveryFormat, NamesTheTensorThatIsMissingOrWrong) {
  const TempDir dir;
  write_synthetic_checkpoint(spec(), dir / "good");
  const auto tensors = RawCheckpoint(dir / "good").tensors();
  for (const auto& [name, tensor] : tensors) {
    if (name.find("experts.1.") == std::string::npos) continue;
    SCOPED_TRACE(name);
    const auto spoiled = [&](const char* what, const std::function<void(RawCheckpoint&)>& spoil,
                             const std::vector<std::string>& parts) {
      RawCheckpoint raw(dir / "good");
      spoil(raw);
      raw.write(dir / what);
      expect_error(ErrorCode::kCorruptFile, parts, [&] { read_all(dir / what); });
      std::filesystem::remove_all(dir / what);
    };
    spoiled("missing", [&](RawCheckpoint& raw) { raw.erase(name); }, {name, "is missing"});
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
                 ErrorCode::kUnsupported, {other, "not part of compressed-tensors"});
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
      {"/config_groups/group_0/input_activations/num_bits", 16, {"input_activations = 16-bit"}},
      {"/config_groups/group_0/input_activations/type", "int", {"8-bit 'int'", "8-bit float"}},
      {"/config_groups/group_0/input_activations/dynamic", false, {"must be per tensor"}},
      {"/config_groups/group_1", group, {"'group_0' and 'group_1', which differ"}},
      {"/config_groups", nlohmann::ordered_json::object(), {"config_groups = {}"}},
      {"/format", "int-quantized", {"format = 'int-quantized'", "'pack-quantized'"}},
      {"/sparsity_config", {{"format", "sparse-24"}}, {"sparsity_config"}},
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
  expect_refused(spec_of("modelopt-w4a8-awq"),
                 [&](RawCheckpoint& raw) {
                   raw.add(name, {"F32", {256}, f32_bytes(values)});
                 },
                 ErrorCode::kUnsupported, {".safetensors", name, "element 77 = 4", "exactly"});
  expect_refused(spec_of("modelopt-w4a8-awq"),
                 [&](RawCheckpoint& raw) {
                   raw.add(name, {"F32", {256}, repeated(3, 256)});
                 },
                 ErrorCode::kUnsupported, {name, "element 0 = 3", "not a power of two"});
  expect_refused(spec_of("modelopt-w4a8-awq"),
                 [&](RawCheckpoint& raw) {
                   raw.add(name, {"F32", {128}, repeated(1, 128)});
                 },
                 ErrorCode::kCorruptFile, {name, "shape [128]", "[256]"});
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

TEST(Bf16, RefusesInfinity) {
  const std::string name = name_of(0, "down_proj.weight");
  expect_refused(spec_of("bf16"),
                 [&](RawCheckpoint& raw) { raw.at(name).bytes.replace(2 * 130, 2, "\x80\x7f"); },
                 ErrorCode::kCorruptFile, {name, "weight [1, 2] = inf"});
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
}

}  // namespace
}  // namespace sluice
