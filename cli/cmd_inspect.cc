// sluice inspect - what is in a checkpoint, why we think so, and what looks wrong.
#include <fmt/core.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "inspect_runs.h"
#include "inspect_sample.h"
#include "report.h"
#include "sluice/checkpoint.h"
#include "sluice/error.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string dir;
  int max_layers = 4, max_experts = 8;
};

void print_model(const Checkpoint& checkpoint) {
  const ModelGeometry& g = checkpoint.geometry();
  const auto& layers = checkpoint.moe_layers();
  fmt::print("{}\n", checkpoint.path().string());
  fmt::print("format    {} ({})\n", checkpoint.format(), checkpoint.format_evidence());
  fmt::print(
      "model     {}: {} experts, top-{}, hidden {}, intermediate {}, scaling factor {}, activation "
      "{}\n",
      g.name, g.num_experts, g.num_topk, g.token_width(), g.inner_width(), g.routed_scaling_factor,
      to_string(g.activation));
  fmt::print("layers    {} with routed experts: {}\n", layers.size(), layer_list(layers));
}

void print_head(const Checkpoint& checkpoint, const LayerSample& sample) {
  const ModelGeometry& g = checkpoint.geometry();
  const auto& layers = checkpoint.moe_layers();
  const double expert_bytes = static_cast<double>(sample.expert_bytes);
  print_model(checkpoint);
  const bool is_int4 = sample.weight_format == WeightFormat::kInt4;
  if (is_int4) {
    const NibbleShares nibbles = nibble_shares(sample);
    fmt::print("nibbles   codes -1..1 are {:.1f} %, 7, -8 and -7 {:.1f} %: {}\n",
               100 * nibbles.near_0, 100 * nibbles.near_ends,
               nibbles.is_borne_out() ? "stored as the format says"
                                      : "no evidence for or against how the format stores them");
  }
  fmt::print("weights   {}, {} scale per {} along K{}\n", is_int4 ? "signed int4" : "mxfp4 (e2m1)",
             to_string(sample.scale_dtype), g.group_size,
             g.has_bias ? "; biases, which the CPU alone adds" : "");
  if (g.token_width() != g.hidden || g.inner_width() != g.intermediate) {
    fmt::print("padded    inside, to hidden {} and intermediate {}, with zeros\n", g.hidden,
               g.intermediate);
  }
  fmt::print("size      {} per expert, {} per layer, {} in all\n", human_bytes(expert_bytes),
             human_bytes(expert_bytes * g.num_experts),
             human_bytes(expert_bytes * g.num_experts * static_cast<double>(layers.size())));
}

/// Layers whose headers and input scales are in order; what is wrong with the others.
struct LayerCheck {
  std::vector<int> good;
  std::vector<std::string> errors;
  std::optional<ErrorCode> code;  ///< Of the first error, or of a corrupt file.

  void add(ErrorCode error_code, std::string text) {
    errors.push_back(std::move(text));
    if (!code || error_code == ErrorCode::kCorruptFile) code = error_code;
  }
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
      result.add(error.code(), fmt::format("layer {}: {}", layer, error.what()));
    }
  }
  return result;
}

/// "int4" or "mxfp4", or null for floats.
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
          {"hidden", g.token_width()},
          {"intermediate", g.inner_width()},
          {"group_size", g.group_size},
          {"routed_scaling_factor", g.routed_scaling_factor},
          {"moe_layers", checkpoint.moe_layers()},
          {"errors", checked.errors}};
}

/// Warnings first, then notes, then what cannot be loaded.
/// Returns the number of notes.
std::size_t print_warnings(const std::vector<CheckpointWarning>& warnings,
                           const LayerCheck& checked) {
  std::size_t num_notes = 0;
  for (const bool notes : {false, true}) {
    for (const CheckpointWarning& w : warnings) {
      if (w.is_note != notes) continue;
      fmt::print("{}: {}: {}\n", notes ? "note" : "warning", w.tensor, w.text);
      num_notes += notes;
    }
  }
  for (const std::string& error : checked.errors) fmt::print("error: {}\n", error);
  return num_notes;
}

void print_review(const CheckpointReview& review, const LayerCheck& checked) {
  const std::size_t num_notes = print_warnings(review.warnings, checked);
  fmt::print("looked at the weights of {} in {}: {}, {}\n", counted(review.num_experts, "expert"),
             counted(review.num_layers, "layer"),
             counted(review.warnings.size() - num_notes, "warning"), counted(num_notes, "note"));
}

nlohmann::ordered_json to_json(const std::vector<CheckpointWarning>& warnings) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const CheckpointWarning& w : warnings) {
    list.push_back({{"kind", w.kind},
                    {"severity", w.is_note ? "note" : "warning"},
                    {"count", w.count},
                    {"tensor", w.tensor},
                    {"text", w.text}});
  }
  return list;
}

/// FP8 and BF16: headers only, for that is all a run could use.
void inspect_floats(const Options& options, const Checkpoint& checkpoint, const LayerCheck& checked,
                    Output& output) {
  print_model(checkpoint);
  fmt::print("weights   not INT4: `sluice convert --scale ...` makes INT4 of them\n\n");
  (void)print_warnings(checkpoint.warnings(), checked);
  fmt::print("{} of {} complete; weights were not looked at\n", checked.good.size(),
             counted(checkpoint.moe_layers().size(), "layer"));
  output.json = model_json(options, checkpoint, checked);
  output.json["warnings"] = to_json(checkpoint.warnings());
}

/// What the review could not read is an error like the others, and its line is there already.
std::optional<ErrorCode> worst_code(const LayerCheck& checked, const CheckpointReview& review) {
  std::optional<ErrorCode> code = checked.code;
  for (const CheckpointWarning& w : review.warnings) {
    if (w.code && (!code || *w.code == ErrorCode::kCorruptFile)) code = w.code;
  }
  return code;
}

/// Looks into some of the layers that `checked` calls good. Those whose weights cannot be loaded go
/// to its errors.   Throws: what loading throws, if there is no layer that can be loaded.
std::vector<LayerSample> sample_layers(const Options& options, const Checkpoint& checkpoint,
                                       LayerCheck& checked, ProgressLine& line) {
  std::vector<LayerSample> samples;
  const std::vector<int> good = checked.good;
  const auto picks = spread(static_cast<int>(good.size()), options.max_layers);
  for (std::size_t i = 0; i < picks.size(); ++i) {
    const int layer = good[static_cast<std::size_t>(picks[i])];
    try {
      samples.push_back(sample_layer(checkpoint, layer, options.max_experts));
    } catch (const Error& error) {
      if (samples.empty() && i + 1 == picks.size()) {
        print_model(checkpoint);
        throw;
      }
      checked.add(error.code(), fmt::format("layer {}: {}", layer, error.what()));
      std::erase(checked.good, layer);
    }
    line.update(static_cast<double>(i + 1) / static_cast<double>(picks.size() + 1));
  }
  return samples;
}

/// Empty, with an error more, if no group of layers can have these sizes.
std::vector<RankMemory> plan(const Checkpoint& checkpoint, DType scale_dtype, LayerCheck& checked) {
  try {
    return memory_by_ranks(checkpoint, scale_dtype);
  } catch (const Error& error) {
    checked.add(error.code(), error.what());
    return {};
  }
}

void inspect(const Options& options, Output& output) {
  const Checkpoint checkpoint = Checkpoint::open(options.dir);
  LayerCheck checked = check_layers(checkpoint);
  if (!checkpoint.weight_format()) {
    if (checked.code) output.exit_status = exit_status(*checked.code);
    return inspect_floats(options, checkpoint, checked, output);
  }
  std::vector<LayerSample> samples;
  CheckpointReview review;
  {
    ProgressLine line("reading " + options.dir);
    samples = sample_layers(options, checkpoint, checked, line);
    review = checkpoint.review(checked.good);
    const auto& whole = checkpoint.warnings();
    review.warnings.insert(review.warnings.begin(), whole.begin(), whole.end());
  }
  const DType scale_dtype = samples.front().scale_dtype;
  const std::vector<RankMemory> memory = plan(checkpoint, scale_dtype, checked);
  // A checkpoint with a layer that cannot be loaded is not in order.
  const std::optional<ErrorCode> code = worst_code(checked, review);
  const bool runs = !code;
  if (code) output.exit_status = exit_status(*code);
  const std::vector<RecipeGroup> recipes = recipe_groups(checkpoint, checked.good);
  std::optional<SampledCodes> codes;  // Of int4, which has two kinds on CUDA.
  if (checkpoint.weight_format() == WeightFormat::kInt4) codes = code_kind(samples);
  const std::vector<ActivationGroup> activations = activation_groups(checkpoint, checked.good);
  print_head(checkpoint, samples.front());
  print_activations(activations);
  print_runs(recipes, codes);
  if (!memory.empty()) print_memory(memory, planned_device(checkpoint.geometry()));
  print_layers(samples, checkpoint.geometry().num_experts);
  print_review(review, checked);
  fmt::print("{} of {} can be run\n", checked.good.size(),
             counted(checkpoint.moe_layers().size(), "layer"));

  output.json = model_json(options, checkpoint, checked);
  output.json["runs"] = runs;
  output.json["scale_dtype"] = to_string(scale_dtype);
  output.json["bytes_per_expert"] = samples.front().expert_bytes;
  if (codes) output.json["codes"] = to_json(*codes);
  output.json["experts_looked_at"] = review.num_experts;
  output.json["warnings"] = to_json(review.warnings);
  for (const ActivationGroup& g : activations) output.json["activations"].push_back(to_json(g));
  for (const RecipeGroup& group : recipes) output.json["recipes"].push_back(to_json(group));
  for (const RankMemory& m : memory) output.json["memory"].push_back(to_json(m));
  for (const LayerSample& s : samples) output.json["layers"].push_back(to_json(s));
}

}  // namespace

void add_inspect(Command& program, Output& output) {
  auto options = std::make_shared<Options>();
  Command command = program.add_subcommand("inspect", "Say what is in a checkpoint");
  command.add_option("dir", options->dir, "Directory of the checkpoint").required();
  command
      .add_option("--max-layers", options->max_layers, "Layers to look at, spread evenly; 0 = all")
      .non_negative()
      .shows_default();
  command
      .add_option("--max-experts", options->max_experts,
                  "Experts per layer whose weights are read; 0 = all")
      .non_negative()
      .shows_default();
  command.on_parsed([options, &output] { inspect(*options, output); });
}

}  // namespace sluice::cli
