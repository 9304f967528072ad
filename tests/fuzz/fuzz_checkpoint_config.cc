// Fuzzes config.json, hf_quant_config.json and model.safetensors.index.json together.
//
//   input bytes --edit()--> three JSON texts --the readers--> refused: kCorruptFile or kUnsupported
//                                                       \---> accepted: config_meaning.h agrees
//
// The edits know the structure: keys with an effect and their spellings, keys without one, nesting,
// quantization groups. After them come raw edits of the text. What the readers accept is held
// against a second reading of the same text, which knows no more than docs/formats.md says: so a
// mutation that changes the meaning and is accepted with the old one is found.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/formats/format.h"
#include "checkpoint/model_config.h"
#include "checkpoint/weight_map.h"
#include "config_meaning.h"
#include "sluice/error.h"

namespace {

using Json = nlohmann::ordered_json;
using sluice::fuzz::Texts;

/// Reads the input front to back; zeros follow its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  [[nodiscard]] bool is_empty() const { return at_ == size_; }
  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : std::uint8_t{0}; }
  /// One of `options`.
  template <class T, std::size_t kCount>
  const T& pick(const T (&options)[kCount]) {
    return options[byte() % kCount];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

constexpr const char* kKeys[] = {"hidden_size",
                                 "routed_expert_hidden_size",
                                 "moe_latent_size",
                                 "moe_intermediate_size",
                                 "expert_ffn_hidden_size",
                                 "intermediate_size",
                                 "n_routed_experts",
                                 "num_experts",
                                 "num_local_experts",
                                 "num_experts_per_tok",
                                 "num_experts_per_token",
                                 "moe_topk",
                                 "moe_k",
                                 "routed_scaling_factor",
                                 "moe_router_topk_scaling_factor",
                                 "num_hidden_layers",
                                 "first_k_dense_replace",
                                 "num_nextn_predict_layers",
                                 "moe_layer_freq",
                                 "mlp_only_layers",
                                 "mlp_layer_types",
                                 "hidden_act",
                                 "hidden_activation",
                                 "mlp_hidden_act",
                                 "swiglu_limit",
                                 "swiglu_limits",
                                 "swiglu_alpha",
                                 "activation_situ_beta",
                                 "activation_situ_linear_beta",
                                 "activation_new",
                                 "mlp_bias",
                                 "use_bias",
                                 "expert_bias",
                                 "zero_expert_num",
                                 "block_configs",
                                 "model_type",
                                 "scoring_func",
                                 "norm_topk_prob",
                                 "rope_theta",
                                 "vision_config",
                                 "brand_new",
                                 "moe_new",
                                 "gate_scale",
                                 "up_clamp",
                                 "quant_method",
                                 "quant_algo",
                                 "group_size",
                                 "activation_scheme",
                                 "weight_block_size",
                                 "format",
                                 "config_groups",
                                 "ignore",
                                 "has_zero_point",
                                 "num_bits",
                                 "type",
                                 "symmetric",
                                 "strategy",
                                 "dynamic",
                                 "actorder",
                                 "targets",
                                 "sparsity_config",
                                 "quantization_config",
                                 "quantization",
                                 "weights",
                                 "input_activations"};

constexpr const char* kValues[] = {"null",
                                   "true",
                                   "false",
                                   "0",
                                   "1",
                                   "2",
                                   "3",
                                   "4",
                                   "8",
                                   "32",
                                   "64",
                                   "100",
                                   "128",
                                   "256",
                                   "512",
                                   "2880",
                                   "-1",
                                   "0.0",
                                   "0.01",
                                   "1.0",
                                   "2.5",
                                   "4.0",
                                   "7.0",
                                   "10.0",
                                   "25.0",
                                   "1e3",
                                   "1e999",
                                   "18446744073709551615",
                                   "[]",
                                   "{}",
                                   "[128]",
                                   "[128,128]",
                                   "[128,256]",
                                   "[0,1]",
                                   "[0,0,0,1]",
                                   "[\"dense\",\"sparse\"]",
                                   "\"\"",
                                   "\"silu\"",
                                   "\"gelu\"",
                                   "\"gelu_pytorch_tanh\"",
                                   "\"situ\"",
                                   "\"swigluoai\"",
                                   "\"none\"",
                                   "\"int\"",
                                   "\"float\"",
                                   "\"group\"",
                                   "\"channel\"",
                                   "\"weight\"",
                                   "\"w4afp8\"",
                                   "\"my-w4afp8\"",
                                   "\"gptq\"",
                                   "\"awq\"",
                                   "\"mxfp4\"",
                                   "\"fp8\"",
                                   "\"compressed-tensors\"",
                                   "\"modelopt\"",
                                   "\"w4a8_awq\"",
                                   "\"NVFP4\"",
                                   "\"W4A8_AWQ\"",
                                   "\"MIXED_PRECISION\"",
                                   "\"pack-quantized\"",
                                   "\"nvfp4-pack-quantized\"",
                                   "\"dynamic\"",
                                   "\"static\"",
                                   "[\"Linear\"]",
                                   "[\"re:.*experts.*\"]",
                                   "[\"re:(\"]",
                                   "[\"mlp.experts\"]"};

constexpr const char* kBases[] = {
    R"({"model_type": "deepseek_v3", "hidden_size": 256, "moe_intermediate_size": 128,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 3,
        "num_hidden_layers": 4, "routed_scaling_factor": 2.5, "hidden_act": "silu",
        "quantization_config": {"quant_method": "w4afp8", "group_size": 128}})",
    R"({"model_type": "kimi_k25", "text_config": {"hidden_size": 256, "hidden_act": "silu",
        "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_token": 2,
        "num_hidden_layers": 4, "first_k_dense_replace": 3, "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int",
        "symmetric": true, "group_size": 32, "strategy": "group"}, "input_activations": null}}}}})",
    R"({"hidden_size": 256, "intermediate_size": 128, "num_local_experts": 8, "hidden_act": "silu",
        "num_experts_per_tok": 2, "num_hidden_layers": 4})",
    R"({"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "quantization_config": {"quant_method": "fp8",
        "activation_scheme": "dynamic", "weight_block_size": [128, 128]}})"};

constexpr const char* kAlgos[] = {
    R"({"quantization": {"quant_algo": "MIXED_PRECISION"}})",
    R"({"quantization": {"quant_algo": "W4A8_AWQ", "group_size": 128, "has_zero_point": false}})"};

constexpr const char* kIndex =
    R"({"metadata": {"total_size": 0}, "weight_map": {"model.norm.weight": "b.safetensors",
        "model.layers.3.mlp.experts.0.gate_proj.weight": "a.safetensors"}})";

/// An object of the tree, chosen by the input: the whole, or one that lies in it.
Json& descend(Json& tree, Input& input) {
  Json* here = &tree;
  for (int depth = input.byte() % 5; depth > 0; --depth) {
    std::vector<Json*> inner;
    for (auto& [key, value] : here->items()) {
      if (value.is_object() && !value.empty()) inner.push_back(&value);
    }
    if (inner.empty()) break;
    here = inner[input.byte() % inner.size()];
  }
  return *here;
}

/// One edit of a tree.
void edit_tree(Json& tree, Input& input) {
  Json& object = descend(tree, input);
  if (!object.is_object()) return;
  const std::string key = input.pick(kKeys);
  switch (input.byte() % 6) {
    case 0:
    case 1:  // Unparsable values, such as 1e999, come with the raw edits.
      if (Json value = Json::parse(input.pick(kValues), nullptr, false); !value.is_discarded()) {
        object[key] = std::move(value);
      }
      break;
    case 2:
      object.erase(key);
      break;
    case 3:  // Another spelling of the key, or another key.
      if (object.contains(key)) {
        Json value = object[key];
        object.erase(key);
        object[input.pick(kKeys)] = std::move(value);
      }
      break;
    case 4:  // Into a language model's config.
      if (object.contains(key)) tree["text_config"][key] = object[key];
      break;
    default:  // A second object beside the first.
      if (object.contains("quantization_config")) {
        tree["text_config"]["quantization_config"] = object["quantization_config"];
      }
  }
}

/// One edit of a text, which need not be JSON afterwards.
void edit_text(std::string& text, Input& input) {
  if (text.empty()) return;
  const std::size_t at = (input.byte() * std::size_t{256} + input.byte()) % text.size();
  switch (input.byte() % 5) {
    case 0:
      text[at] = static_cast<char>(input.byte());
      break;
    case 1:
      text.erase(at, 1U + input.byte() % 8U);
      break;
    case 2:
      text.insert(at, input.pick(kValues));
      break;
    case 3:
      text.insert(at, std::string("\"") + input.pick(kKeys) + "\":");
      break;
    default:
      text.resize(at);
  }
}

Texts edit(Input& input) {
  const std::uint8_t start = input.byte();
  static const auto parse_all = [](const auto& texts) {
    std::vector<Json> trees;
    for (const char* const text : texts) trees.push_back(Json::parse(text));
    return trees;
  };
  static const std::vector<Json> bases = parse_all(kBases), algos = parse_all(kAlgos);
  static const Json sound_index = Json::parse(kIndex);
  Json config = bases[start % bases.size()], algo, index = sound_index;
  if (start & 0x40) algo = algos[start >> 7];
  const std::size_t num_raw = input.byte() % 4;
  for (std::size_t num_edits = input.byte() % 16; num_edits > 0 && !input.is_empty(); --num_edits) {
    const std::uint8_t which = input.byte() % 8;
    edit_tree(which == 7 ? index : which == 6 && !algo.is_null() ? algo : config, input);
  }
  Texts texts = {.config = config.dump(), .algo = {}, .index = index.dump()};
  if (!algo.is_null()) texts.algo = algo.dump();
  for (std::size_t i = 0; i < num_raw && !input.is_empty(); ++i) {
    const std::uint8_t which = input.byte() % 4;
    edit_text(which == 0 ? texts.index : which == 1 ? texts.algo : texts.config, input);
  }
  return texts;
}

/// A refusal has one of these codes; anything else is a defect.
void check_code(const sluice::Error& error) {
  if (error.code() != sluice::ErrorCode::kCorruptFile &&
      error.code() != sluice::ErrorCode::kUnsupported) {
    std::abort();
  }
}

/// One expert's gate under the names of both formats, for the recognisers to look at.
sluice::TensorIndex small_index() {
  sluice::TensorIndex index;
  const std::string stem = "model.layers.3.mlp.experts.0.gate_proj.";
  sluice::ExpertTensors expert;
  for (const auto& [what, dtype] : {std::pair{"weight", "I8"},
                                    {"weight_scale_inv", "F32"},
                                    {"weight_packed", "I32"},
                                    {"weight_scale", "BF16"}}) {
    sluice::TensorRef tensor;
    tensor.entry.name = stem + what;
    tensor.entry.dtype = dtype;
    expert.parts.push_back({.name = std::string("gate_proj.") + what, .tensor = tensor});
  }
  index.layers[3].experts.push_back(std::move(expert));
  return index;
}

sluice::fuzz::Tally counts;

void check_config(const Texts& texts) {
  static const sluice::TensorIndex index = small_index();
  try {
    std::optional<sluice::ConfigText> algo;
    if (!texts.algo.empty()) algo = {.text = texts.algo, .name = "hf_quant_config.json"};
    const sluice::ModelConfig config =
        sluice::parse_model_config({.text = texts.config, .name = "config.json"}, algo);
    if (!sluice::fuzz::means_the_same(texts, config)) std::abort();
    const sluice::Recognised found = sluice::recognise(
        {.config = config.quantization, .index = index, .geometry = config.geometry});
    if (!sluice::fuzz::is_declared(texts, *found.format)) std::abort();
    ++counts.accepted;
  } catch (const sluice::Error& error) {
    check_code(error);
    ++counts.refused;
  }
}

void check_index(const Texts& texts) {
  try {
    const sluice::WeightMap map = sluice::parse_weight_map(texts.index, "index");
    if (!sluice::fuzz::means_the_same(texts, map)) std::abort();
  } catch (const sluice::Error& error) {
    check_code(error);
  }
}

}  // namespace

const sluice::fuzz::Tally& sluice::fuzz::tally() noexcept {
  return counts;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const Texts texts = edit(input);
  check_config(texts);
  check_index(texts);
  return 0;
}
