// Each preset is written with its own model's tensor names, config keys and container. What the
// files hold is read without the readers first, and then with them.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "expect_error.h"
#include "raw_checkpoint.h"
#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"
#include "temp_dir.h"

namespace sluice {
namespace {

using testing::expect_error;
using testing::RawCheckpoint;
using testing::TempDir;
using Json = nlohmann::ordered_json;

/// The preset's model, small: 2 experts of 256 x 128 in one layer, 3 or 0.
SyntheticCheckpoint small(const std::string& preset) {
  SyntheticCheckpoint spec = synthetic_preset(preset);
  spec.geometry.num_experts = 2;
  spec.geometry.num_topk = 1;
  spec.geometry.set_widths(256, 128);
  return spec;
}

struct Case {
  const char* preset;
  const char* gate;        ///< Tensor of expert 1 with gate's codes.
  const char* gate_dtype;  ///< And of its scales:
  const char* gate_scale;
  const char* scale_dtype;
  const char* keys;  ///< Of the language model, all of them must be there.
  bool is_nested = false;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.preset;
}

class Spelling : public ::testing::TestWithParam<Case> {};

TEST_P(Spelling, IsTheModels) {
  const Case& c = GetParam();
  const TempDir dir;
  write_synthetic_checkpoint(small(c.preset), dir / "x");
  RawCheckpoint raw(dir / "x");
  EXPECT_EQ(raw.at(c.gate).dtype, c.gate_dtype);
  EXPECT_EQ(raw.at(c.gate_scale).dtype, c.scale_dtype);
  EXPECT_EQ(raw.config.contains("text_config"), c.is_nested);
  const Json& model = c.is_nested ? raw.config["text_config"] : raw.config;
  const Json wanted = Json::parse(c.keys);
  for (const auto& [key, value] : wanted.items()) {
    ASSERT_TRUE(model.contains(key)) << key;
    EXPECT_EQ(model[key], value) << key;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Presets, Spelling,
    ::testing::Values(
        Case{"tiny", "model.layers.3.mlp.experts.1.gate_proj.weight", "I8",
             "model.layers.3.mlp.experts.1.gate_proj.weight_scale_inv", "F32",
             R"({"model_type": "tiny", "n_routed_experts": 2, "first_k_dense_replace": 3})"},
        Case{"kimi-k2-int4", "model.layers.3.mlp.experts.1.gate_proj.weight_packed", "I32",
             "model.layers.3.mlp.experts.1.gate_proj.weight_scale", "BF16",
             R"({"n_routed_experts": 2, "num_experts_per_tok": 1})"},
        Case{"kimi-k2.5", "language_model.model.layers.3.mlp.experts.1.gate_proj.weight_packed",
             "I32", "language_model.model.layers.3.mlp.experts.1.gate_proj.weight_scale", "BF16",
             R"({"n_routed_experts": 2, "hidden_size": 256, "hidden_act": "silu"})", true},
        Case{"kimi-k3", "language_model.model.layers.3.block_sparse_moe.experts.1.w1.weight_packed",
             "I32", "language_model.model.layers.3.block_sparse_moe.experts.1.w1.weight_scale",
             "BF16",
             R"({"num_experts": 2, "num_experts_per_token": 1, "hidden_size": 512,
                 "routed_expert_hidden_size": 256, "hidden_act": "situ",
                 "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0})",
             true},
        Case{"glm-5", "model.layers.3.mlp.experts.1.gate_proj.weight", "I8",
             "model.layers.3.mlp.experts.1.gate_proj.weight_scale_inv", "BF16",
             R"({"model_type": "glm_moe_dsa", "n_routed_experts": 2, "hidden_act": "silu"})"},
        Case{"deepseek-v4-flash", "layers.0.ffn.experts.1.w1.weight", "I8",
             "layers.0.ffn.experts.1.w1.weight_scale_inv", "F32",
             R"({"model_type": "deepseek_v4", "hidden_act": "silu", "swiglu_limit": 10.0})"},
        Case{"qwen3.8", "model.language_model.layers.3.mlp.experts.1.gate_proj.weight_packed",
             "I32", "model.language_model.layers.3.mlp.experts.1.gate_proj.weight_scale", "BF16",
             R"({"num_experts": 2, "mlp_only_layers": [0, 1, 2], "decoder_sparse_step": 1})", true},
        Case{"qwen3-30b", "model.layers.3.mlp.experts.1.gate_proj.weight", "I8",
             "model.layers.3.mlp.experts.1.gate_proj.weight_scale_inv", "F32",
             R"({"model_type": "qwen3_moe", "num_experts": 2})"}));

/// Codes and scales of expert 1.
void expect_same_weights(const Checkpoint& a, const Checkpoint& b, int layer) {
  const ExpertWeights first = a.load_experts(layer, 1, 1), second = b.load_experts(layer, 1, 1);
  const Expert &x = first.experts.front(), &y = second.experts.front();
  for (const auto& [p, q] : {std::pair{&x.gate, &y.gate}, {&x.up, &y.up}, {&x.down, &y.down}}) {
    for (const auto& [s, t] : {std::pair{&p->codes, &q->codes}, {&p->scales, &q->scales}}) {
      ASSERT_EQ(s->dtype, t->dtype);
      ASSERT_EQ(s->bytes(), t->bytes());
      EXPECT_EQ(std::memcmp(s->data, t->data, s->bytes()), 0);
    }
  }
}

/// Every preset, small, under its own names and in its own layout: the readers give back the
/// geometry and the weights that the same preset has under DeepSeek's names.
TEST(SpellingReadBack, GivesGeometryAndWeights) {
  for (const std::string& preset : preset_names()) {
    SCOPED_TRACE(preset);
    const TempDir dir;
    SyntheticCheckpoint spec = small(preset);
    write_synthetic_checkpoint(spec, dir / "own");
    const Checkpoint own = Checkpoint::open(dir / "own");
    const ModelGeometry &wanted = spec.geometry, &got = own.geometry();
    EXPECT_EQ(got.num_experts, 2);
    EXPECT_EQ(got.num_topk, 1);
    EXPECT_EQ(got.hidden, 256);
    EXPECT_EQ(got.intermediate, 128);
    EXPECT_EQ(got.group_size, wanted.group_size);
    EXPECT_EQ(got.weight_format, wanted.weight_format);
    EXPECT_EQ(got.routed_scaling_factor, wanted.routed_scaling_factor);
    EXPECT_EQ(got.activation, wanted.activation);
    EXPECT_EQ(own.moe_layers(), std::vector{spec.first_layer});
    // Kimi-K3's latent width is the only thing to say of any of them.
    std::vector<std::string> kinds;
    for (const CheckpointWarning& w : own.warnings()) kinds.push_back(w.kind);
    EXPECT_EQ(kinds, preset.starts_with("kimi-k3") ? std::vector<std::string>{"latent-width"}
                                                   : std::vector<std::string>{});
    spec.spelling = "deepseek";
    write_synthetic_checkpoint(spec, dir / "plain");
    expect_same_weights(own, Checkpoint::open(dir / "plain"), spec.first_layer);
  }
}

TEST(SpellingReadBack, GivesEveryActivation) {
  for (const auto& [preset, activation] : {std::pair{"deepseek-v4-flash", "swiglu:limit=10"},
                                           {"deepseek-v4-pro", "swiglu:limit=10"},
                                           {"kimi-k3", "situ:beta=4,linear_beta=25"},
                                           {"qwen3-30b", "swiglu-oai:alpha=1.702,limit=7"}}) {
    const TempDir dir;
    SyntheticCheckpoint spec = small(preset);
    spec.geometry.activation = parse_activation(activation);
    write_synthetic_checkpoint(spec, dir / "x");
    EXPECT_EQ(to_string(Checkpoint::open(dir / "x").activation(spec.first_layer)), activation);
  }
}

/// w1, w3 and w2 are gate, up and down: their shapes and the same bytes as under the other names.
TEST(SpellingOfStems, KeepsWhatTheMatricesHold) {
  const TempDir dir;
  SyntheticCheckpoint spec = small("deepseek-v4-flash");
  write_synthetic_checkpoint(spec, dir / "numbers");
  spec.spelling = "deepseek";
  write_synthetic_checkpoint(spec, dir / "words");
  RawCheckpoint numbers(dir / "numbers"), words(dir / "words");
  for (const auto& [number, word] :
       {std::pair{"w1", "gate_proj"}, {"w3", "up_proj"}, {"w2", "down_proj"}}) {
    for (const char* part : {".weight", ".weight_scale_inv"}) {
      EXPECT_TRUE(numbers.at("layers.0.ffn.experts.0." + std::string(number) + part) ==
                  words.at("model.layers.0.mlp.experts.0." + std::string(word) + part))
          << word << part;
    }
    EXPECT_NO_THROW(
        (void)numbers.at("layers.0.ffn.experts.0." + std::string(number) + ".input_scale"));
  }
}

TEST(SpellingOfInputScales, IsOneInGlm5) {
  const TempDir dir;
  write_synthetic_checkpoint(small("glm-5"), dir / "x");
  const Checkpoint checkpoint = Checkpoint::open(dir / "x");
  for (const InputScales& s : checkpoint.input_scales(3)) {
    EXPECT_EQ(s.w1, 1);
    EXPECT_EQ(s.w2, 1);
    EXPECT_EQ(s.w3, 1);
  }
  const auto warnings = checkpoint.warnings(3);
  ASSERT_EQ(warnings.size(), 1);
  EXPECT_EQ(warnings[0].kind, "input-scales-one");
}

TEST(SpellingRefusals, NameWhatThereIs) {
  const TempDir dir;
  SyntheticCheckpoint spec = small("tiny");
  spec.spelling = "llama";
  expect_error(ErrorCode::kInvalidArgument, {"'llama'", "deepseek, glm-5"},
               [&] { write_synthetic_checkpoint(spec, dir / "x"); });
}

}  // namespace
}  // namespace sluice
