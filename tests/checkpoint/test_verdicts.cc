// One table of small checkpoints over {prefix, container, stem, storage, scale orientation, scale
// faults, index faults, config keys, activation}, shaped after public reports: each loads the right
// weights, loads them with the right warnings, or is refused with the right code and words.
#include <algorithm>
#include <optional>
#include <set>
#include <span>
#include <sstream>

#include "spelled_checks.h"
#include "verdict_faults.h"
#include "verdict_rows.h"

namespace sluice {
namespace {

using testing::faults;
using testing::SpelledFiles;
using testing::Spelling;
using testing::Storage;
using testing::TempDir;
using testing::VerdictRow;

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  return words;
}

Spelling spelling_of(const VerdictRow& row) {
  static const std::map<std::string, std::function<void(Spelling&)>> words = {
      {"mlm", [](Spelling& s) { s.prefix = "model.language_model.layers"; }},
      {"lmm", [](Spelling& s) { s.prefix = "language_model.model.layers"; }},
      {"lm", [](Spelling& s) { s.prefix = "language_model.layers"; }},
      {"bare", [](Spelling& s) { s.prefix = "layers"; }},
      {"blocks", [](Spelling& s) { s.prefix = "decoder.blocks"; }},
      {"bsm", [](Spelling& s) { s.container = "block_sparse_moe.experts"; }},
      {"ffn", [](Spelling& s) { s.container = "ffn.experts"; }},
      {"w123", [](Spelling& s) { s.has_numbers = true; }},
      {"u8", [](Spelling& s) { s.storage = Storage::kW4afp8U8; }},
      {"u8+8", [](Spelling& s) { s.storage = Storage::kW4afp8U8Offset; }},
      {"i32", [](Spelling& s) { s.storage = Storage::kWords; }},
      {"ct-u8", [](Spelling& s) { s.storage = Storage::kBytesSigned; }},
      {"ct-u8+8", [](Spelling& s) { s.storage = Storage::kBytesOffset; }},
      {"bf16", [](Spelling& s) { s.scale_dtype = "BF16"; }},
      {"f16", [](Spelling& s) { s.scale_dtype = "F16"; }},
      {"no-shape", [](Spelling& s) { s.shape_dtype = ""; }},
      {"shape-i32", [](Spelling& s) { s.shape_dtype = "I32"; }}};
  Spelling spelling;
  for (const std::string& word : words_of(row.files)) words.at(word)(spelling);
  return spelling;
}

void write(const VerdictRow& row, const std::filesystem::path& dir) {
  SpelledFiles files(spelling_of(row));
  const auto spoils = words_of(row.fault);
  for (const std::string& fault : spoils) faults().at(fault)(files);
  if (*row.patch) files.config.merge_patch(nlohmann::ordered_json::parse(row.patch));
  files.write(dir);
  if (std::ranges::find(spoils, "stray-junk") != spoils.end()) {
    testing::write_file(dir / "junk.safetensors", "no header at all");
  }
  if (std::ranges::find(spoils, "cut") == spoils.end()) return;
  const auto shard = dir / "1.safetensors";
  std::filesystem::resize_file(shard, std::filesystem::file_size(shard) / 2);
}

/// Empty for plain SwiGLU, which must be what experts and layer have.
std::string activation_of(const Checkpoint& checkpoint, const ExpertWeights& weights) {
  const ActivationFn fn = checkpoint.activation(SpelledFiles::kLayer);
  EXPECT_EQ(weights.geometry.activation, fn);
  EXPECT_EQ(checkpoint.geometry().activation, fn);
  return fn == ActivationFn{} ? "" : " as " + to_string(fn);
}

/// "loads", "warns: KINDS" in the order of their names, or "CODE: MESSAGE".
std::string verdict_of(const VerdictRow& row) {
  const TempDir dir;
  write(row, dir.path());
  try {
    const Checkpoint checkpoint = Checkpoint::open(dir.path());
    const ExpertWeights weights =
        checkpoint.load_experts(SpelledFiles::kLayer, 0, SpelledFiles::kNumExperts);
    std::set<std::string> kinds;
    for (const CheckpointWarning& w : checkpoint.warnings()) kinds.insert(w.kind);
    for (const CheckpointWarning& w : checkpoint.warnings(SpelledFiles::kLayer)) {
      kinds.insert(w.kind);
    }
    // What a fault did not touch is as it was written.
    if (!testing::changes_weights(row.fault)) {
      testing::expect_weights(checkpoint);
    }
    std::string text = kinds.empty() ? "loads" : "warns:";
    for (const std::string& kind : kinds) text += " " + kind;
    return text + activation_of(checkpoint, weights);
  } catch (const Error& error) {
    const char* const code = error.code() == ErrorCode::kUnsupported   ? "unsupported: "
                             : error.code() == ErrorCode::kCorruptFile ? "corrupt: "
                             : error.code() == ErrorCode::kIo          ? "io: "
                                                                       : "another code: ";
    return code + std::string(error.what());
  }
}

std::string text_of(const ModelGeometry& g) {
  std::ostringstream out;
  out << g.name << ' ' << g.num_experts << ' ' << g.num_topk << ' ' << g.hidden << ' '
      << g.intermediate << ' ' << g.group_size << ' ' << g.routed_scaling_factor << ' '
      << to_string(g.weight_format) << ' ' << to_string(g.activation);
  return out.str();
}

void expect_verdicts(std::span<const VerdictRow> rows) {
  for (const VerdictRow& row : rows) {
    SCOPED_TRACE(std::string("{") + row.files + "} {" + row.patch + "} {" + row.fault + "}");
    const std::string wanted = row.verdict, found = verdict_of(row);
    const auto colon = wanted.find(": ");
    if (wanted.starts_with("loads") || wanted.starts_with("warns")) {
      EXPECT_EQ(found, wanted);
      continue;
    }
    EXPECT_TRUE(found.starts_with(wanted.substr(0, colon + 2))) << found;
    EXPECT_THAT(found, ::testing::HasSubstr(wanted.substr(colon + 2)));
  }
}

TEST(Verdicts, Names) {
  expect_verdicts(testing::verdict_rows()[0]);
}
TEST(Verdicts, Containers) {
  expect_verdicts(testing::verdict_rows()[1]);
}
TEST(Verdicts, Scales) {
  expect_verdicts(testing::verdict_rows()[2]);
}
TEST(Verdicts, Index) {
  expect_verdicts(testing::verdict_rows()[3]);
}
TEST(Verdicts, ConfigKeys) {
  expect_verdicts(testing::verdict_rows()[4]);
}

TEST(Verdicts, Activations) {
  expect_verdicts(testing::verdict_rows()[5]);
}

/// config.json alone is read as it is beside tensors: the same words where it is refused, the same
/// model where it is not. What tensors contradict is only seen beside them.
TEST(Verdicts, ConfigAloneHasTheSame) {
  int num_refused = 0, num_described = 0;
  for (const std::span<const VerdictRow> rows : testing::verdict_rows()) {
    for (const VerdictRow& row : rows) {
      if (*row.fault || !*row.patch) continue;
      SCOPED_TRACE(std::string("{") + row.files + "} {" + row.patch + "}");
      const TempDir dir;
      write(row, dir.path());
      std::string refusal;
      std::optional<Checkpoint> checkpoint;
      try {
        checkpoint = Checkpoint::open(dir.path());
      } catch (const Error& error) {
        refusal = error.what();
      }
      try {
        const ModelDescription model = describe_model(dir / "config.json");
        ++num_described;
        if (!checkpoint) {
          EXPECT_THAT(refusal, ::testing::HasSubstr("tensor "));
          continue;
        }
        EXPECT_EQ(text_of(model.geometry), text_of(checkpoint->geometry()));
        if (model.moe_layers == checkpoint->moe_layers()) {
          EXPECT_EQ(model.activations.size(), 1U);
          EXPECT_EQ(model.activations.front(), checkpoint->activation(SpelledFiles::kLayer));
        }
        for (const CheckpointWarning& w : model.warnings) {
          EXPECT_THAT(checkpoint->warnings(),
                      ::testing::Contains(::testing::Field(&CheckpointWarning::text, w.text)));
        }
      } catch (const Error& error) {
        ++num_refused;
        EXPECT_EQ(std::string(error.what()), refusal);
      }
    }
  }
  EXPECT_GT(num_refused, 40);
  EXPECT_GT(num_described, 40);
}

/// No fault is left unused, and no case is there twice.
TEST(Verdicts, TheTableIsWhole) {
  std::set<std::string> used, cases;
  std::size_t count = 0;
  for (const std::span<const VerdictRow> rows : testing::verdict_rows()) {
    for (const VerdictRow& row : rows) {
      ++count;
      for (const std::string& fault : words_of(row.fault)) used.insert(fault);
      EXPECT_TRUE(cases.insert(std::string(row.files) + "|" + row.patch + "|" + row.fault).second)
          << row.files << " | " << row.patch << " | " << row.fault;
    }
  }
  EXPECT_GE(count, 150U);
  for (const auto& [name, spoil] : faults()) EXPECT_TRUE(used.contains(name)) << name;
}

}  // namespace
}  // namespace sluice
