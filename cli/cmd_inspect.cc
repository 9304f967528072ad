// sluice inspect - what is in a checkpoint, why we think so, and what looks wrong.
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <span>

#include "command.h"
#include "report.h"
#include "sluice/checkpoint.h"
#include "sluice/error.h"
#include "sluice/quant.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string dir;
  int max_layers = 4, max_experts = 8;
};

struct Range {
  float min = 0, median = 0, max = 0;
};

Range range_of(std::vector<float> values) {
  if (values.empty()) return {};
  std::ranges::sort(values);
  return {values.front(), values[values.size() / 2], values.back()};
}

nlohmann::ordered_json to_json(const Range& r) {
  return {{"min", r.min}, {"median", r.median}, {"max", r.max}};
}

/// At most `limit` of 0 .. count - 1, first and last included.
std::vector<int> spread(int count, int limit) {
  std::vector<int> picks;
  if (limit <= 0 || limit >= count) limit = count;
  for (int i = 0; i < limit; ++i) {
    picks.push_back(
        limit == 1 ? 0 : static_cast<int>(static_cast<std::int64_t>(count - 1) * i / (limit - 1)));
  }
  return picks;
}

/// Gathered from the sampled experts of one layer.
struct LayerSample {
  int layer = 0, num_sampled = 0;
  std::array<Range, 3> weight_scales;  // gate, up, down
  Range w1, w2, w3;
  std::optional<StaticScales> static_scales;
  std::array<std::int64_t, 16> codes{};  // by value + 8
  std::size_t expert_bytes = 0;
  DType scale_dtype = DType::kFloat32;
};

void count_codes(const TensorView& codes, std::array<std::int64_t, 16>& counts) {
  std::array<std::int64_t, 256> bytes{};
  for (const std::uint8_t byte : std::span(codes.as<std::uint8_t>(), codes.bytes())) ++bytes[byte];
  for (unsigned b = 0; b < bytes.size(); ++b) {
    counts[(b & 0xf) ^ 8] += bytes[b];
    counts[(b >> 4) ^ 8] += bytes[b];
  }
}

void append_scales(const TensorView& scales, std::vector<float>& out) {
  for (std::int64_t i = 0; i < scales.shape.num_elements(); ++i) {
    out.push_back(scales.dtype == DType::kFloat32 ? scales.as<float>()[i]
                                                  : bf16_to_float(scales.as<std::uint16_t>()[i]));
  }
}

LayerSample sample_layer(const Checkpoint& checkpoint, int layer, int max_experts) {
  LayerSample sample;
  sample.layer = layer;
  std::array<std::vector<float>, 3> scales;
  for (const int e : spread(checkpoint.geometry().num_experts, max_experts)) {
    const ExpertWeights weights = checkpoint.load_experts(layer, e, 1);
    const Expert& expert = weights.experts.front();
    const std::array matrices = {&expert.gate, &expert.up, &expert.down};
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      append_scales(matrices[i]->scales, scales[i]);
      count_codes(matrices[i]->codes, sample.codes);
    }
    sample.expert_bytes = weights.bytes();
    sample.scale_dtype = expert.gate.scales.dtype;
    sample.static_scales = weights.static_scales;
    ++sample.num_sampled;
    weights.release_pages(0);
  }
  for (std::size_t i = 0; i < scales.size(); ++i) {
    sample.weight_scales[i] = range_of(std::move(scales[i]));
  }
  std::vector<float> w1, w2, w3;
  for (const InputScales& s : checkpoint.input_scales(layer)) {
    w1.push_back(s.w1), w2.push_back(s.w2), w3.push_back(s.w3);
  }
  sample.w1 = range_of(std::move(w1));
  sample.w2 = range_of(std::move(w2));
  sample.w3 = range_of(std::move(w3));
  return sample;
}

/// Share of the sampled weights that have `value`.
double share(const LayerSample& sample, int value) {
  std::int64_t total = 0;
  for (const std::int64_t count : sample.codes) total += count;
  return static_cast<double>(sample.codes[static_cast<std::size_t>(value + 8)]) /
         static_cast<double>(total);
}

/// Weights crowd around 0, so a sample read the right way has few codes at the ends. The opposite
/// is refused when experts are loaded.
struct NibbleShares {
  double near_0 = 0;     ///< Codes -1, 0, 1.
  double near_ends = 0;  ///< Codes 7, -8, -7: what those would be, stored the other way.
  [[nodiscard]] bool is_borne_out() const { return near_0 > 2 * near_ends; }
};

NibbleShares nibble_shares(const LayerSample& s) {
  return {.near_0 = share(s, -1) + share(s, 0) + share(s, 1),
          .near_ends = share(s, 7) + share(s, -8) + share(s, -7)};
}

nlohmann::ordered_json to_json(const LayerSample& s) {
  const NibbleShares nibbles = nibble_shares(s);
  nlohmann::ordered_json json = {
      {"layer", s.layer},
      {"experts_sampled", s.num_sampled},
      {"weight_scales",
       {{"gate", to_json(s.weight_scales[0])},
        {"up", to_json(s.weight_scales[1])},
        {"down", to_json(s.weight_scales[2])}}},
      {"codes", s.codes},
      {"nibbles",
       {{"near_0", nibbles.near_0},
        {"near_ends", nibbles.near_ends},
        {"borne_out", nibbles.is_borne_out()}}},
  };
  if (s.static_scales) {
    json["input_scales"] = {{"w1", to_json(s.w1)}, {"w2", to_json(s.w2)}, {"w3", to_json(s.w3)}};
    json["static_scales"] = {{"s1", s.static_scales->s1}, {"s2", s.static_scales->s2}};
  }
  return json;
}

void print_model(const Checkpoint& checkpoint) {
  const ModelGeometry& g = checkpoint.geometry();
  const auto& layers = checkpoint.moe_layers();
  fmt::print("{}\n", checkpoint.path().string());
  fmt::print("format    {} ({})\n", checkpoint.format(), checkpoint.format_evidence());
  fmt::print("model     {}: {} experts, top-{}, hidden {}, intermediate {}, scaling factor {}\n",
             g.name, g.num_experts, g.num_topk, g.hidden, g.intermediate, g.routed_scaling_factor);
  fmt::print("layers    {} with routed experts: {}..{}\n", layers.size(), layers.front(),
             layers.back());
}

void print_head(const Checkpoint& checkpoint, const LayerSample& sample) {
  const ModelGeometry& g = checkpoint.geometry();
  const auto& layers = checkpoint.moe_layers();
  const double expert_bytes = static_cast<double>(sample.expert_bytes);
  print_model(checkpoint);
  const NibbleShares nibbles = nibble_shares(sample);
  fmt::print("nibbles   codes -1..1 are {:.1f} %, 7, -8 and -7 {:.1f} %: {}\n",
             100 * nibbles.near_0, 100 * nibbles.near_ends,
             nibbles.is_borne_out() ? "stored as the format says"
                                    : "no evidence for or against how the format stores them");
  fmt::print("weights   signed int4, {} scale per {} along K\n", to_string(sample.scale_dtype),
             g.group_size);
  fmt::print("size      {} per expert, {} per layer, {} in all\n\n", human_bytes(expert_bytes),
             human_bytes(expert_bytes * g.num_experts),
             human_bytes(expert_bytes * g.num_experts * static_cast<double>(layers.size())));
}

void print_layers(const std::vector<LayerSample>& samples, int num_experts) {
  Table table({"scales", "min", "median", "max", "of"});
  for (const LayerSample& s : samples) {
    const auto add = [&](const char* what, const Range& r, int of) {
      table.add({fmt::format("layer {} {}", s.layer, what), fmt::format("{:.4g}", r.min),
                 fmt::format("{:.4g}", r.median), fmt::format("{:.4g}", r.max),
                 fmt::format("{} of {} experts", of, num_experts)});
    };
    const char* const names[] = {"gate weights", "up weights", "down weights"};
    for (std::size_t i = 0; i < 3; ++i) add(names[i], s.weight_scales[i], s.num_sampled);
    if (!s.static_scales) continue;
    add("w1 input", s.w1, num_experts);
    add("w3 input", s.w3, num_experts);
    add("w2 input", s.w2, num_experts);
  }
  fmt::print("{}\n", table.to_string());
  for (const LayerSample& s : samples) {
    if (s.static_scales) {
      fmt::print("layer {}: s1 = {:.6g} (w1, w3), s2 = {:.6g} (w2)\n", s.layer, s.static_scales->s1,
                 s.static_scales->s2);
    }
    fmt::print("layer {}: codes 0 {:.1f} %, +-7 {:.2f} %, -8 {}\n", s.layer, 100 * share(s, 0),
               100 * (share(s, 7) + share(s, -7)),
               s.codes[0] == 0 ? "never" : fmt::format("{:.4f} %", 100 * share(s, -8)));
  }
}

/// Layers whose headers and input scales are in order; what is wrong with the others.
struct LayerCheck {
  std::vector<int> good;
  std::vector<std::string> errors;
};

LayerCheck check_layers(const Checkpoint& checkpoint) {
  LayerCheck result;
  for (const int layer : checkpoint.moe_layers()) {
    try {
      checkpoint.check(layer);
      result.good.push_back(layer);
    } catch (const Error& error) {
      // With nothing left to look at, this is the answer.
      if (layer == checkpoint.moe_layers().back() && result.good.empty()) {
        print_model(checkpoint);
        throw;
      }
      result.errors.push_back(fmt::format("layer {}: {}", layer, error.what()));
    }
  }
  return result;
}

/// "int4", or null for floats.
nlohmann::ordered_json format_json(const Checkpoint& checkpoint) {
  const std::optional<WeightFormat> format = checkpoint.weight_format();
  return format ? nlohmann::ordered_json(to_string(*format)) : nlohmann::ordered_json();
}

nlohmann::ordered_json model_json(const Options& options, const Checkpoint& checkpoint,
                                  const LayerCheck& checked) {
  const ModelGeometry& g = checkpoint.geometry();
  return {{"command", "inspect"},
          {"directory", options.dir},
          {"format", checkpoint.format()},
          {"evidence", checkpoint.format_evidence()},
          {"weight_format", format_json(checkpoint)},
          {"activation", to_string(g.activation)},
          {"identity", fmt::format("{:016x}", checkpoint.identity())},
          {"model", g.name},
          {"num_experts", g.num_experts},
          {"num_topk", g.num_topk},
          {"hidden", g.hidden},
          {"intermediate", g.intermediate},
          {"group_size", g.group_size},
          {"routed_scaling_factor", g.routed_scaling_factor},
          {"moe_layers", checkpoint.moe_layers()},
          {"errors", checked.errors}};
}

/// FP8 and BF16: headers only, for that is all a run could use.
void inspect_floats(const Options& options, const Checkpoint& checkpoint, const LayerCheck& checked,
                    Output& output) {
  print_model(checkpoint);
  fmt::print("weights   not INT4: `sluice convert --scale ...` makes INT4 of them\n\n");
  for (const std::string& error : checked.errors) fmt::print("error: {}\n", error);
  fmt::print("{} of {} layers are complete; weights were not looked at\n", checked.good.size(),
             checkpoint.moe_layers().size());
  output.json = model_json(options, checkpoint, checked);
}

/// Warnings first, then notes, then what cannot be loaded.
void print_review(const CheckpointReview& review, const LayerCheck& checked) {
  std::size_t num_notes = 0;
  for (const bool notes : {false, true}) {
    for (const CheckpointWarning& w : review.warnings) {
      if (w.is_note != notes) continue;
      fmt::print("{}: {}: {}\n", notes ? "note" : "warning", w.tensor, w.text);
      num_notes += notes;
    }
  }
  for (const std::string& error : checked.errors) fmt::print("error: {}\n", error);
  fmt::print("looked at the weights of {} experts in {} layers: {} warnings, {} notes\n",
             review.num_experts, review.num_layers, review.warnings.size() - num_notes, num_notes);
}

nlohmann::ordered_json to_json(const CheckpointReview& review) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const CheckpointWarning& w : review.warnings) {
    list.push_back({{"kind", w.kind},
                    {"severity", w.is_note ? "note" : "warning"},
                    {"count", w.count},
                    {"tensor", w.tensor},
                    {"text", w.text}});
  }
  return list;
}

bool has_unreadable(const CheckpointReview& review) {
  return std::ranges::any_of(review.warnings,
                             [](const CheckpointWarning& w) { return w.kind == "unreadable"; });
}

void inspect(const Options& options, Output& output) {
  const Checkpoint checkpoint = Checkpoint::open(options.dir);
  const LayerCheck checked = check_layers(checkpoint);
  if (!checkpoint.weight_format()) {
    if (!checked.errors.empty()) output.exit_status = exit_status(ErrorCode::kCorruptFile);
    return inspect_floats(options, checkpoint, checked, output);
  }
  std::vector<LayerSample> samples;
  CheckpointReview review;
  {
    ProgressLine line("reading " + options.dir);
    const auto picks = spread(static_cast<int>(checked.good.size()), options.max_layers);
    for (const int i : picks) {
      samples.push_back(
          sample_layer(checkpoint, checked.good[static_cast<std::size_t>(i)], options.max_experts));
      line.update(static_cast<double>(samples.size()) / static_cast<double>(picks.size() + 1));
    }
    review = checkpoint.review(checked.good);
  }
  // A checkpoint with a layer that cannot be loaded is not in order.
  if (!checked.errors.empty() || has_unreadable(review)) {
    output.exit_status = exit_status(ErrorCode::kCorruptFile);
  }
  print_head(checkpoint, samples.front());
  print_layers(samples, checkpoint.geometry().num_experts);
  print_review(review, checked);
  fmt::print("{} of {} layers are complete\n", checked.good.size(), checkpoint.moe_layers().size());

  output.json = model_json(options, checkpoint, checked);
  output.json["scale_dtype"] = to_string(samples.front().scale_dtype);
  output.json["bytes_per_expert"] = samples.front().expert_bytes;
  output.json["experts_looked_at"] = review.num_experts;
  output.json["warnings"] = to_json(review);
  for (const LayerSample& s : samples) output.json["layers"].push_back(to_json(s));
}

}  // namespace

void add_inspect(Command& program, Output& output) {
  auto options = std::make_shared<Options>();
  Command command = program.add_subcommand("inspect", "Say what is in a checkpoint");
  command.add_option("dir", options->dir, "Directory of the checkpoint").required();
  command
      .add_option("--max-layers", options->max_layers, "Layers to look at, spread evenly; 0 = all")
      .shows_default();
  command
      .add_option("--max-experts", options->max_experts,
                  "Experts per layer whose weights are read; 0 = all")
      .shows_default();
  command.on_parsed([options, &output] { inspect(*options, output); });
}

}  // namespace sluice::cli
