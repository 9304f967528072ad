// sluice plan - what layers take on each rank, before anything is loaded; and what would fit.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "command.h"
#include "report.h"
#include "sluice/checkpoint.h"
#include "sluice/error.h"
#include "sluice/layer.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset, config, checkpoint, recipe = "direct", mode = "low-latency", backend = "cpu",
                                          scale_dtype, memory, layers = "1";
  int ranks = 1, tokens = 128;
};

/// The first of `names` that is there. Throws: naming all of them.
int field_of(const nlohmann::json& json, const std::vector<const char*>& names,
             const std::string& file) {
  std::string tried;
  for (const char* name : names) {
    tried += (tried.empty() ? "" : ", ") + std::string(name);
    const auto found = json.find(name);
    if (found == json.end() || found->is_null()) continue;
    if (!found->is_number_integer() || *found < 1 || *found > 1 << 24) {
      throw Error(ErrorCode::kCorruptFile,
                  fmt::format("{}: {} = {} is not in [1, 2^24]", file, name, found->dump()));
    }
    return found->get<int>();
  }
  throw Error(ErrorCode::kCorruptFile, fmt::format("{}: none of {} is there", file, tried));
}

/// Weights per scale as quantization_config has it; 128 where nothing is said of groups.
int group_size_of(const nlohmann::json& model, const std::string& file) {
  const auto config = model.find("quantization_config");
  if (config == model.end() || !config->is_object()) return 128;
  nlohmann::json group =
      config->value("group_size", config->value("weight_group_size", nlohmann::json()));
  if (const auto groups = config->find("config_groups");
      groups != config->end() && groups->is_object() && !groups->empty()) {
    const nlohmann::json::json_pointer at("/weights/group_size");
    if (groups->front().contains(at)) group = groups->front().at(at);
  }
  if (group.is_null() || group == 128) return 128;
  if (group == 32) return 32;
  throw Error(ErrorCode::kUnsupported,
              fmt::format("{}: quantization_config has a group_size of {}; only 32 and 128 can be "
                          "run",
                          file, group.dump()));
}

/// Geometry of any config.json, quantized or not: a plan may come before the checkpoint.
ModelGeometry read_geometry(const std::string& file) {
  std::ifstream in(file);
  nlohmann::json json = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    throw Error(ErrorCode::kCorruptFile, file + ": not a JSON object");
  }
  ModelGeometry g;
  g.group_size = group_size_of(json, file);
  for (const char* const nested : {"text_config", "language_config", "llm_config"}) {
    if (!json.contains(nested) || !json[nested].is_object()) continue;
    json = nlohmann::json(json[nested]);
    if (json.contains("quantization_config")) g.group_size = group_size_of(json, file);
    break;
  }
  const auto name = json.find("model_type");
  g.name = name != json.end() && name->is_string() ? name->get<std::string>() : "model";
  g.num_experts = field_of(json, {"n_routed_experts", "num_experts", "num_local_experts"}, file);
  g.num_topk = field_of(json, {"num_experts_per_tok", "num_experts_per_token"}, file);
  // Experts whose inputs have a latent width are narrower than the model.
  g.hidden = field_of(json, {"routed_expert_hidden_size", "moe_latent_size", "hidden_size"}, file);
  g.intermediate = field_of(json, {"moe_intermediate_size", "intermediate_size"}, file);
  return g;
}

/// "80GB", "512MB", "1.5e9": decimal units.
double parse_memory(const std::string& text) {
  std::size_t used = 0;
  double value = 0;
  try {
    value = std::stod(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  const std::string unit = text.substr(used);
  const double factor = unit.empty() || unit == "B" ? 1
                        : unit == "kB"              ? 1e3
                        : unit == "MB"              ? 1e6
                        : unit == "GB"              ? 1e9
                        : unit == "MiB"             ? 1048576.0
                        : unit == "GiB"             ? 1073741824.0
                                                    : 0;
  if (used == 0 || factor == 0 || !(value > 0)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--memory '{}' is not a size such as 80GB, 512MiB or 1e9", text));
  }
  return value * factor;
}

/// What is planned for: sizes, and the weights' scales of each layer.
struct Subject {
  ModelGeometry geometry = {};
  std::vector<DType> scale_dtypes = {};
  /// Functions of these layers, each once; empty if they are not known. No size depends on them.
  std::vector<std::string> activations = {};
};

/// The number behind --layers; 0 for "all".
int parse_layers(const std::string& text) {
  if (text == "all") return 0;
  int layers = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), layers);
  if (error != std::errc() || end != text.data() + text.size() || layers < 1 || layers > 1000) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--layers '{}' is not 'all' and not in [1, 1000]", text));
  }
  return layers;
}

/// The first `count` layers with experts, 0 = all of them: each with the scales it has.
Subject read_checkpoint(const std::string& dir, int count) {
  const Checkpoint checkpoint = Checkpoint::open(dir);
  const auto there = static_cast<int>(checkpoint.moe_layers().size());
  if (count > there) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--layers {}: {} has {} layers with experts", count, dir, there));
  }
  Subject subject{checkpoint.geometry()};
  for (int i = 0; i < (count == 0 ? there : count); ++i) {
    const int layer = checkpoint.moe_layers()[static_cast<std::size_t>(i)];
    const ExpertWeights one = checkpoint.load_experts(layer, 0, 1);
    subject.scale_dtypes.push_back(one.experts.front().gate.scales.dtype);
    std::string activation = to_string(one.geometry.activation);
    if (std::ranges::find(subject.activations, activation) == subject.activations.end()) {
      subject.activations.push_back(std::move(activation));
    }
  }
  return subject;
}

Subject read_subject(const Options& options) {
  const int given = (options.preset.empty() ? 0 : 1) + (options.config.empty() ? 0 : 1) +
                    (options.checkpoint.empty() ? 0 : 1);
  if (given != 1) {
    throw Error(ErrorCode::kInvalidArgument, "give one of --preset, --config and --checkpoint");
  }
  const int layers = parse_layers(options.layers);
  if (!options.checkpoint.empty()) {
    if (!options.scale_dtype.empty()) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--scale-dtype {}: a checkpoint's scales have the dtype they have",
                              options.scale_dtype));
    }
    return read_checkpoint(options.checkpoint, layers);
  }
  if (layers == 0) {
    throw Error(ErrorCode::kInvalidArgument,
                "--layers all is for --checkpoint; a preset or a config needs a number");
  }
  Subject subject;
  subject.scale_dtypes.assign(static_cast<std::size_t>(layers),
                              options.scale_dtype == "bf16" ? DType::kBFloat16 : DType::kFloat32);
  if (options.preset.empty()) {
    subject.geometry = read_geometry(options.config);
  } else {
    subject.geometry = preset_geometry(options.preset);
    subject.activations = {to_string(subject.geometry.activation)};
  }
  return subject;
}

/// One group of layers, for any number of tokens.
class Planner {
 public:
  Planner(const Options& options, const Subject& subject)
      : geometry_(subject.geometry),
        device_(options.backend == "cuda" ? Device::Kind::kCuda : Device::Kind::kHost),
        num_ranks_(options.ranks),
        has_low_latency_(options.mode == "both" || parse_mode(options.mode) == Mode::kLowLatency),
        has_normal_(options.mode == "both" || parse_mode(options.mode) == Mode::kNormal) {
    ModeRecipes recipes;
    if (has_low_latency_) recipes.low_latency = parse_recipe(options.recipe);
    if (has_normal_) recipes.normal = parse_recipe(options.recipe);
    for (const DType dtype : subject.scale_dtypes) {
      layers_.push_back({.recipes = recipes,
                         .weight_format = geometry_.weight_format,
                         .scale_dtype = dtype,
                         .group_size = geometry_.group_size});
    }
  }

  [[nodiscard]] LayerGroupMemory at(int tokens) const {
    LayerGroupConfig config{.geometry = geometry_};
    if (has_low_latency_) config.low_latency.max_tokens_per_rank = tokens;
    if (has_normal_) config.normal.max_tokens_per_rank = tokens;
    return LayerGroup::plan_memory(config, layers_, device_, num_ranks_);
  }

  /// The most tokens per rank that fit; 0 if none.
  [[nodiscard]] int most_tokens(double memory) const {
    constexpr int kMost = 1 << 20;
    int fits = 0, too_many = kMost + 1;
    while (too_many - fits > 1) {
      const int middle = fits + (too_many - fits) / 2;
      (static_cast<double>(at(middle).total_bytes()) <= memory ? fits : too_many) = middle;
    }
    return fits;
  }

 private:
  ModelGeometry geometry_;
  std::vector<PlannedLayer> layers_;
  Device::Kind device_;
  int num_ranks_;
  bool has_low_latency_, has_normal_;
};

void plan(const Options& options, Output& output) {
  const Subject subject = read_subject(options);
  const Planner planner(options, subject);
  const ModelGeometry& g = subject.geometry;
  const char* const scale_dtype = to_string(subject.scale_dtypes.front());
  const LayerGroupMemory m = planner.at(options.tokens);
  const auto total = static_cast<double>(m.total_bytes());
  fmt::print(
      "layers    {} of {}: {} experts, top-{}, hidden {}, intermediate {}, {} scale per {}{}{}\n",
      m.num_layers, g.name, g.num_experts, g.num_topk, g.hidden, g.intermediate, scale_dtype,
      g.group_size, subject.activations.empty() ? "" : ", activation ",
      fmt::join(subject.activations, " and "));
  fmt::print("plan      recipe {}, {} mode, {} ranks of {} experts, up to {} tokens each, {}\n",
             options.recipe, options.mode, options.ranks, g.num_experts / options.ranks,
             options.tokens, options.backend);
  Table table({"each rank", "bytes", ""});
  const auto add = [&](const char* name, double bytes) {
    table.add({name, fmt::format("{:.0f}", bytes), human_bytes(bytes)});
  };
  add("codes", static_cast<double>(m.codes_bytes));
  add("scales", static_cast<double>(m.scales_bytes));
  add("weights, prepared", static_cast<double>(m.prepared_bytes));
  add("exchange, shared", static_cast<double>(m.exchange_bytes));
  add("scratch, shared", static_cast<double>(m.scratch_bytes));
  add("total", total);
  fmt::print("{}", table.to_string());
  output.json = {{"command", "plan"},
                 {"model", g.name},
                 {"recipe", options.recipe},
                 {"mode", options.mode},
                 {"ranks", options.ranks},
                 {"tokens_per_rank", options.tokens},
                 {"layers", m.num_layers},
                 {"group_size", g.group_size},
                 {"scale_dtype", scale_dtype},
                 {"activations", subject.activations},
                 {"codes_bytes", m.codes_bytes},
                 {"scales_bytes", m.scales_bytes},
                 {"prepared_bytes", m.prepared_bytes},
                 {"exchange_bytes", m.exchange_bytes},
                 {"scratch_bytes", m.scratch_bytes},
                 {"total_bytes", m.total_bytes()}};
  if (options.memory.empty()) return;
  const double memory = parse_memory(options.memory);
  const int most = planner.most_tokens(memory);
  output.json["memory_bytes"] = memory;
  output.json["most_tokens_per_rank"] = most;
  output.json["fits"] = total <= memory;
  fmt::print("memory    {} a rank: at most {} tokens per rank fit; {} {}\n", human_bytes(memory),
             most, options.tokens, total <= memory ? "fit" : "DO NOT FIT");
  output.exit_status = total <= memory ? 0 : 1;
}

}  // namespace

void add_plan(Command& program, Output& output) {
  Command command = program.add_subcommand("plan", "Memory of layers on each rank; what would fit");
  const auto options = std::make_shared<Options>();
  command.add_option("--preset", options->preset, "Geometry by name");
  command.add_option("--config", options->config, "Geometry from a model's config.json")
      .existing_file();
  command.add_option("--checkpoint", options->checkpoint, "Geometry and scales of this checkpoint")
      .existing_directory();
  command.add_option("--ranks", options->ranks, "Expert-parallel ranks")
      .range(1, 1024)
      .shows_default();
  command.add_option("--tokens", options->tokens, "Largest number of tokens per rank")
      .range(1, 1 << 20)
      .shows_default();
  command.add_option("--recipe", options->recipe, "What is rounded where").shows_default();
  command.add_option("--mode", options->mode, "low-latency | normal | both").shows_default();
  command
      .add_option("--layers", options->layers,
                  "MoE layers, which share their buffers; all: every layer of --checkpoint")
      .shows_default();
  command.add_option("--backend", options->backend, "cpu | cuda")
      .one_of({"cpu", "cuda"})
      .shows_default();
  command
      .add_option("--scale-dtype", options->scale_dtype,
                  "f32 (default) | bf16: the weights' scales, which neither preset nor config say")
      .one_of({"f32", "bf16"});
  command.add_option("--memory", options->memory,
                     "Bytes there are on a rank, e.g. 80GB: fail if the plan does not fit");
  command.on_parsed([options, &output] { plan(*options, output); });
}

}  // namespace sluice::cli
