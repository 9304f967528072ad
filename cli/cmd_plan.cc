// sluice plan - what layers take on each rank, before anything is loaded; what would fit; and with
// --hosts, how long a layer is to take.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "command.h"
#include "layers_option.h"
#include "plan_hosts.h"
#include "report.h"
#include "run_slots.h"
#include "scale_dtype.h"
#include "sluice/checkpoint.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/layer.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset, config, checkpoint, recipe = "direct", mode, backend, scale_dtype, memory,
                                          layers;
  int ranks = 0, num_layers = 0, slots = 0;
  std::vector<int> tokens;
  HostsOptions hosts;
};

/// "80GB", "512MB", "1.5e9": decimal units.
double parse_memory(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string unit(end, text.data() + text.size());
  const double factor = unit.empty() || unit == "B" ? 1
                        : unit == "kB"              ? 1e3
                        : unit == "MB"              ? 1e6
                        : unit == "GB"              ? 1e9
                        : unit == "MiB"             ? 1048576.0
                        : unit == "GiB"             ? 1073741824.0
                                                    : 0;
  if (error != std::errc() || factor == 0 || !(value > 0) || std::isinf(value)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--memory '{}' is not a size such as 80GB, 512MiB or 1e9", text));
  }
  return value * factor;
}

/// What is planned for: sizes, and the weights' scales of each layer.
struct Subject {
  ModelGeometry geometry = {};
  std::vector<DType> scale_dtypes = {};
  std::vector<ActivationFn> activations = {};  ///< Of these layers, each once.
  std::vector<CheckpointWarning> warnings = {};
};

/// `there`: the layers of `file` that have experts.
void check_num_layers(const Options& options, const std::string& file,
                      const std::vector<int>& there) {
  if (static_cast<std::size_t>(options.num_layers) <= there.size()) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--num-layers {}: {} has {} layers with experts", options.num_layers,
                          file, there.size()));
}

/// Those of `there` that the options name, by number or by how many; by default all.
std::vector<int> layers_of(const Options& options, const std::vector<int>& there) {
  if (!options.layers.empty()) return parse_layers(options.layers, there);
  if (options.num_layers == 0) return there;
  check_num_layers(options, options.checkpoint, there);
  return {there.begin(), there.begin() + options.num_layers};
}

/// Each layer with the scales that it has.
Subject read_checkpoint(const Options& options) {
  if (!options.scale_dtype.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--scale-dtype {}: a checkpoint's scales have the dtype they have",
                            options.scale_dtype));
  }
  const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
  Subject subject{.geometry = checkpoint.geometry(), .warnings = checkpoint.warnings()};
  for (const int layer : layers_of(options, checkpoint.moe_layers())) {
    const ExpertWeights one = checkpoint.load_experts(layer, 0, 1);
    subject.scale_dtypes.push_back(one.experts.front().gate.scales.dtype);
    const ActivationFn& activation = one.geometry.activation;
    if (std::ranges::find(subject.activations, activation) == subject.activations.end()) {
      subject.activations.push_back(activation);
    }
  }
  return subject;
}

/// How many layers of a model without files: by default all, where it says which have experts, and
/// else one. Throws: kInvalidArgument.
std::size_t count_layers(const Options& options, const std::vector<int>& there) {
  if (options.layers.empty()) {
    if (!there.empty()) check_num_layers(options, options.config, there);
    if (options.num_layers > 0) return static_cast<std::size_t>(options.num_layers);
    return std::max<std::size_t>(1, there.size());
  }
  if (!there.empty()) return parse_layers(options.layers, there).size();
  refuse_layers(options.layers,
                options.preset.empty()
                    ? "config.json does not say which layers have experts; give --num-layers"
                    : "a preset's layers have no numbers; give --num-layers");
}

Subject read_subject(const Options& options) {
  const int given = (options.preset.empty() ? 0 : 1) + (options.config.empty() ? 0 : 1) +
                    (options.checkpoint.empty() ? 0 : 1);
  if (given != 1) {
    throw Error(ErrorCode::kInvalidArgument, "give one of --preset, --config and --checkpoint");
  }
  if (!options.layers.empty() && options.num_layers > 0) {
    refuse_layers(options.layers, fmt::format("--num-layers {} too", options.num_layers));
  }
  if (!options.checkpoint.empty()) return read_checkpoint(options);
  ModelDescription model;
  if (options.preset.empty()) {
    model = describe_model(options.config);
  } else {
    model.geometry = preset_geometry(options.preset);
    model.activations = {model.geometry.activation};
  }
  const DType dtype = parse_scale_dtype(model.geometry, options.scale_dtype, DType::kFloat32);
  const std::size_t count = count_layers(options, model.moe_layers);
  return {.geometry = std::move(model.geometry),
          .scale_dtypes = std::vector<DType>(count, dtype),
          .activations = std::move(model.activations),
          .warnings = std::move(model.warnings)};
}

/// One group of layers, for any number of tokens.
class Planner {
 public:
  Planner(const Options& options, const Subject& subject)
      : geometry_(subject.geometry),
        device_(options.backend == "cuda" ? Device::Kind::kCuda : Device::Kind::kHost),
        num_ranks_(options.ranks),
        num_slots_(options.slots),
        has_low_latency_(options.mode == "both" || parse_mode(options.mode) == Mode::kLowLatency),
        has_normal_(options.mode == "both" || parse_mode(options.mode) == Mode::kNormal) {
    ModeRecipes recipes{.dispatch_dtype = read_environment().dispatch_dtype};
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
    config.num_slots = num_slots_;
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
  int num_ranks_, num_slots_;
  bool has_low_latency_, has_normal_;
};

void plan_memory(const Options& options, Output& output) {
  const Subject subject = read_subject(options);
  if (options.slots == 0) check_even(subject.geometry.num_experts, options.ranks);
  const Planner planner(options, subject);
  const ModelGeometry& g = subject.geometry;
  const char* const scales = to_string(subject.scale_dtypes.front());
  const LayerGroupMemory m = planner.at(options.tokens.front());
  const auto total = static_cast<double>(m.total_bytes());
  std::vector<std::string> activations;
  for (const ActivationFn& fn : subject.activations) activations.push_back(to_string(fn));
  fmt::print(
      "layers    {} of {}: {} experts, top-{}, hidden {}, intermediate {}, {}, {} scale per {}, "
      "activation {}\n",
      m.num_layers, g.name, g.num_experts, g.num_topk, g.token_width(), g.inner_width(),
      to_string(g.weight_format), scales, g.group_size, fmt::join(activations, " and "));
  for (const CheckpointWarning& w : subject.warnings) {
    fmt::print("{}   {}: {}\n", w.is_note ? "note   " : "warning", w.tensor, w.text);
  }
  const std::string each = options.slots == 0
                               ? fmt::format("{} experts", g.num_experts / options.ranks)
                               : fmt::format("{} slots", options.slots / options.ranks);
  fmt::print("plan      recipe {}, {} mode, {} of {}, up to {} tokens each, {}\n", options.recipe,
             options.mode, counted(options.ranks, "rank"), each, options.tokens.front(),
             options.backend);
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
                 {"slots", options.slots == 0 ? g.num_experts : options.slots},
                 {"tokens_per_rank", options.tokens.front()},
                 {"layers", m.num_layers},
                 {"group_size", g.group_size},
                 {"weight_format", to_string(g.weight_format)},
                 {"scale_dtype", scales},
                 {"activations", activations},
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
             most, options.tokens.front(), total <= memory ? "fit" : "DO NOT FIT");
  output.exit_status = total <= memory ? 0 : 1;
}

/// The defaults are those of memory, or of hosts.
void plan(Options options, Output& output) {
  if (!options.memory.empty()) (void)parse_memory(options.memory);
  const HostsOptions& hosts = options.hosts;
  if (hosts.hosts == 0) {
    const HostsOptions defaults;
    if (!hosts.routing.empty() || !hosts.counts.empty() || !hosts.set.empty() ||
        hosts.machine != defaults.machine || hosts.groups != 1 || hosts.topk_groups != 1 ||
        hosts.sum_parts != 0 || hosts.piece_tokens != 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  "--machine, --set, --routing, --counts, --groups, --topk-groups, --sum-parts and "
                  "--piece-tokens are for --hosts");
    }
    if (options.tokens.size() > 1) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--tokens has {} numbers; without --hosts it is one, the largest",
                              options.tokens.size()));
    }
    if (options.tokens.empty()) options.tokens = {128};
    if (options.mode.empty()) options.mode = "low-latency";
    if (options.backend.empty()) options.backend = "cpu";
    if (options.ranks == 0) options.ranks = 1;
    plan_memory(options, output);
    return;
  }
  if (!options.memory.empty() || !options.backend.empty() || !options.scale_dtype.empty() ||
      !options.layers.empty() || options.num_layers > 0) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "--memory, --backend, --scale-dtype, --layers and --num-layers plan memory; --hosts "
        "plans the time of one layer");
  }
  plan_hosts(hosts,
             {.geometry = read_subject(options).geometry,
              .recipe = options.recipe,
              .mode = options.mode.empty() ? "both" : options.mode,
              .ranks = options.ranks,
              .slots = options.slots,
              .tokens = options.tokens},
             output);
}

void add_hosts_options(Command& command, HostsOptions& hosts) {
  command
      .add_option("--hosts", hosts.hosts,
                  "Predict the time of a layer over so many hosts, instead of its memory")
      .range(1, 512);
  command
      .add_option("--machine", hosts.machine,
                  "--hosts: a preset, or a file such as bench exchange --calibrate writes")
      .shows_default();
  command
      .add_option("--set", hosts.set,
                  "--hosts: numbers of the machine, e.g. network_gbytes_per_s=22,overlap=1")
      .comma_separated();
  command.add_option("--routing", hosts.routing, "--hosts: uniform (default) | zipf")
      .one_of({"uniform", "zipf"});
  command
      .add_option("--counts", hosts.counts,
                  "--hosts: route as these rows of experts say, e.g. of run --expert-rows")
      .existing_file();
  command
      .add_option("--groups", hosts.groups,
                  "--hosts: groups of experts that the router chooses first; DeepSeek-R1: 8")
      .range(1, 1 << 16)
      .shows_default();
  command
      .add_option("--topk-groups", hosts.topk_groups,
                  "--hosts: how many of them a token takes; DeepSeek-R1: 4")
      .range(1, 1 << 16)
      .shows_default();
  command
      .add_option("--sum-parts", hosts.sum_parts,
                  "--hosts: order of the sum; 1 sends every row home, default: a sum for each host")
      .range(1, 1 << 16);
  command
      .add_option(
          "--piece-tokens", hosts.piece_tokens,
          "--hosts, low-latency mode: tokens that a piece for a host has room for, at least the "
          "mean; default: all of a rank's")
      .range(1, 1 << 20);
  command.add_option("--seed", hosts.seed, "--hosts: of sampled routing").shows_default();
}

}  // namespace

void add_plan(Command& program, Output& output) {
  Command command = program.add_subcommand(
      "plan", "Memory of layers on each rank, what would fit; or times over hosts");
  const auto options = std::make_shared<Options>();
  command.add_option("--preset", options->preset, "Geometry by name");
  command.add_option("--config", options->config, "Geometry from a model's config.json")
      .existing_file();
  command.add_option("--checkpoint", options->checkpoint, "Geometry and scales of this checkpoint")
      .existing_directory();
  command
      .add_option("--ranks", options->ranks,
                  "Expert-parallel ranks; default: 1, with --hosts 8 for each")
      .range(1, 4096);
  command
      .add_option("--slots", options->slots,
                  "Room for experts on all ranks together, for a placement; default: the experts")
      .range(1, 1 << 16);
  command
      .add_option("--tokens", options->tokens,
                  "Largest number of tokens per rank, default 128; with --hosts a list of numbers")
      .comma_separated()
      .range(1, 1 << 20);
  command.add_option("--recipe", options->recipe, "What is rounded where").shows_default();
  command.add_option("--mode", options->mode,
                     "low-latency (default) | normal | both, the default of --hosts");
  command
      .add_option("--layers", options->layers,
                  "Layers of --checkpoint or --config, by number: all, or a list such as 3,5-10")
      .not_empty();
  command
      .add_option("--num-layers", options->num_layers,
                  "How many layers with experts, the first ones; default: all of --checkpoint and "
                  "--config, 1 of --preset. Layers share their buffers")
      .range(1, 1000);
  command.add_option("--backend", options->backend, "cpu (default) | cuda").one_of({"cpu", "cuda"});
  command
      .add_option("--scale-dtype", options->scale_dtype,
                  "f32 (default) | bf16: the weights' scales, which neither preset nor config say")
      .one_of({"f32", "bf16"});
  command.add_option("--memory", options->memory,
                     "Bytes there are on a rank, e.g. 80GB: fail if the plan does not fit");
  add_hosts_options(command, options->hosts);
  command.on_parsed([options, &output] { plan(*options, output); });
}

}  // namespace sluice::cli
