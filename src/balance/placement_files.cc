#include "sluice/placement_files.h"

#include <fmt/core.h>

#include <algorithm>
#include <limits>
#include <string>
#include <string_view>

#include "checkpoint/json_reader.h"
#include "core/fail.h"
#include "core/regular_file.h"
#include "core/write_text.h"

namespace sluice {
namespace {

constexpr std::string_view kRowsFormat = "sluice-expert-rows";
constexpr std::string_view kPlacementFormat = "sluice-placement";
constexpr std::uint64_t kVersion = 1;
constexpr std::uint64_t kMaxLayer = 100'000;
constexpr std::uint64_t kMaxRanks = Placement::kMaxSlots;
/// Of all experts and steps of a layer: sums of them are exact, as integers and as doubles.
constexpr std::int64_t kMaxRows = std::int64_t{1} << 53;

/// What both kinds of files are: an object with format, version, numbers and layers.
class FileReader {
 public:
  FileReader(const std::filesystem::path& path, std::string_view format)
      : format_(format), text_(read_text(path)), json_(text_, path.string()) {}

  [[nodiscard]] JsonReader& json() { return json_; }

  /// `member(key)` consumes the value of a key that it knows, and says whether it did. Each of
  /// `required` must occur.
  template <class Member>
  void object(std::initializer_list<std::string_view> required, Member&& member) {
    std::vector<std::string_view> missing(required);
    json_.object([&](const std::string& key) {
      std::erase(missing, key);
      if (member(key)) return;
      check_kind(key);
      json_.error(fmt::format("key '{}' is unknown here", key));
    });
    if (missing.empty()) return;
    check_kind({});
    json_.error(fmt::format("key '{}' is missing", missing.front()));
  }

  [[nodiscard]] std::uint64_t number(const char* name, std::uint64_t low, std::uint64_t high) {
    if (json_.peek() != JsonReader::Kind::kNumber) {
      json_.error(fmt::format("{} should be a number", name));
    }
    const std::uint64_t value = json_.unsigned_integer();
    if (value < low || value > high) {
      json_.error(fmt::format("{} {} is not in [{}, {}]", name, value, low, high));
    }
    return value;
  }
  [[nodiscard]] int integer(const char* name, std::uint64_t low, std::uint64_t high) {
    return static_cast<int>(number(name, low, high));
  }

  /// The keys that both kinds begin with.
  [[nodiscard]] bool read_header(const std::string& key) {
    if (key == "format") {
      if (const std::string found = json_.string(); found != format_) {
        json_.beyond_limit(fmt::format("format '{}', expected '{}'", found, format_));
      }
      has_format_ = true;
      return true;
    }
    if (key != "version") return false;
    if (const std::uint64_t version = json_.unsigned_integer(); version != kVersion) {
      json_.beyond_limit(
          fmt::format("version {}; this Sluice reads version {}", version, kVersion));
    }
    return true;
  }

 private:
  /// A file that does not say that it is of this kind is sound, and another one.
  void check_kind(const std::string& key) {
    if (has_format_) return;
    json_.beyond_limit(fmt::format("is no file of format '{}': {}", format_,
                                   key.empty() ? "no key says so" : "key '" + key + "'"));
  }

  std::string_view format_;
  std::string text_;
  JsonReader json_;
  bool has_format_ = false;
};

/// Layers come once, so that nobody has to guess which of two is meant.
template <class Layer>
void add_layer(FileReader& file, std::vector<Layer>& layers, Layer layer) {
  if (std::ranges::find(layers, layer.layer, &Layer::layer) != layers.end()) {
    file.json().error(fmt::format("layer {} is there twice", layer.layer));
  }
  layers.push_back(std::move(layer));
}

std::vector<std::int64_t> read_step(FileReader& file) {
  std::vector<std::int64_t> rows;
  file.json().array([&] {
    rows.push_back(static_cast<std::int64_t>(
        file.number("rows of an expert", 0, std::numeric_limits<std::int64_t>::max())));
  });
  return rows;
}

LayerRows read_layer_rows(FileReader& file) {
  LayerRows layer;
  file.object({"layer", "steps"}, [&](const std::string& key) {
    if (key == "layer") {
      layer.layer = file.integer("layer", 0, kMaxLayer);
    } else if (key == "steps") {
      file.json().array([&] { layer.steps.push_back(read_step(file)); });
    } else {
      return false;
    }
    return true;
  });
  return layer;
}

/// What a reader would refuse of the numbers of layers; empty if nothing is.
template <class Layers>
std::string problem_of_numbers(const Layers& layers) {
  std::vector<int> numbers;
  for (const auto& one : layers) {
    if (one.layer < 0 || static_cast<std::uint64_t>(one.layer) > kMaxLayer) {
      return fmt::format("layer {} is not in [0, {}]", one.layer, kMaxLayer);
    }
    numbers.push_back(one.layer);
  }
  std::ranges::sort(numbers);
  const auto twice = std::ranges::adjacent_find(numbers);
  return twice == numbers.end() ? "" : fmt::format("layer {} is there twice", *twice);
}

/// The first thing wrong with the sizes; empty if nothing is.
std::string problem_of(const ExpertRows& rows) {
  if (rows.layers.empty()) return "layers is empty";
  if (rows.num_experts <= 0 || rows.num_experts > Placement::kMaxSlots) {
    return fmt::format("num_experts {} is not in [1, {}]", rows.num_experts, Placement::kMaxSlots);
  }
  for (const LayerRows& layer : rows.layers) {
    if (layer.steps.empty()) return fmt::format("layer {}: steps is empty", layer.layer);
    if (layer.steps.size() != rows.layers.front().steps.size()) {
      return fmt::format("layer {} has {} steps, layer {} has {}", layer.layer, layer.steps.size(),
                         rows.layers.front().layer, rows.layers.front().steps.size());
    }
    std::int64_t total = 0;
    for (const std::vector<std::int64_t>& step : layer.steps) {
      if (step.size() != static_cast<std::size_t>(rows.num_experts)) {
        return fmt::format("layer {}: a step has rows of {} experts, and num_experts is {}",
                           layer.layer, step.size(), rows.num_experts);
      }
      if (std::ranges::any_of(step, [](std::int64_t n) { return n < 0; })) {
        return fmt::format("layer {}: an expert has {} rows", layer.layer,
                           *std::ranges::min_element(step));
      }
      for (const std::int64_t n : step) {
        if (n > kMaxRows - total) {
          return fmt::format("layer {}: the rows of all steps together are above 2^53 = {}",
                             layer.layer, kMaxRows);
        }
        total += n;
      }
    }
  }
  return {};
}

std::vector<int> read_slots(FileReader& file) {
  std::vector<int> slots;
  file.json().array([&] {
    if (file.json().peek() == JsonReader::Kind::kNull) {
      file.json().skip();
      slots.push_back(kEmptySlot);
    } else {
      slots.push_back(file.integer("expert of a slot", 0, Placement::kMaxSlots - 1));
    }
  });
  return slots;
}

struct RawPlacement {
  int layer = 0;
  std::vector<int> slots;
};

RawPlacement read_raw_placement(FileReader& file) {
  RawPlacement raw;
  file.object({"layer", "slot_experts"}, [&](const std::string& key) {
    if (key == "layer") {
      raw.layer = file.integer("layer", 0, kMaxLayer);
    } else if (key == "slot_experts") {
      raw.slots = read_slots(file);
    } else {
      return false;
    }
    return true;
  });
  return raw;
}

/// The texts of `parts` with `between` between them.
template <class Parts, class Text>
std::string join(const Parts& parts, const char* between, const Text& text) {
  std::string joined;
  for (const auto& part : parts) {
    if (!joined.empty()) joined += between;
    joined += text(part);
  }
  return joined;
}

/// A line for each layer: files are read by people, and compared by diff.
template <class Layers, class Text>
std::string join_layers(const Layers& layers, const Text& text) {
  const std::string lines = join(layers, ",\n", [&](const auto& layer) {
    return fmt::format("    {{\"layer\": {}, {}}}", layer.layer, text(layer));
  });
  return fmt::format("  \"layers\": [\n{}\n  ]\n}}\n", lines);
}

std::string text_of(const std::vector<std::int64_t>& step) {
  return fmt::format("[{}]", join(step, ", ", [](std::int64_t n) { return std::to_string(n); }));
}

std::string text_of(const Placement& placement) {
  return fmt::format("[{}]", join(placement.slot_experts(), ", ", [](int e) {
                       return e == kEmptySlot ? std::string("null") : std::to_string(e);
                     }));
}

}  // namespace

std::vector<std::int64_t> LayerRows::sum(int num_steps) const {
  check_argument(num_steps >= 0 && static_cast<std::size_t>(num_steps) <= steps.size(),
                 "layer {}: the last {} steps of {}", layer, num_steps, steps.size());
  const auto count = num_steps == 0 ? steps.size() : static_cast<std::size_t>(num_steps);
  std::vector<std::int64_t> total;
  for (std::size_t t = steps.size() - count; t < steps.size(); ++t) {
    total.resize(steps[t].size());
    std::ranges::transform(total, steps[t], total.begin(), std::plus{});
  }
  return total;
}

ExpertRows read_expert_rows(const std::filesystem::path& path) {
  FileReader file(path, kRowsFormat);
  ExpertRows rows;
  file.object({"format", "version", "num_experts", "layers"}, [&](const std::string& key) {
    if (key == "num_experts") {
      rows.num_experts = file.integer("num_experts", 1, Placement::kMaxSlots);
    } else if (key == "layers") {
      file.json().array([&] { add_layer(file, rows.layers, read_layer_rows(file)); });
    } else {
      return file.read_header(key);
    }
    return true;
  });
  file.json().finish();
  if (const std::string problem = problem_of(rows); !problem.empty()) file.json().error(problem);
  return rows;
}

std::vector<LayerPlacement> read_placements(const std::filesystem::path& path) {
  FileReader file(path, kPlacementFormat);
  int num_experts = 0, num_ranks = 0, num_slots = 0;
  std::vector<RawPlacement> layers;
  file.object({"format", "version", "num_experts", "num_ranks", "num_slots", "layers"},
              [&](const std::string& key) {
                if (key == "num_experts") {
                  num_experts = file.integer("num_experts", 1, Placement::kMaxSlots);
                } else if (key == "num_ranks") {
                  num_ranks = file.integer("num_ranks", 1, kMaxRanks);
                } else if (key == "num_slots") {
                  num_slots = file.integer("num_slots", 1, Placement::kMaxSlots);
                } else if (key == "layers") {
                  file.json().array([&] { add_layer(file, layers, read_raw_placement(file)); });
                } else {
                  return file.read_header(key);
                }
                return true;
              });
  file.json().finish();
  if (layers.empty()) file.json().error("layers is empty");
  std::vector<LayerPlacement> placements;
  for (RawPlacement& raw : layers) {
    if (raw.slots.size() != static_cast<std::size_t>(num_slots)) {
      file.json().error(fmt::format("layer {}: slot_experts has {} slots, and num_slots is {}",
                                    raw.layer, raw.slots.size(), num_slots));
    }
    try {
      placements.push_back(
          {raw.layer, Placement::create(num_experts, num_ranks, std::move(raw.slots))});
    } catch (const Error& error) {
      file.json().error(fmt::format("layer {}: {}", raw.layer, error.what()));
    }
  }
  return placements;
}

void write_expert_rows(const std::filesystem::path& path, const ExpertRows& rows) {
  for (const std::string& problem : {problem_of(rows), problem_of_numbers(rows.layers)}) {
    check_argument(problem.empty(), "{}: {}", path.string(), problem);
  }
  const std::string layers = join_layers(rows.layers, [](const LayerRows& layer) {
    const auto step_text = [](const std::vector<std::int64_t>& step) { return text_of(step); };
    return fmt::format("\"steps\": [{}]", join(layer.steps, ", ", step_text));
  });
  constexpr auto kText =
      "{{\n  \"format\": \"{}\",\n  \"version\": {},\n  \"num_experts\": {},\n{}";
  write_text(path, fmt::format(kText, kRowsFormat, kVersion, rows.num_experts, layers));
}

void write_placements(const std::filesystem::path& path,
                      std::span<const LayerPlacement> placements) {
  check_argument(!placements.empty(), "no placements to write to {}", path.string());
  const std::string problem = problem_of_numbers(placements);
  check_argument(problem.empty(), "{}: {}", path.string(), problem);
  const Placement& first = placements.front().placement;
  for (const LayerPlacement& one : placements) {
    check_argument(one.placement.num_experts() == first.num_experts() &&
                       one.placement.num_ranks() == first.num_ranks() &&
                       one.placement.num_slots() == first.num_slots() && first.num_slots() > 0,
                   "layers {} and {} differ in experts, ranks or slots, or have none",
                   placements.front().layer, one.layer);
  }
  const std::string layers = join_layers(placements, [](const LayerPlacement& one) {
    return fmt::format("\"slot_experts\": {}", text_of(one.placement));
  });
  constexpr auto kText =
      "{{\n  \"format\": \"{}\",\n  \"version\": {},\n  \"num_experts\": {},\n  "
      "\"num_ranks\": {},\n  \"num_slots\": {},\n{}";
  write_text(path, fmt::format(kText, kPlacementFormat, kVersion, first.num_experts(),
                               first.num_ranks(), first.num_slots(), layers));
}

}  // namespace sluice
