#include "convert/other_files.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <vector>

#include "convert/journal.h"
#include "core/fail.h"
#include "core/regular_file.h"
#include "core/sha256.h"
#include "core/write_text.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;

constexpr const char* kChecksums = "SHA256SUMS";

/// Read in pieces of this size.
constexpr std::size_t kPieceBytes = std::size_t{8} << 20;

/// Python's numbers that JSON does not have, as strings and back.
constexpr std::array<std::string_view, 3> kWords = {"NaN", "-Infinity", "Infinity"};

/// No text of a model begins like this.
std::string quoted(std::string_view word) {
  return fmt::format("\"\\u0001number {}\"", word);
}

std::string with_words_quoted(std::string_view text) {
  std::string out;
  bool in_string = false;
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    if (in_string && c == '\\') out += text[at++];
    if (c == '"') in_string = !in_string;
    const auto word = std::ranges::find_if(
        kWords, [&](std::string_view w) { return !in_string && text.substr(at).starts_with(w); });
    if (word == kWords.end()) {
      out += text[at];
    } else {
      out += quoted(*word);
      at += word->size() - 1;
    }
  }
  return out;
}

std::string with_words_bare(std::string text) {
  for (const std::string_view word : kWords) {
    const std::string from = quoted(word);
    for (std::size_t at = 0; (at = text.find(from, at)) != text.npos; at += word.size()) {
      text.replace(at, from.size(), word);
    }
  }
  return text;
}

}  // namespace

std::string converted_config(const fs::path& source, const nlohmann::ordered_json& quantization,
                             const std::string& expert_type) {
  auto config = nlohmann::ordered_json::parse(with_words_quoted(read_text(source / "config.json")));
  // The objects that describe the language model; one that is null is none.
  std::vector<nlohmann::ordered_json*> parts{&config};
  for (const char* const name : {"text_config", "language_config", "llm_config"}) {
    if (config.contains(name) && config[name].is_object()) parts.push_back(&config[name]);
  }
  // Where it stands now, or where one is looked for first.
  auto* owner = &config;
  for (auto* const part : parts) {
    if (part->contains("quantization_config")) owner = part;
  }
  for (auto* const part : parts) {
    part->erase("quantization_config");
    // It says in which form the experts are, and they have another one now.
    part->erase("expert_dtype");
  }
  (*owner)["quantization_config"] = quantization;
  if (!expert_type.empty()) (*owner)["expert_dtype"] = expert_type;
  return with_words_bare(config.dump(2)) + "\n";
}

void copy_small_files(const fs::path& source, const fs::path& target) {
  constexpr std::array kExtensions = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"};
  constexpr std::array kNotCopied = {"config.json", "hf_quant_config.json", "quant_cfg.json",
                                     "model.safetensors.index.json"};
  constexpr std::uintmax_t kMaxBytes = std::uintmax_t{256} << 20;
  std::error_code problem;
  for (fs::directory_iterator i(source, problem), end; !problem && i != end; i.increment(problem)) {
    const std::string name = i->path().filename().string();
    if (!i->is_regular_file() || i->file_size() > kMaxBytes ||
        std::ranges::find(kExtensions, i->path().extension().string()) == kExtensions.end() ||
        std::ranges::find(kNotCopied, name) != kNotCopied.end()) {
      continue;
    }
    fs::copy_file(i->path(), target / name, fs::copy_options::overwrite_existing, problem);
    if (problem) break;
  }
  if (problem) {
    fail(ErrorCode::kIo, "{}: cannot copy its files: {}", source.string(), problem.message());
  }
}

void write_checksums(const fs::path& dir) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(dir)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with('.') && name.ends_with(".tmp")) {  // Of a run that was killed.
      fs::remove(entry.path());
      continue;
    }
    if (name != kChecksums && name != Journal::kFileName) names.push_back(name);
  }
  std::ranges::sort(names);
  std::string text;
  std::vector<std::byte> piece(kPieceBytes);
  for (const std::string& name : names) {
    const RegularFile file = RegularFile::open(dir / name);
    Sha256 hash;
    for (std::uint64_t at = 0;;) {
      const std::size_t got = file.read(at, piece, dir / name);
      hash.update(std::span(piece).first(got));
      if (got < piece.size()) break;
      at += got;
    }
    text += fmt::format("{}  {}\n", to_hex(hash.finish()), name);
  }
  write_text(dir / kChecksums, text);
}

}  // namespace sluice
