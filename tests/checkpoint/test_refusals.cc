// Checkpoints that must be refused, each spoiled in one way, and what the refusal must say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "expect_error.h"
#include "model_files.h"
#include "sluice/checkpoint.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::f32_bytes;
using testing::ModelFiles;
using testing::TempDir;

constexpr int kLayer = ModelFiles::kLayer;

/// Opens and loads everything; `files` must be refused somewhere on the way.
void expect_refused(ErrorCode code, const std::vector<std::string>& parts,
                    const ModelFiles& files) {
  const TempDir dir;
  files.write(dir.path());
  expect_error(code, parts, [&] {
    const Checkpoint checkpoint = Checkpoint::open(dir.path());
    (void)checkpoint.load_experts(kLayer, 0, ModelFiles::kNumExperts);
  });
}

void expect_corrupt(const std::vector<std::string>& parts, const ModelFiles& files) {
  expect_refused(ErrorCode::kCorruptFile, parts, files);
}

void expect_unsupported(const std::vector<std::string>& parts, const ModelFiles& files) {
  expect_refused(ErrorCode::kUnsupported, parts, files);
}

TEST(Refusal, ShardCutAtEveryByteOfItsHeaderAndInItsData) {
  const TempDir dir;
  const ModelFiles files;
  files.write(dir.path());
  const auto path = dir / ModelFiles::shard_name(1);
  const std::string whole = testing::read_file(path);
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), 8);
  header_bytes += 8;
  std::vector<std::size_t> lengths(header_bytes + 1);
  for (std::size_t i = 0; i <= header_bytes; ++i) lengths[i] = i;
  for (const std::size_t cut : {1, 2, 100, 1000, 4096, 20'000}) {
    lengths.push_back(whole.size() - cut);
  }
  for (const std::size_t length : lengths) {
    std::filesystem::resize_file(path, length);
    expect_error(ErrorCode::kCorruptFile, {path.string()},
                 [&] { (void)Checkpoint::open(dir.path()); });
    testing::write_file(path, whole);
    if (HasFailure()) FAIL() << "cut to " << length << " of " << whole.size() << " bytes";
  }
  (void)Checkpoint::open(dir.path());
}

TEST(Refusal, NoSuchDirectory) {
  expect_error(ErrorCode::kIo, {"/no/such/dir/config.json", "No such file"},
               [] { (void)Checkpoint::open("/no/such/dir"); });
}

TEST(Refusal, NoSafetensors) {
  ModelFiles files;
  files.files.clear();
  files.with_index = false;
  expect_refused(ErrorCode::kIo, {"no *.safetensors file"}, files);
}

TEST(Refusal, NoRoutedExperts) {
  ModelFiles files;
  files.files.clear();
  files.files["model.safetensors"]["model.embed_tokens.weight"] = {"F32", {1}, f32_bytes({1})};
  expect_refused(ErrorCode::kUnsupported,
                 {"no tensor named model.layers.L.mlp.experts.E", "no tensor's name has"}, files);
}

TEST(Refusal, MissingExpert) {
  ModelFiles files;
  for (const char* stem : {"gate_proj", "up_proj", "down_proj"}) {
    files.erase(1, std::string(stem) + ".weight");
    files.erase(1, std::string(stem) + ".weight_scale_inv");
  }
  expect_unsupported({"model.layers.5.mlp.experts.1.gate_proj.weight is missing", "2 experts"},
                     files);
}

TEST(Refusal, CheckSeesWhatIsWrongWithoutReadingWeights) {
  const TempDir dir;
  ModelFiles files;
  files.tensor(1, "up_proj.weight_scale_inv").bytes = f32_bytes(std::vector<float>(256, -1.0f));
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  checkpoint.check(kLayer);
  expect_error(ErrorCode::kInvalidArgument, {"layer 6"}, [&] { checkpoint.check(6); });
  files.erase(0, "w1.input_scale");
  files.write(dir.path());
  expect_error(ErrorCode::kUnsupported, {"experts.0.w1.input_scale is missing"},
               [&] { Checkpoint::open(dir.path()).check(kLayer); });
}

TEST(Refusal, MissingWeight) {
  ModelFiles files;
  files.erase(0, "down_proj.weight");
  expect_unsupported({"model.layers.5.mlp.experts.0.down_proj.weight is missing"}, files);
}

TEST(Refusal, MissingWeightScale) {
  ModelFiles files;
  files.erase(1, "up_proj.weight_scale_inv");
  expect_unsupported({"model.layers.5.mlp.experts.1.up_proj.weight_scale_inv is missing"}, files);
}

TEST(Refusal, ExpertPastTheConfigsNumber) {
  ModelFiles files;
  files.config["n_routed_experts"] = 1;
  files.config["num_experts_per_tok"] = 1;
  expect_unsupported(
      {".safetensors: tensor model.layers.5.mlp.experts.1.", "expert 1 of a model with 1 experts"},
      files);
}

TEST(Refusal, WrongDtype) {
  ModelFiles files;
  files.tensor(0, "gate_proj.weight").dtype = "F8_E4M3";
  expect_unsupported(
      {ModelFiles::shard_name(0), "experts.0.gate_proj.weight", "F8_E4M3", "I8 or U8"}, files);
  ModelFiles scales;
  scales.tensor(1, "up_proj.weight_scale_inv").dtype = "I32";
  expect_unsupported({ModelFiles::shard_name(1), "experts.1.up_proj.weight_scale_inv", "dtype I32",
                      "F32 or BF16 or F16"},
                     scales);
  ModelFiles input;
  input.tensor(1, "w3.input_scale").dtype = "U32";
  expect_unsupported({"act_scales.safetensors", "experts.1.w3.input_scale", "dtype U32"}, input);
}

TEST(Refusal, WrongShape) {
  ModelFiles files;
  files.tensor(0, "gate_proj.weight").shape = {64, 256};
  expect_unsupported(
      {ModelFiles::shard_name(0), "experts.0.gate_proj.weight", "shape [64, 256]", "[128, 128]"},
      files);
  ModelFiles scales;
  scales.tensor(1, "down_proj.weight_scale_inv").shape = {128, 2};
  expect_unsupported({"experts.1.down_proj.weight_scale_inv", "[128, 2]", "[256, 1]"}, scales);
  ModelFiles input;
  input.tensor(0, "w2.input_scale") = {"F32", {2}, f32_bytes({1, 1})};
  expect_unsupported({"experts.0.w2.input_scale", "shape [2]", "[1]"}, input);
}

TEST(Refusal, ConfigThatContradictsTheShapes) {
  ModelFiles files;
  files.config["hidden_size"] = 512;
  expect_unsupported({"experts.0.gate_proj.weight", "shape [128, 128]", "[128, 256]",
                      "it would fit hidden 256 and intermediate 128"},
                     files);
}

TEST(Refusal, BadWeightScale) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::pair<float, const char*> cases[] = {
      {std::nanf(""), "nan"}, {-std::nanf(""), "nan"}, {kInfinity, "inf"}, {-kInfinity, "-inf"},
      {0.0f, "= 0 "},         {-0.0f, "= -0 "},        {-0.5f, "-0.5"}};
  for (const auto& [value, text] : cases) {
    ModelFiles files;
    // [256, 1]: element 200 is row 200.
    std::memcpy(files.tensor(1, "down_proj.weight_scale_inv").bytes.data() + 200 * 4, &value, 4);
    expect_corrupt({ModelFiles::shard_name(1), "experts.1.down_proj.weight_scale_inv",
                    "scale [200, 0]", text, "not a positive finite number"},
                   files);
  }
}

TEST(Refusal, BadBf16WeightScale) {
  for (const std::uint16_t bits : {0x0000, 0x8000, 0x7f80, 0x7fc0, 0xff80, 0xbf80}) {
    ModelFiles files;
    auto& scale = files.tensor(0, "gate_proj.weight_scale_inv");  // [128, 2]
    std::string bytes;
    for (int i = 0; i < 256; ++i) bytes += std::string("\x80\x3f", 2);
    std::memcpy(bytes.data() + 2 * 131, &bits, 2);
    scale = {"BF16", {128, 2}, bytes};
    expect_corrupt({"experts.0.gate_proj.weight_scale_inv", "scale [65, 1]"}, files);
  }
}

TEST(Refusal, SmallestAndLargestScalesAreFine) {
  const TempDir dir;
  ModelFiles files;
  auto& bytes = files.tensor(0, "gate_proj.weight_scale_inv").bytes;
  for (const auto& [i, value] :
       {std::pair{0, std::numeric_limits<float>::denorm_min()}, {1, 0x1.fffffep117f}}) {
    std::memcpy(bytes.data() + 4 * i, &value, 4);
  }
  files.write(dir.path());
  EXPECT_EQ(Checkpoint::open(dir.path()).load_experts(kLayer, 0, 1).experts.size(), 1U);
}

TEST(Refusal, BadInputScale) {
  for (const float value : {std::nanf(""), std::numeric_limits<float>::infinity(), 0.0f, -1.0f}) {
    for (const char* part : {"w1.input_scale", "w2.input_scale", "w3.input_scale"}) {
      ModelFiles files;
      files.tensor(1, part).bytes = f32_bytes({value});
      expect_corrupt({"act_scales.safetensors", std::string("experts.1.") + part,
                      "not a positive finite number"},
                     files);
    }
  }
}

TEST(Refusal, InputScalesOfSomeExpertsOnly) {
  const TempDir dir;
  ModelFiles files;
  files.erase(1, "w2.input_scale");
  files.write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  expect_error(ErrorCode::kUnsupported,
               {"model.layers.5.mlp.experts.1.w2.input_scale is missing", "5 of the layer's 6"},
               [&] { (void)checkpoint.static_scales(kLayer); });
  // Not even a rank without that expert gets weights.
  expect_error(ErrorCode::kUnsupported, {"experts.1.w2.input_scale"},
               [&] { (void)checkpoint.load_experts(kLayer, 0, 1); });
}

TEST(Refusal, ATensorOfAnExpertThatTheFormatDoesNotKnow) {
  ModelFiles files;
  files.files[ModelFiles::shard_name(0)][ModelFiles::name(0, "gate_proj.pre_quant_scale")] = {
      "F32", {1}, f32_bytes({2})};
  expect_refused(ErrorCode::kUnsupported,
                 {"experts.0.gate_proj.pre_quant_scale", "not part of w4afp8"}, files);
}

TEST(Refusal, TheSameTensorInTwoFiles) {
  ModelFiles files;
  files.with_index = false;
  files.files["model-00002-of-00002.safetensors"][ModelFiles::name(0, "up_proj.weight")] =
      files.tensor(0, "up_proj.weight");
  expect_unsupported({"model-00002-of-00002.safetensors", "experts.0.up_proj.weight is also in",
                      "model-00001-of-00002.safetensors"},
                     files);
  ModelFiles scales;
  scales.files["other.safetensors"][ModelFiles::name(0, "w1.input_scale")] = {
      "F32", {1}, f32_bytes({9})};
  scales.with_index = false;
  expect_unsupported({"other.safetensors", "experts.0.w1.input_scale is also in", "act_scales"},
                     scales);
}

/// Writes good files, then an index made from `weight_map`.
void expect_bad_index(ErrorCode code, const std::vector<std::string>& parts,
                      const std::string& index) {
  const TempDir dir;
  ModelFiles().write(dir.path());
  testing::write_file(dir / "model.safetensors.index.json", index);
  expect_error(code, parts, [&] { (void)Checkpoint::open(dir.path()); });
}

TEST(Refusal, IndexThatNamesATensorThatIsNotThere) {
  auto map = ModelFiles().weight_map();
  map["model.norm.weight"] = ModelFiles::shard_name(1);
  expect_bad_index(
      ErrorCode::kCorruptFile,
      {ModelFiles::shard_name(1), "tensor model.norm.weight is missing", "index.json says"},
      nlohmann::json{{"weight_map", map}}.dump());
}

TEST(Refusal, IndexThatNamesTheWrongShard) {
  auto map = ModelFiles().weight_map();
  map[ModelFiles::name(0, "up_proj.weight")] = ModelFiles::shard_name(1);
  expect_bad_index(ErrorCode::kCorruptFile,
                   {ModelFiles::shard_name(1), "experts.0.up_proj.weight is missing",
                    "it is in " + ModelFiles::shard_name(0)},
                   nlohmann::json{{"weight_map", map}}.dump());
}

TEST(Refusal, IndexThatNamesAMissingShard) {
  auto map = ModelFiles().weight_map();
  map["x"] = "model-00009-of-00002.safetensors";
  expect_bad_index(ErrorCode::kIo, {"model-00009-of-00002.safetensors: missing"},
                   nlohmann::json{{"weight_map", map}}.dump());
}

TEST(Refusal, IndexThatLeavesTheDirectory) {
  expect_bad_index(ErrorCode::kUnsupported, {"'../other/x.safetensors'", "in this directory"},
                   R"({"weight_map":{"x":"../other/x.safetensors"}})");
  expect_bad_index(ErrorCode::kUnsupported, {"'x.bin'"}, R"({"weight_map":{"x":"x.bin"}})");
}

TEST(Refusal, IndexThatIsNoIndex) {
  expect_bad_index(ErrorCode::kCorruptFile, {"index.json", "weight_map is missing"}, "{}");
  expect_bad_index(ErrorCode::kCorruptFile, {"index.json", "'x' occurs twice"},
                   R"({"weight_map":{"x":"a.safetensors","x":"b.safetensors"}})");
  expect_bad_index(ErrorCode::kCorruptFile, {"index.json", "JSON, byte 15"}, R"({"weight_map":{)");
}

struct ConfigCase {
  const char* key;
  nlohmann::ordered_json value;
  std::vector<std::string> parts;
};

TEST(Refusal, ConfigFieldsOutOfRange) {
  const ConfigCase cases[] = {
      {"hidden_size", 0, {"hidden_size = 0", "[1, 1048576]"}},
      {"n_routed_experts", 0, {"n_routed_experts = 0"}},
      {"routed_scaling_factor", 0, {"routed_scaling_factor = 0"}},
      {"routed_scaling_factor", 1e300, {"routed_scaling_factor = 1e+300"}},
  };
  for (const ConfigCase& c : cases) {
    ModelFiles files;
    files.config[c.key] = c.value;
    expect_refused(ErrorCode::kUnsupported, c.parts, files);
  }
}

// Computing them as SwiGLU would be wrong without a word.
TEST(Refusal, ActivationsThatAreNotOurs) {
  for (const char* const act : {"gelu", "gelu_pytorch_tanh", "relu2", "SiLU", ""}) {
    ModelFiles files;
    files.config["hidden_act"] = act;
    expect_refused(ErrorCode::kUnsupported,
                   {"config.json: hidden_act = " + std::string(act), "is not silu"}, files);
    ModelFiles nested;
    nested.config["text_config"] = {{"hidden_act", act}};
    expect_refused(ErrorCode::kUnsupported, {"hidden_act = " + std::string(act)}, nested);
  }
  ModelFiles number;
  number.config["hidden_act"] = 1;
  expect_refused(ErrorCode::kUnsupported, {"config.json: hidden_act = 1 is not a name"}, number);
}

TEST(Refusal, QuantizationThatIsNotOurs) {
  ModelFiles fp8;
  fp8.config["quantization_config"]["quant_method"] = "fp8";
  expect_refused(ErrorCode::kUnsupported, {"config.json", "quant_method = 'fp8'", "w4afp8"}, fp8);
  ModelFiles contradiction = fp8;
  contradiction.hf_quant_config = {{"quantization", {{"quant_algo", "MIXED_PRECISION"}}}};
  expect_refused(ErrorCode::kUnsupported, {"'fp8'", "quant_algo = 'MIXED_PRECISION'"},
                 contradiction);
  ModelFiles none;
  none.config.erase("quantization_config");
  expect_refused(ErrorCode::kUnsupported, {"config.json: no quantization_config"}, none);
  ModelFiles other = none;
  other.hf_quant_config = {{"quantization", {{"quant_algo", "NVFP4"}}}};
  expect_refused(ErrorCode::kUnsupported, {"hf_quant_config.json", "quant_algo = 'NVFP4'"}, other);
  ModelFiles group;
  group.config["quantization_config"]["group_size"] = 32;
  expect_refused(ErrorCode::kUnsupported, {"group_size = 32", "128"}, group);
}

TEST(Refusal, LayerOrExpertsOutOfRange) {
  const TempDir dir;
  ModelFiles().write(dir.path());
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  expect_error(ErrorCode::kInvalidArgument, {"layer 4 has no routed experts", "those that have: 5"},
               [&] { (void)checkpoint.load_experts(4, 0, 1); });
  const std::pair<int, int> ranges[] = {{-1, 1}, {0, 0},  {0, 3},          {2, 1},
                                        {1, 2},  {0, -1}, {2147483647, 1}, {1, 2147483647}};
  for (const auto& [first, count] : ranges) {
    expect_error(ErrorCode::kInvalidArgument, {std::to_string(first), "[0, 2)"},
                 [&, f = first, c = count] { (void)checkpoint.load_experts(kLayer, f, c); });
  }
}

}  // namespace
}  // namespace sluice
