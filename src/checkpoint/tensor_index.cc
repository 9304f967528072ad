#include "checkpoint/tensor_index.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "checkpoint/weight_map.h"
#include "core/fail.h"

namespace sluice {
namespace {

constexpr std::string_view kSuffix = kSafetensorsSuffix;
/// Names listed in a message.
constexpr std::size_t kMaxNames = 3;

WeightMap read_weight_map(const std::filesystem::path& path, std::uint64_t& digest) {
  const std::string text = read_text(path);
  digest = digest_bytes(std::as_bytes(std::span(text)), digest);
  return parse_weight_map(text, path.string());
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

/// Of an input scale: a few bytes.
std::vector<std::byte> contents(const TensorRef& tensor) {
  std::vector<std::byte> bytes(tensor.size());
  read_tensor(tensor, 0, bytes);
  return bytes;
}

/// What `error` says of the file at `path`, without the path in front.
std::string reason_of(const Error& error, const std::filesystem::path& path) {
  const std::string text = error.what(), front = path.string() + ": ";
  return text.starts_with(front) ? text.substr(front.size()) : text;
}

/// Collects the headers of a checkpoint's files into one index.
class IndexBuilder {
 public:
  IndexBuilder(std::filesystem::path dir, int num_experts)
      : dir_(std::move(dir)), num_experts_(num_experts) {}

  void set_weight_map(WeightMap map) {
    index_.has_empty_map = map.empty();
    weight_map_ = std::move(map);
  }

  /// `is_indexed`: named by the index, or there is no index.
  void add_file(const std::string& name, bool is_indexed) {
    const auto path = dir_ / name;
    std::shared_ptr<const MappedFile> file;
    std::vector<std::byte> head;
    SafetensorsHeader header;
    try {
      file = MappedFile::open(path);
      head = read_safetensors_head(*file);
      header = parse_safetensors_header(head, file->bytes().size(), path.string());
    } catch (const Error& error) {
      if (is_indexed) throw;
      unreadable_.emplace_back(name, reason_of(error, path));
      return;
    }
    index_.digest = digest_bytes(std::as_bytes(std::span(name)), index_.digest);
    const std::uint64_t size = file->bytes().size();
    index_.digest = digest_bytes(std::as_bytes(std::span(&size, 1)), index_.digest);
    index_.digest = digest_bytes(std::span(head).first(header.data_begin), index_.digest);
    index_.files.push_back(name);
    for (SafetensorsEntry& entry : header.tensors) {
      TensorRef tensor{file, std::move(entry), header.data_begin};
      const Place where = place_of(tensor.entry.name, name);
      if (where == Place::kHere || is_input_scale(tensor.entry.name)) {
        add_tensor(std::move(tensor), where);
        continue;
      }
      if (is_indexed) (where == Place::kElsewhere ? elsewhere_ : unnamed_).add(tensor);
      if (where == Place::kNowhere && looks_like_expert(tensor.entry.name)) {
        index_.left_out.emplace(tensor.entry.name, name);
      }
    }
  }

  /// Every mapped tensor must have been found in its file.
  void check_map_is_complete() const {
    if (!weight_map_) return;
    for (const auto& [tensor, entry] : *weight_map_) {
      if (!entry.is_found) {
        fail(ErrorCode::kCorruptFile, "{}: tensor {} is missing; {} says that it is there{}",
             (dir_ / entry.file).string(), tensor, kIndexFile,
             entry.other_file.empty() ? "" : ", but it is in " + entry.other_file);
      }
    }
  }

  [[nodiscard]] TensorIndex take() && {
    for (auto& [layer, tensors] : whole_) split_whole(layer, tensors);
    if (index_.spelling.has_numbered_stems) {
      for (auto& [layer, tensors] : index_.layers) {
        for (ExpertTensors& expert : tensors.experts) {
          for (ExpertTensors::Part& part : expert.parts) part.name = canonical_part(part.name);
        }
      }
    }
    elsewhere_.report(index_, "indexed-elsewhere",
                      fmt::format("{} gives it to another file, whose tensor is used", kIndexFile));
    unnamed_.report(index_, "not-indexed",
                    fmt::format("{} does not name it, so it is left out", kIndexFile));
    input_scales_.report(
        index_, "input-scale-twice",
        fmt::format("differs from the one that {} names, which is used", kIndexFile));
    if (!unreadable_.empty()) {
      const std::size_t count = unreadable_.size();
      const auto& [name, reason] = unreadable_.front();
      index_.warnings.push_back(
          {.tensor = name,
           .text = fmt::format("cannot be read ({}) and is left out; {} does not name it{}", reason,
                               kIndexFile,
                               count > 1 ? fmt::format(" ({} files like this)", count) : ""),
           .kind = "unreadable-file",
           .count = static_cast<int>(count)});
    }
    unread_.report(index_, "unread-experts",
                   "looks like a tensor of experts, whose name is not known; it is not read");
    predictions_.report(index_, "separate-prediction-layer",
                        "of a prediction layer with a number of its own (mtp.*); not loaded");
    return std::move(index_);
  }
  [[nodiscard]] std::uint64_t& digest() { return index_.digest; }

 private:
  /// A tensor of all experts of a layer.
  struct Whole {
    std::string name;
    std::string_view prefix, container;
    TensorRef tensor;
  };

  /// In relation to the file that is being read.
  enum class Place { kHere, kElsewhere, kNowhere };

  /// Tensors of one kind that deserve one warning together.
  struct Kind {
    std::size_t count = 0;
    std::string first, file;

    void add(const TensorRef& tensor) {
      if (count++ == 0) first = tensor.entry.name, file = tensor.file->path().filename().string();
    }
    void report(TensorIndex& index, const std::string& kind, const std::string& what) const {
      if (count == 0) return;
      std::string text = fmt::format("in {}: {}", file, what);
      if (count > 1) text += fmt::format(" ({} tensors like this)", count);
      index.warnings.push_back({.tensor = first,
                                .text = std::move(text),
                                .kind = kind,
                                .count = static_cast<int>(count),
                                .is_note = kind == "separate-prediction-layer"});
    }
  };

  Place place_of(const std::string& tensor, const std::string& file) {
    if (!weight_map_) return Place::kHere;
    const auto at = weight_map_->find(tensor);
    if (at == weight_map_->end()) return Place::kNowhere;
    if (at->second.file != file) {
      at->second.other_file = file;
      return Place::kElsewhere;
    }
    at->second.is_found = true;
    return Place::kHere;
  }

  /// One checkpoint has one prefix, one container and one kind of stem.
  void check_spelling(const ExpertName& name, const TensorRef& tensor) {
    ExpertSpelling& known = index_.spelling;
    if (first_name_.empty()) {
      known.prefix = name.prefix, known.container = name.container;
      first_name_ = tensor.entry.name;
    }
    if (known.prefix != name.prefix || known.container != name.container) {
      fail(ErrorCode::kUnsupported,
           "{}: another expert's tensor is called {}; one model has one prefix and one name for "
           "its experts",
           place(tensor), first_name_);
    }
    const StemKind stem = stem_kind(name.part);
    if (stem == StemKind::kNone) return;
    if (stem_ == StemKind::kNone) {
      stem_ = stem, first_stem_ = tensor.entry.name;
      known.has_numbered_stems = stem == StemKind::kNumbers;
    }
    if (stem != stem_) {
      fail(ErrorCode::kUnsupported,
           "{}: {} is there, too; gate_proj, up_proj, down_proj and w1, w3, w2 name the same "
           "matrices, and a checkpoint has one of the two",
           place(tensor), first_stem_);
    }
  }

  void add_other(TensorRef tensor) {
    const std::string& name = tensor.entry.name;
    if (looks_like_expert(name)) {
      if (is_separate_prediction_layer(name)) predictions_.add(tensor);
      if (const auto layer = fused_experts_layer(name)) {
        const auto [first, is_new] = index_.fused.emplace(*layer, name);
        if (!is_new && is_bias(first->second) && !is_bias(name)) first->second = name;
      } else if (const auto own = layer_among_experts(name)) {
        if (!is_routing(name)) index_.strays.emplace(*own, name);
      } else if (!is_separate_prediction_layer(name)) {
        unread_.add(tensor);
      }
      if (index_.unread.size() < kMaxNames) index_.unread.push_back(name);
    }
    index_.others.push_back(std::move(tensor));
  }

  /// Tensors of all experts of one layer: each expert gets its part. Without codes among them they
  /// belong to a layout that is not read.
  void split_whole(int layer, std::vector<Whole>& tensors) {
    const bool has_codes = std::ranges::any_of(
        tensors, [](const auto& part) { return part.name.ends_with("_blocks"); });
    for (Whole& whole : tensors) {
      if (!has_codes) {
        add_other(std::move(whole.tensor));
        continue;
      }
      const SafetensorsEntry& entry = whole.tensor.entry;
      const auto count = static_cast<std::uint64_t>(num_experts_);
      if (entry.shape.empty() || entry.shape.front() != count) {
        fail(ErrorCode::kUnsupported,
             "{}: shape {}, but config.json has {} experts, which the first dimension counts",
             place(whole.tensor), to_string(entry.shape), num_experts_);
      }
      check_spelling({.layer = layer,
                      .expert = 0,
                      .part = whole.name,
                      .prefix = whole.prefix,
                      .container = whole.container},
                     whole.tensor);
      LayerTensors& made = index_.layers[layer];
      made.experts.resize(static_cast<std::size_t>(num_experts_));
      const std::uint64_t bytes = whole.tensor.size() / count;
      for (std::uint64_t e = 0; e < count; ++e) {
        TensorRef one = whole.tensor;
        one.entry.shape.erase(one.entry.shape.begin());
        one.entry.begin = entry.begin + e * bytes;
        one.entry.end = one.entry.begin + bytes;
        one.expert = static_cast<int>(e);
        made.experts[e].parts.push_back({.name = whole.name, .tensor = std::move(one)});
      }
    }
  }

  void add_tensor(TensorRef tensor, Place where) {
    if (const auto whole = parse_fused_name(tensor.entry.name); whole && where == Place::kHere) {
      std::vector<Whole>& parts = whole_[whole->layer];
      const auto other = std::ranges::find(parts, whole->part, &Whole::name);
      if (other != parts.end()) {
        fail(ErrorCode::kUnsupported, "{}: is also in {}; {} would say which of them counts",
             place(tensor), other->tensor.file->path().string(), kIndexFile);
      }
      parts.push_back(
          {std::string(whole->part), whole->prefix, whole->container, std::move(tensor)});
      return;
    }
    const auto name = parse_expert_name(tensor.entry.name);
    const std::string path = tensor.file->path().string();
    if (!name) {
      check_expert_numbers(tensor.entry.name, path);
      if (where == Place::kHere) add_other(std::move(tensor));
      return;
    }
    if (name->expert >= num_experts_) {
      fail(ErrorCode::kUnsupported,
           "{}: tensor {}: expert {} of a model with {} experts, as config.json says", path,
           tensor.entry.name, name->expert, num_experts_);
    }
    check_spelling(*name, tensor);
    LayerTensors& layer = index_.layers[name->layer];
    layer.experts.resize(static_cast<std::size_t>(num_experts_));
    ExpertTensors& expert = layer.experts[static_cast<std::size_t>(name->expert)];
    const auto other = std::ranges::find(expert.parts, name->part, &ExpertTensors::Part::name);
    if (other == expert.parts.end()) {
      expert.parts.push_back({.name = std::string(name->part), .tensor = std::move(tensor)});
      if (where == Place::kElsewhere) provisional_.insert(expert.parts.back().tensor.entry.name);
      return;
    }
    // The same input scale in a shard and again in act_scales.safetensors does no harm.
    const bool is_same = is_input_scale(name->part) &&
                         other->tensor.entry.dtype == tensor.entry.dtype &&
                         contents(other->tensor) == contents(tensor);
    const bool replaces = where == Place::kHere && provisional_.erase(tensor.entry.name) > 0;
    if (!is_same && !replaces && where != Place::kElsewhere) {
      fail(ErrorCode::kUnsupported, "{}: tensor {} is also in {}{}", path, tensor.entry.name,
           other->tensor.file->path().string(),
           weight_map_ ? "" : fmt::format("; {} would say which of them counts", kIndexFile));
    }
    if (!is_same) input_scales_.add(replaces ? other->tensor : tensor);
    if (replaces) other->tensor = std::move(tensor);
  }

  std::filesystem::path dir_;
  int num_experts_;
  std::map<int, std::vector<Whole>> whole_;
  std::optional<WeightMap> weight_map_;
  TensorIndex index_;
  std::string first_name_, first_stem_;
  StemKind stem_ = StemKind::kNone;
  /// Input scales read before the file that the index says they are in.
  std::set<std::string> provisional_;
  Kind elsewhere_, unnamed_, input_scales_, predictions_, unread_;
  /// Files that the index does not name, and what is wrong with each.
  std::vector<std::pair<std::string, std::string>> unreadable_;
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

std::string place(const TensorRef& tensor) {
  const std::string whose = tensor.expert < 0 ? "" : fmt::format(", expert {}", tensor.expert);
  return fmt::format("{}: tensor {}{}", tensor.file->path().string(), tensor.entry.name, whose);
}

void read_tensor(const TensorRef& tensor, std::uint64_t at, std::span<std::byte> out) {
  if (tensor.read_bytes != nullptr) {
    std::memcpy(out.data(), tensor.read_bytes + at, out.size());
    return;
  }
  const std::size_t got = tensor.file->read(tensor.data_begin + tensor.entry.begin + at, out);
  if (got == out.size()) return;
  fail(ErrorCode::kCorruptFile,
       "{}: {} of its {} bytes are left in the file, which has been cut since it was opened",
       place(tensor), at + got, tensor.size());
}

std::uint64_t digest_bytes(std::span<const std::byte> bytes, std::uint64_t seed) noexcept {
  for (const std::byte b : bytes) seed = (seed ^ static_cast<std::uint64_t>(b)) * 0x100000001b3U;
  return seed;
}

TensorIndex read_tensor_index(const std::filesystem::path& dir, int num_experts) {
  IndexBuilder builder(dir, num_experts);
  std::error_code ignored;  // What cannot be looked at fails when it is opened.
  std::vector<std::string> files = list_files(dir);
  if (files.empty()) fail(ErrorCode::kIo, "{}: no *{} file", dir.string(), kSuffix);
  std::set<std::string> indexed(files.begin(), files.end());
  if (const auto path = dir / kIndexFile; std::filesystem::exists(path, ignored)) {
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
