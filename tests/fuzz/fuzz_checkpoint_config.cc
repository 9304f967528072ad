// Fuzzes config.json, hf_quant_config.json and model.safetensors.index.json together.
//
//   input bytes --edit()--> three JSON texts --the readers--> refused: kUnsupported, and
//                                                       |     kCorruptFile where the JSON is broken
//                                                       \---> accepted: config_meaning.h agrees
//
// The edits know the structure: keys with an effect and their spellings, keys without one, nesting,
// quantization groups. After them come raw edits of the text. What the readers accept is held
// against a second reading of the same text, which knows no more than docs/checkpoints.md says: so
// a mutation that changes the meaning and is accepted with the old one is found.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "checkpoint/formats/format.h"
#include "checkpoint/model_config.h"
#include "checkpoint/weight_map.h"
#include "config_meaning.h"
#include "config_words.h"
#include "sluice/error.h"

namespace {

using Json = nlohmann::ordered_json;
using sluice::fuzz::Texts;
using namespace sluice::fuzz::words;  // NOLINT(google-build-using-namespace)

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

/// Ends the run, showing the files and what was promised of them.
[[noreturn]] void broken(const Texts& texts, const char* promise, const char* message = "") {
  std::fprintf(stderr, "%s\nconfig.json: %s\nhf_quant_config.json: %s\nindex: %s\n%s\n", promise,
               texts.config.c_str(), texts.algo.c_str(), texts.index.c_str(), message);
  std::abort();
}

/// A refusal has one of these codes; anything else is a defect.
void check_code(const Texts& texts, const sluice::Error& error) {
  if (error.code() != sluice::ErrorCode::kCorruptFile &&
      error.code() != sluice::ErrorCode::kUnsupported) {
    broken(texts, "a refusal is kCorruptFile or kUnsupported", error.what());
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
    if (!sluice::fuzz::means_the_same(texts, config)) {
      broken(texts, "what loads means what config.json says");
    }
    const sluice::Recognised found = sluice::recognise(
        {.config = config.quantization, .index = index, .geometry = config.geometry});
    sluice::check_widths(config, found.format->name(), found.format->group_size());
    if (!sluice::fuzz::is_declared(texts, *found.format)) {
      broken(texts, "a format is recognised where it is declared", found.evidence.c_str());
    }
    ++counts.accepted;
  } catch (const sluice::Error& error) {
    check_code(texts, error);
    const bool is_twice = std::string_view(error.what()).find("occurs twice") != std::string::npos;
    if (error.code() == sluice::ErrorCode::kCorruptFile && !is_twice &&
        !sluice::fuzz::may_be_corrupt(texts)) {
      broken(texts, "corrupt is what is not JSON", error.what());
    }
    ++counts.refused;
  }
}

void check_index(const Texts& texts) {
  try {
    const sluice::WeightMap map = sluice::parse_weight_map(texts.index, "index");
    if (!sluice::fuzz::means_the_same(texts, map)) {
      broken(texts, "every tensor is where the index says");
    }
  } catch (const sluice::Error& error) {
    check_code(texts, error);
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
