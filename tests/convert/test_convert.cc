// Conversions that keep every bit, and those that are refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>

#include "convert_fixture.h"
#include "core/sha256.h"
#include "sluice/lab/synthetic.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using testing::expect_error;
using testing::expect_same_tensors;
using testing::expect_same_weights;
using testing::f32_bytes;
using ::testing::HasSubstr;
using testing::RawCheckpoint;
using testing::small_spec;
using testing::TempDir;

/// The writer of make-checkpoint shares nothing with that of convert.
TEST(Convert, GivesWhatTheIndependentWriterGives) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "w4afp8");
  SyntheticCheckpoint spec = small_spec("compressed-tensors");
  spec.with_static_activations = true;
  write_synthetic_checkpoint(spec, dir / "ct");
  const ConvertReport there = convert_checkpoint(
      {.from = dir / "w4afp8", .to = dir / "made-ct", .format = "compressed-tensors"});
  expect_same_tensors(dir / "ct", dir / "made-ct");
  EXPECT_TRUE(there.is_complete);
  EXPECT_TRUE(there.is_verified);
  EXPECT_FALSE(there.is_requantized);
  EXPECT_EQ(there.weights_compared, 4 * 3 * 256 * 128);
  EXPECT_EQ(there.experts_written, 4);
  (void)convert_checkpoint({.from = dir / "made-ct", .to = dir / "back", .format = "w4afp8"});
  expect_same_tensors(dir / "w4afp8", dir / "back");
  EXPECT_EQ(Checkpoint::open(dir / "back").geometry().routed_scaling_factor, 2.5f);
}

struct ExactCase {
  const char* from;
  int group;
  const char* to;
};

class ExactConversions : public ::testing::TestWithParam<ExactCase> {};

TEST_P(ExactConversions, KeepEveryBitOfEveryWeight) {
  const ExactCase& c = GetParam();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const TempDir dir;
    SyntheticCheckpoint spec = small_spec(c.from, c.group);
    spec.scale_dtype = dtype;
    spec.num_layers = 2;
    write_synthetic_checkpoint(spec, dir / "from");
    const ConvertReport report =
        convert_checkpoint({.from = dir / "from", .to = dir / "to", .format = c.to});
    EXPECT_EQ(report.scale_dtype, dtype);
    EXPECT_EQ(Checkpoint::open(dir / "to").format(), c.to);
    expect_same_weights(dir / "from", dir / "to");
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, ExactConversions,
    ::testing::Values(ExactCase{"w4afp8", 128, "compressed-tensors"},
                      ExactCase{"w4afp8", 128, "w4afp8"},
                      ExactCase{"compressed-tensors", 128, "w4afp8"},
                      ExactCase{"compressed-tensors", 32, "compressed-tensors"},
                      ExactCase{"kimi-int4", 32, "compressed-tensors"},
                      ExactCase{"angelslim", 128, "w4afp8"},
                      ExactCase{"angelslim", 128, "compressed-tensors"},
                      ExactCase{"modelopt-w4a8-awq", 128, "w4afp8"},
                      ExactCase{"modelopt-w4a8-awq", 32, "compressed-tensors"}),
    [](const auto& p) {
      std::string name = fmt::format("{}_{}_to_{}", p.param.from, p.param.group, p.param.to);
      std::ranges::replace(name, '-', '_');
      return name;
    });

TEST(Convert, KimiStaysWithoutAnActivationScheme) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "from");
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "compressed-tensors"});
  const auto config = RawCheckpoint(dir / "to").config["quantization_config"];
  EXPECT_TRUE(config["config_groups"]["group_0"]["input_activations"].is_null());
}

/// Kimi-K2.5 and later: the language model is a part of the model, in names and in config.json.
TEST(Convert, KeepsTheNamesOfALanguageModelAmongOthers) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "plain");
  RawCheckpoint raw(dir / "plain");
  auto& file = raw.files.begin()->second;
  testing::RawFile renamed;
  for (const auto& [name, tensor] : file) renamed["language_model." + name] = tensor;
  renamed["vision_tower.x"] = {"BF16", {1}, "ab"};
  file = renamed;
  raw.config = {{"model_type", "kimi_k25"}, {"hidden_size", 5}, {"text_config", raw.config}};
  raw.write(dir / "from");
  expect_same_weights(dir / "plain", dir / "from");
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "compressed-tensors"});
  expect_same_tensors(dir / "from", dir / "to");
  EXPECT_EQ(Checkpoint::open(dir / "to").geometry().name, "kimi_k25");
  // A part that is null is none, here as for the reader.
  RawCheckpoint flat(dir / "plain");
  flat.config["text_config"] = nullptr;
  flat.write(dir / "null");
  (void)convert_checkpoint(
      {.from = dir / "null", .to = dir / "of_null", .format = "compressed-tensors"});
  expect_same_tensors(dir / "null", dir / "of_null");

  const std::string stray = "model.layers.3.mlp.experts.0.up_proj.bias";
  raw.add(stray, {"F32", {}, "abcd"});
  raw.write(dir / "mixed");
  expect_error(ErrorCode::kUnsupported, {".safetensors", stray, "one prefix"},
               [&] { (void)Checkpoint::open(dir / "mixed"); });
  renamed.erase("language_model.model.layers.3.mlp.experts.1.up_proj.weight_packed");
  raw.files.begin()->second = renamed;
  raw.write(dir / "missing");
  expect_error(ErrorCode::kUnsupported,
               {"tensor language_model.model.layers.3.mlp.experts.1.up_proj.weight_packed is"},
               [&] { (void)Checkpoint::open(dir / "missing"); });
}

/// Python's own numbers, which are no JSON, stay as they are; so do strings that look like them.
TEST(Convert, KeepsInfinityAndNaN) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "from");
  std::ostringstream text;
  text << std::ifstream(dir / "from" / "config.json").rdbuf();
  const std::string own = R"("time_step_limit": [0.0, Infinity, -Infinity],
    "temperature": NaN, "prefix": "a \"NaN\\", )";
  std::string changed = text.str();
  changed.insert(changed.find('{') + 1, own);
  std::ofstream(dir / "from" / "config.json") << changed;
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "compressed-tensors"});
  std::ostringstream made;
  made << std::ifstream(dir / "to" / "config.json").rdbuf();
  for (const char* const part :
       {"Infinity,", "-Infinity\n", R"("temperature": NaN,)", R"("prefix": "a \"NaN\\",)"}) {
    EXPECT_THAT(made.str(), HasSubstr(part));
  }
  EXPECT_EQ(Checkpoint::open(dir / "to").geometry().num_experts, 4);
}

/// Converting changes what tensors hold, not how a family of models calls them.
TEST(Convert, KeepsPrefixContainerAndStems) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "plain");
  RawCheckpoint raw(dir / "plain");
  auto& file = raw.files.begin()->second;
  testing::RawFile renamed;
  for (const auto& [plain, tensor] : file) {
    std::string name = plain;
    for (const auto& [from, to] : {std::pair<std::string, std::string>{"model.", "language_model."},
                                   {"mlp.", "block_sparse_moe."},
                                   {"gate_proj", "w1"},
                                   {"up_proj", "w3"},
                                   {"down_proj", "w2"}}) {
      if (const auto at = name.find(from); at != name.npos) name.replace(at, from.size(), to);
    }
    renamed[name] = tensor;
  }
  ASSERT_TRUE(
      renamed.contains("language_model.layers.3.block_sparse_moe.experts.1.w3.weight_scale"));
  file = renamed;
  raw.write(dir / "from");
  expect_same_weights(dir / "plain", dir / "from");
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "compressed-tensors"});
  expect_same_tensors(dir / "from", dir / "to");
  // What the report says of a matrix is the checkpoint's own name, too.
  const ConvertReport report = convert_checkpoint({.from = dir / "from",
                                                   .to = dir / "coarse",
                                                   .format = "compressed-tensors",
                                                   .scale_rule = ScaleRule::kAmax7,
                                                   .group_size = 128});
  EXPECT_TRUE(report.worst_matrix.starts_with("language_model.layers.3.block_sparse_moe.experts."))
      << report.worst_matrix;
  EXPECT_EQ(report.worst_matrix.substr(report.worst_matrix.size() - 3, 2), ".w")
      << report.worst_matrix;
}

TEST(Convert, DropsInputScalesOnlyWhenAsked) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "from");
  const ConvertReport report = convert_checkpoint({.from = dir / "from",
                                                   .to = dir / "to",
                                                   .format = "compressed-tensors",
                                                   .drop_input_scales = true});
  EXPECT_FALSE(report.has_input_scales);
  EXPECT_FALSE(Checkpoint::open(dir / "to").static_scales(testing::kFirstLayer));
}

TEST(Convert, Bf16ScalesWhereTheyAreExactAndARefusalWhereNot) {
  const TempDir dir;
  SyntheticCheckpoint spec = small_spec("w4afp8");
  spec.scale_dtype = DType::kBFloat16;
  write_synthetic_checkpoint(spec, dir / "from");
  // Widened, then narrowed again.
  (void)convert_checkpoint({.from = dir / "from",
                            .to = dir / "wide",
                            .format = "w4afp8",
                            .scale_dtype = DType::kFloat32});
  (void)convert_checkpoint({.from = dir / "wide",
                            .to = dir / "narrow",
                            .format = "w4afp8",
                            .scale_dtype = DType::kBFloat16});
  expect_same_tensors(dir / "from", dir / "narrow");
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "f32");
  expect_error(ErrorCode::kUnsupported,
               {"experts.0.gate_proj", "scale [0, 0]", "is not a bfloat16"}, [&] {
                 (void)convert_checkpoint({.from = dir / "f32",
                                           .to = dir / "rounded",
                                           .format = "w4afp8",
                                           .scale_dtype = DType::kBFloat16});
               });
  EXPECT_FALSE(fs::exists(dir / "rounded"));
  EXPECT_FALSE(fs::exists(dir / ".rounded.converting")) << "in the way of other options";
}

TEST(Convert, CopiesTheOtherTensorsAndFilesOfTheModel) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("modelopt-w4a8-awq"), dir / "plain");
  RawCheckpoint raw(dir / "plain");
  raw.add("model.embed_tokens.weight", {"BF16", {3, 5}, std::string(30, '\x3c')});
  raw.add("model.norm.weight", {"F32", {}, "abcd"});
  raw.write(dir / "from");
  testing::write_file(dir / "from" / "tokenizer.json", "{\"a\": 1}");
  testing::write_file(dir / "from" / "quant_cfg.json", "{}");
  const ConvertReport report =
      convert_checkpoint({.from = dir / "from", .to = dir / "to", .format = "compressed-tensors"});
  EXPECT_EQ(report.other_tensors, 2);
  const auto made = RawCheckpoint(dir / "to").tensors();
  EXPECT_EQ(made.at("model.embed_tokens.weight").bytes, std::string(30, '\x3c'));
  EXPECT_EQ(made.at("model.norm.weight").bytes, "abcd");
  EXPECT_EQ(testing::read_file(dir / "to" / "tokenizer.json"), "{\"a\": 1}");
  EXPECT_FALSE(fs::exists(dir / "to" / "quant_cfg.json"));
  EXPECT_FALSE(fs::exists(dir / "to" / "hf_quant_config.json"));
  expect_same_weights(dir / "from", dir / "to");
  (void)convert_checkpoint({.from = dir / "from",
                            .to = dir / "bare",
                            .format = "compressed-tensors",
                            .experts_only = true});
  EXPECT_FALSE(RawCheckpoint(dir / "bare").tensors().contains("model.norm.weight"));
  EXPECT_FALSE(fs::exists(dir / "bare" / "tokenizer.json"));
}

TEST(Convert, OneLayerOfSeveral) {
  const TempDir dir;
  SyntheticCheckpoint spec = small_spec("w4afp8");
  spec.num_layers = 3;
  write_synthetic_checkpoint(spec, dir / "from");
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "compressed-tensors", .layers = {4}});
  EXPECT_THAT(Checkpoint::open(dir / "to").moe_layers(), ElementsAre(4));
}

TEST(Convert, ChecksumsAreThoseOfTheFiles) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "from");
  (void)convert_checkpoint(
      {.from = dir / "from", .to = dir / "to", .format = "compressed-tensors"});
  const std::string sums = testing::read_file(dir / "to" / "SHA256SUMS");
  int num_files = 0;
  for (const auto& [name, content] : testing::file_contents(dir / "to")) {
    if (name == "SHA256SUMS") continue;
    Sha256 hash;
    hash.update(std::as_bytes(std::span(content)));
    EXPECT_THAT(sums, HasSubstr(to_hex(hash.finish()) + "  " + name + "\n"));
    ++num_files;
  }
  EXPECT_EQ(num_files, 3);
  EXPECT_EQ(std::ranges::count(sums, '\n'), num_files);
}

TEST(Sha256, KnownAnswers) {
  // FIPS 180-4 examples, and a million letters.
  const auto hash_of = [](const std::string& text, std::size_t piece) {
    Sha256 hash;
    for (std::size_t at = 0; at < text.size(); at += piece) {
      hash.update(std::as_bytes(std::span(text).subspan(at, std::min(piece, text.size() - at))));
    }
    return to_hex(hash.finish());
  };
  EXPECT_EQ(hash_of("", 1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hash_of("abc", 1), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hash_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 5),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  for (const std::size_t piece : {63, 64, 1000}) {
    EXPECT_EQ(hash_of(std::string(1'000'000, 'a'), piece),
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

void expect_refused(ConvertOptions options, ErrorCode code, const std::vector<std::string>& parts) {
  expect_error(code, parts, [&] { (void)convert_checkpoint(options); });
  EXPECT_FALSE(fs::exists(options.to / "config.json"));
}

TEST(ConvertRefusal, WhatTheTargetCannotRepresent) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("kimi-int4", 32), dir / "kimi");
  expect_refused({.from = dir / "kimi", .to = dir / "to", .format = "w4afp8"},
                 ErrorCode::kUnsupported, {"kimi", "groups of 32", "w4afp8 has groups of 128"});
  write_synthetic_checkpoint(small_spec("modelopt-w4a8-awq"), dir / "plain");
  RawCheckpoint raw(dir / "plain");
  std::vector<float> smoothing(256, 1.0f);
  smoothing[9] = 1.5f;
  const std::string name = "model.layers.3.mlp.experts.2.up_proj.pre_quant_scale";
  for (int e = 0; e < 4; ++e) {
    raw.add(fmt::format("model.layers.3.mlp.experts.{}.up_proj.pre_quant_scale", e),
            {"F32", {256}, f32_bytes(e == 2 ? smoothing : std::vector<float>(256, 1.0f))});
  }
  raw.write(dir / "awq");
  expect_refused({.from = dir / "awq", .to = dir / "to", .format = "w4afp8"},
                 ErrorCode::kUnsupported, {".safetensors", name, "element 9 = 1.5"});
}

TEST(ConvertRefusal, Fp8TensorsBesideCompressedExperts) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("fp8-block"), dir / "plain");
  RawCheckpoint raw(dir / "plain");
  raw.add("model.layers.0.self_attn.o_proj.weight", {"F8_E4M3", {2, 2}, "abcd"});
  raw.write(dir / "from");
  ConvertOptions options = {.from = dir / "from",
                            .to = dir / "to",
                            .format = "compressed-tensors",
                            .scale_rule = ScaleRule::kAmax7};
  expect_refused(options, ErrorCode::kUnsupported,
                 {"self_attn.o_proj.weight", "F8_E4M3", "experts alone"});
  options.experts_only = true;
  EXPECT_TRUE(convert_checkpoint(options).is_complete);
}

TEST(ConvertRefusal, OptionsThatDoNotFitTheSource) {
  const TempDir dir;
  write_synthetic_checkpoint(small_spec("w4afp8"), dir / "int4");
  write_synthetic_checkpoint(small_spec("bf16"), dir / "bf16");
  ConvertOptions int4 = {.from = dir / "int4", .to = dir / "to", .format = "w4afp8"};
  ConvertOptions bf16 = {.from = dir / "bf16", .to = dir / "to", .format = "w4afp8"};
  const auto code = ErrorCode::kInvalidArgument;
  expect_refused(bf16, code, {"the source is bf16", "needs a scale rule", "amax7, amax8 or mse"});
  ConvertOptions o = int4;
  o.scale_rule = ScaleRule::kMse;
  expect_refused(o, code, {"scale rule mse", "w4afp8", "nothing is quantized"});
  o = int4;
  o.group_size = 32;
  expect_refused(o, code, {"group size 32", "groups of 128", "unless a scale rule"});
  o = int4;
  o.format = "gguf";
  expect_refused(o, code, {"'gguf'", "w4afp8, compressed-tensors"});
  o = int4;
  o.layers = {7};
  expect_refused(o, code, {"layer 7 has no routed experts"});
  o = int4;
  o.layers = {3, 3};
  expect_refused(o, code, {"layer 3 is asked for twice"});
  o = int4;
  o.first_expert = 2, o.num_experts = 3;
  expect_refused(o, code, {"[2, 5)", "[0, 4)"});
  o = int4;
  o.scale_dtype = DType::kFloat64;
  expect_refused(o, code, {"scale_dtype float64"});
  o = bf16;
  o.scale_rule = ScaleRule::kAmax7, o.group_size = 32;
  expect_refused(o, ErrorCode::kUnsupported, {"groups of 32", "w4afp8 has groups of 128"});
  o.group_size = 64;
  expect_refused(o, code, {"group size 64"});
  o = int4;
  o.to = dir / "int4";
  expect_error(code, {"already holds a checkpoint"}, [&] { (void)convert_checkpoint(o); });
  expect_error(code, {"'best'", "amax7, amax8, mse"}, [] { (void)parse_scale_rule("best"); });
}

}  // namespace
}  // namespace sluice
