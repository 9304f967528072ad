#include "checkpoint/tensor_index.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <set>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "checkpoint/json_reader.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::string_view kIndexFile = "model.safetensors.index.json";
constexpr std::string_view kSuffix = ".safetensors";
/// Kimi-K2.5 and later call their text model this.
constexpr std::string_view kLanguageModel = "language_model.";

/// Takes a decimal number without leading zeros, and the text after it, off the front of `text`.
std::optional<int> take_number(std::string_view& text, std::string_view after) {
  int value = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), value);
  const auto length = static_cast<std::size_t>(end - text.data());
  if (problem != std::errc{} || value < 0 || (length > 1 && text[0] == '0')) return std::nullopt;
  if (!text.substr(length).starts_with(after)) return std::nullopt;
  text.remove_prefix(length + after.size());
  return value;
}

struct ExpertName {
  int layer = 0, expert = 0;
  std::string_view part, prefix;
};

/// Empty if `name` is no tensor of a routed expert.
std::optional<ExpertName> parse_expert_name(std::string_view name) {
  constexpr std::string_view kPrefix = "model.layers.";
  ExpertName result;
  if (name.starts_with(kLanguageModel)) {
    result.prefix = kLanguageModel;
    name.remove_prefix(kLanguageModel.size());
  }
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  const auto layer = take_number(name, ".mlp.experts.");
  if (!layer) return std::nullopt;
  const auto expert = take_number(name, ".");
  if (!expert) return std::nullopt;
  result.layer = *layer, result.expert = *expert, result.part = name;
  return result;
}

/// Where the index says a tensor is, and whether it was there.
struct MapEntry {
  std::string file;
  bool is_found = false;
};
using WeightMap = std::unordered_map<std::string, MapEntry>;  // by tensor name

WeightMap read_weight_map(const std::filesystem::path& path, std::uint64_t& digest) {
  const auto mapped = MappedFile::open(path);
  const auto bytes = mapped->bytes();
  digest = digest_bytes(bytes, digest);
  WeightMap map;
  bool has_map = false;
  JsonReader json({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path.string());
  json.object([&](const std::string& key) {
    if (key != "weight_map") return json.skip();
    has_map = true;
    json.object([&](const std::string& tensor) {
      std::string file = json.string();
      if (!file.ends_with(kSuffix) || file.find('/') != std::string::npos) {
        json.error(fmt::format("tensor {}: '{}' is not the name of a *{} file in this directory",
                               tensor, file, kSuffix));
      }
      map.emplace(tensor, MapEntry{std::move(file)});
    });
  });
  json.finish();
  if (!has_map) json.error("weight_map is missing");
  return map;
}

/// Names of the *.safetensors files of `dir`, sorted.
std::vector<std::string> list_files(const std::filesystem::path& dir) {
  std::vector<std::string> names;
  std::error_code problem;
  for (std::filesystem::directory_iterator i(dir, problem), end; !problem && i != end;
       i.increment(problem)) {
    if (i->path().extension() == kSuffix) names.push_back(i->path().filename().string());
  }
  if (problem) fail(ErrorCode::kIo, "{}: cannot list: {}", dir.string(), problem.message());
  std::ranges::sort(names);
  return names;
}

/// Collects the headers of a checkpoint's files into one index.
class IndexBuilder {
 public:
  IndexBuilder(std::filesystem::path dir, int num_experts)
      : dir_(std::move(dir)), num_experts_(num_experts) {}

  void set_weight_map(WeightMap map) { weight_map_ = std::move(map); }

  /// `is_indexed`: named by the index, or there is no index.
  void add_file(const std::string& name, bool is_indexed) {
    const auto path = dir_ / name;
    const auto file = MappedFile::open(path);
    SafetensorsHeader header = parse_safetensors_header(file->bytes(), path.string());
    index_.digest = digest_bytes(std::as_bytes(std::span(name)), index_.digest);
    const std::uint64_t size = file->bytes().size();
    index_.digest = digest_bytes(std::as_bytes(std::span(&size, 1)), index_.digest);
    index_.digest = digest_bytes(file->bytes().first(header.data_begin), index_.digest);
    index_.files.push_back(name);
    for (SafetensorsEntry& entry : header.tensors) {
      if (is_indexed) check_against_map(entry.name, name);
      add_tensor(TensorRef{file, std::move(entry), header.data_begin}, is_indexed);
    }
  }

  /// Every mapped tensor must have been found in its file.
  void check_map_is_complete() const {
    if (!weight_map_) return;
    for (const auto& [tensor, entry] : *weight_map_) {
      if (!entry.is_found) {
        fail(ErrorCode::kCorruptFile, "{}: tensor {} is missing; {} says that it is there",
             (dir_ / entry.file).string(), tensor, kIndexFile);
      }
    }
  }

  [[nodiscard]] TensorIndex take() && { return std::move(index_); }
  [[nodiscard]] std::uint64_t& digest() { return index_.digest; }

 private:
  void check_against_map(const std::string& tensor, const std::string& file) {
    if (!weight_map_) return;
    const auto at = weight_map_->find(tensor);
    if (at == weight_map_->end()) return;
    if (at->second.file != file) {
      fail(ErrorCode::kCorruptFile, "{}: holds tensor {}, which {} says is in {}",
           (dir_ / file).string(), tensor, kIndexFile, at->second.file);
    }
    at->second.is_found = true;
  }

  void add_tensor(TensorRef tensor, bool is_indexed) {
    const auto name = parse_expert_name(tensor.entry.name);
    if (!name) {
      if (is_indexed) index_.others.push_back(std::move(tensor));
      return;
    }
    if (!is_indexed && !is_input_scale(name->part)) return;
    const std::string path = tensor.file->path().string();
    if (name->expert >= num_experts_) {
      fail(ErrorCode::kCorruptFile, "{}: tensor {}: expert {} of a model with {} experts", path,
           tensor.entry.name, name->expert, num_experts_);
    }
    if (index_.layers.empty()) index_.prefix = name->prefix;
    if (name->prefix != index_.prefix) {
      fail(ErrorCode::kCorruptFile,
           "{}: tensor {}: other experts are called '{}model.layers...'; one model has one prefix",
           path, tensor.entry.name, index_.prefix);
    }
    LayerTensors& layer = index_.layers[name->layer];
    layer.experts.resize(static_cast<std::size_t>(num_experts_));
    ExpertTensors& expert = layer.experts[static_cast<std::size_t>(name->expert)];
    const TensorRef* const other = expert.find(name->part);
    if (!other) {
      expert.parts.push_back({.name = std::string(name->part), .tensor = std::move(tensor)});
      return;
    }
    // The same input scale in a shard and again in act_scales.safetensors does no harm.
    const bool is_same = is_input_scale(name->part) && other->entry.dtype == tensor.entry.dtype &&
                         std::ranges::equal(other->bytes(), tensor.bytes());
    if (!is_same) {
      fail(ErrorCode::kCorruptFile, "{}: tensor {} is also in {}", path, tensor.entry.name,
           other->file->path().string());
    }
  }

  std::filesystem::path dir_;
  int num_experts_;
  std::optional<WeightMap> weight_map_;
  TensorIndex index_;
};

}  // namespace

bool is_input_scale(std::string_view part) noexcept {
  return part.ends_with(".input_scale");
}

const TensorRef* ExpertTensors::find(std::string_view part) const noexcept {
  for (const Part& p : parts) {
    if (p.name == part) return &p.tensor;
  }
  return nullptr;
}

std::string tensor_name(int layer, int expert, std::string_view part) {
  return fmt::format("model.layers.{}.mlp.experts.{}.{}", layer, expert, part);
}

std::string place(const TensorRef& tensor) {
  return fmt::format("{}: tensor {}", tensor.file->path().string(), tensor.entry.name);
}

std::uint64_t digest_bytes(std::span<const std::byte> bytes, std::uint64_t seed) noexcept {
  for (const std::byte b : bytes) seed = (seed ^ static_cast<std::uint64_t>(b)) * 0x100000001b3U;
  return seed;
}

TensorIndex read_tensor_index(const std::filesystem::path& dir, int num_experts) {
  IndexBuilder builder(dir, num_experts);
  std::vector<std::string> files = list_files(dir);
  if (files.empty()) fail(ErrorCode::kIo, "{}: no *{} file", dir.string(), kSuffix);

  std::set<std::string> indexed(files.begin(), files.end());
  if (const auto path = dir / kIndexFile; std::filesystem::exists(path)) {
    WeightMap map = read_weight_map(path, builder.digest());
    indexed.clear();
    for (const auto& [tensor, entry] : map) indexed.insert(entry.file);
    builder.set_weight_map(std::move(map));
    for (const std::string& file : indexed) {
      if (!std::ranges::binary_search(files, file)) {
        fail(ErrorCode::kIo, "{}: missing; {} names it", (dir / file).string(), kIndexFile);
      }
    }
  }
  for (const std::string& file : files) builder.add_file(file, indexed.contains(file));
  builder.check_map_is_complete();
  TensorIndex index = std::move(builder).take();
  // A layer of input scales alone has no experts to run.
  std::erase_if(index.layers, [](const auto& layer) {
    return std::ranges::none_of(layer.second.experts, [](const ExpertTensors& expert) {
      return std::ranges::any_of(expert.parts,
                                 [](const auto& part) { return !is_input_scale(part.name); });
    });
  });
  return index;
}

}  // namespace sluice
