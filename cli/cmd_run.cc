// sluice run - layers of a checkpoint over R ranks: timed, counted and verified.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <optional>

#include "command.h"
#include "launch.h"
#include "layer_run.h"
#include "layers_option.h"
#include "report.h"
#include "run_hosts.h"
#include "run_rebalance.h"
#include "run_report.h"
#include "run_slots.h"
#include "run_stats.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/placement_files.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string checkpoint, layers, mode = "low-latency", recipe = "direct", backend = "cpu",
                                  transport = "inproc", routing = "uniform";
  int layer = -1, ranks = 0, repeats = 5, devices = 0;
  std::vector<std::int64_t> tokens = {32};
  std::uint64_t seed = 1;
  std::int64_t verify = 8;
  float routed_scaling_factor = 1.0f;
  bool prove = false, stats = false;
  int hosts = 1, sum_parts = 0;
  SlotOptions slots;
  std::string metrics_path, expert_rows_path;
};

std::vector<int> resolve_layers(const Options& options, const Checkpoint& checkpoint) {
  if (options.layers.empty()) {
    return {options.layer >= 0 ? options.layer : checkpoint.moe_layers().front()};
  }
  if (options.layer >= 0) {
    refuse_layers(options.layers, fmt::format("--layer {} too", options.layer));
  }
  std::vector<int> layers = parse_layers(options.layers, checkpoint.moe_layers());
  if (layers.size() > 1 && options.stats) {
    refuse_layers(options.layers, fmt::format("{} layers, but --stats is of one; --json and "
                                              "--metrics have those of all",
                                              layers.size()));
  }
  return layers;
}

LayerRunConfig resolve(const Options& options, const Environment& environment, const Launch& launch,
                       const Checkpoint& checkpoint) {
  const int num_ranks = launch.num_ranks();
  LayerRunConfig config{
      .num_ranks = num_ranks,
      .tokens = options.tokens,
      .mode = parse_mode(options.mode),
      .recipe = parse_recipe(options.recipe),
      .backend = options.backend == "cuda" ? Device::Kind::kCuda : Device::Kind::kHost,
      .num_devices = options.devices,
      .routing = parse_routing(options.routing),
      .seed = options.seed,
      .repeats = options.repeats,
      .routed_scaling_factor = options.routed_scaling_factor,
      .with_digest = options.prove,
      .environment = environment};
  config.layers = resolve_layers(options, checkpoint);
  resolve_slots(options.slots, checkpoint.geometry().num_experts, config);
  resolve_hosts(options.hosts, launch.transport_hosts(), options.sum_parts, config);
  if (config.tokens.size() == 1) {
    config.tokens.assign(static_cast<std::size_t>(num_ranks), config.tokens[0]);
  }
  if (config.tokens.size() != static_cast<std::size_t>(num_ranks)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--tokens has {} values; give one, or one for each of {} ranks",
                            config.tokens.size(), num_ranks));
  }
  if (std::accumulate(config.tokens.begin(), config.tokens.end(), std::int64_t{0}) == 0) {
    throw Error(ErrorCode::kInvalidArgument, "--tokens: no rank has a token; nothing to verify");
  }
  return config;
}

/// The recipe whose GEMM1 must see the same bytes, which travel in another format.
Recipe proving_twin(const Recipe& recipe) {
  if (const std::optional<Recipe> other = twin(recipe)) return *other;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--prove: recipe {} rounds twice; no other recipe gives the same bytes",
                          to_string(recipe)));
}

std::uint64_t digest_of(const RunResult& result) {
  std::uint64_t sum = 0;
  for (const LayerRunResult& layer : result.layers) {
    for (const RankResult& rank : layer.ranks) sum += rank.digest;
  }
  return sum;
}

/// The run with which --prove compares.
LayerRunConfig twin_of(const LayerRunConfig& config) {
  LayerRunConfig other = config;
  other.recipe = proving_twin(config.recipe);
  other.repeats = 1;
  other.rebalances = false;
  other.environment.dispatch_dtype = DispatchDtype::kAuto;
  return other;
}

bool print_identity(const LayerRunConfig& config, const RunResult& result, const RunResult& twin,
                    Output& output) {
  const LayerRunConfig other = twin_of(config);
  const std::uint64_t mine = digest_of(result), theirs = digest_of(twin);
  const bool same = mine == theirs;
  fmt::print("identity  GEMM1 input: {} {:016x}, {} {:016x}: {}\n", to_string(config.recipe), mine,
             to_string(other.recipe), theirs, same ? "the same bytes" : "DIFFERENT");
  output.json["identity"] = {{"digest", fmt::format("{:016x}", mine)},
                             {"twin", to_string(other.recipe)},
                             {"twin_digest", fmt::format("{:016x}", theirs)},
                             {"same", same}};
  return same;
}

/// ", activation A and B" of layers that do not all have plain SwiGLU.
std::string other_than_swiglu(const Checkpoint& checkpoint, const std::vector<int>& layers) {
  std::vector<std::string> names;
  for (const int layer : layers) {
    std::string name = to_string(checkpoint.activation(layer));
    if (std::ranges::find(names, name) == names.end()) names.push_back(std::move(name));
  }
  if (names == std::vector<std::string>{"swiglu"}) return {};
  return fmt::format(", activation {}", fmt::join(names, " and "));
}

void print_checkpoint(const Options& options, const LayerRunConfig& config,
                      const Checkpoint& checkpoint) {
  const ModelGeometry& g = checkpoint.geometry();
  const bool is_one = config.layers.size() == 1;
  fmt::print(
      "{}     {} of {}: {}, {} experts, top-{}, hidden {}, intermediate {}{}\n",
      is_one ? "layer" : "layers",
      is_one ? fmt::format("{}", config.layers.front()) : fmt::format("{}", config.layers.size()),
      options.checkpoint, checkpoint.format(), g.num_experts, g.num_topk, g.token_width(),
      g.inner_width(), other_than_swiglu(checkpoint, config.layers));
  const auto print = [](const std::vector<CheckpointWarning>& warnings) {
    for (const CheckpointWarning& w : warnings) {
      fmt::print("{}   {}: {}\n", w.is_note ? "note   " : "warning", w.tensor, w.text);
    }
  };
  print(checkpoint.warnings());
  for (const int layer : config.layers) print(checkpoint.warnings(layer));
}

/// One layer: everything there is to say of it.
void report_layer(const Options& options, const LayerRunConfig& config,
                  const Checkpoint& checkpoint, const LayerRunResult& result, Output& output) {
  const Summary summary = summarize(result);
  print_ranks(config, result, summary);
  output.json["layer"] = result.layer;
  output.json["activation"] = to_string(checkpoint.activation(result.layer));
  fill_json(output.json, config, result, summary);
  fmt::print("outputs   digest {:016x}\n", outputs_digest(result));
  output.json["stats"] = stats_json(result, checkpoint.geometry());
  if (options.stats) print_stats(result, checkpoint.geometry());
}

/// Several layers: a line for each, and what they take together.
void report_layers(const LayerRunConfig& config, const ModelGeometry& geometry,
                   const RunResult& result, const std::vector<VerifyReport>& verified,
                   Output& output) {
  print_layers(result, verified);
  print_passes(result);
  for (std::size_t i = 0; i < result.layers.size(); ++i) {
    nlohmann::ordered_json layer = {{"layer", result.layers[i].layer}};
    fill_json(layer, config, result.layers[i], summarize(result.layers[i]));
    layer["verify"] = to_json(verified[i]);
    layer["stats"] = stats_json(result.layers[i], geometry);
    output.json["layers"].push_back(std::move(layer));
  }
  output.json["pass_us"] = result.pass_us;
}

/// Everything after the run itself: only the reporter does this, the other ranks are gone.
void report(const Options& options, const LayerRunConfig& config, const Checkpoint& checkpoint,
            const RunResult& result, const RunResult& twin, double peak, bool has_processes,
            Output& output) {
  const LayerRunResult& first = result.layers.front();
  const bool is_one = result.layers.size() == 1;
  fmt::print("recipe    {}\n", first.recipe.describe());
  fmt::print("ranks     {} over {}, each {}; routing {}, seed {}, median of {}\n", config.num_ranks,
             options.transport, first.backend, options.routing, options.seed, config.repeats);
  output.json["command"] = "run";
  output.json["checkpoint"] = options.checkpoint;
  output.json["transport"] = options.transport;
  output.json["routing"] = options.routing;
  if (config.num_slots != 0) {
    const Placement& p = first.placement;
    fmt::print("slots     {}{}, {} on each rank\n", p.num_slots(),
               options.slots.placement.empty() ? "" : " of " + options.slots.placement,
               p.slots_per_rank());
    if (!options.slots.placement.empty()) output.json["placement"] = options.slots.placement;
    output.json["num_slots"] = p.num_slots();
  }
  output.json["seed"] = options.seed;
  print_load(config, result, output.json);
  if (is_one) report_layer(options, config, checkpoint, first, output);
  bool passed = !options.prove || print_identity(config, result, twin, output);
  std::vector<VerifyReport> verified;
  VerifyReport all;
  for (const LayerRunResult& layer : result.layers) {
    verified.push_back(verify_layer(config, checkpoint, layer, result.loads, options.verify));
    add(all, verified.back());
  }
  if (!is_one) report_layers(config, checkpoint.geometry(), result, verified, output);
  for (std::size_t i = 0; config.hosts.num_hosts() > 1 && i < result.layers.size(); ++i) {
    nlohmann::ordered_json& json = is_one ? output.json : output.json["layers"][i];
    passed =
        report_hosts(config, checkpoint.geometry(), result.layers[i], result.loads, json) && passed;
  }
  for (std::size_t i = 0; config.rebalances && i < result.layers.size(); ++i) {
    nlohmann::ordered_json& json = is_one ? output.json : output.json["layers"][i];
    passed = report_rebalance(result.layers[i], json) && passed;
  }
  print_verification(all);
  output.json["verify"] = to_json(all);
  print_memory(config, result.layers.back().ranks, peak, has_processes, output.json);
  if (!options.metrics_path.empty()) {
    write_metrics(options.metrics_path, result.layers, checkpoint.geometry());
  }
  if (!options.expert_rows_path.empty()) {
    write_expert_rows(options.expert_rows_path, expert_rows(result));
  }
  output.exit_status = passed && all.passed() ? 0 : 1;
}

/// What ranks must agree on and no layer compares, since only this program knows of it.
std::vector<Launch::Option> lab_options(const Options& options, const LayerRunConfig& config) {
  const auto yes_or_no = [](bool value) { return std::string(value ? "yes" : "no"); };
  return {{"--tokens", fmt::format("{}", fmt::join(config.tokens, ","))},
          {"--layers", fmt::format("{}", fmt::join(config.layers, ","))},
          {"--routing", options.routing},
          {"--seed", fmt::format("{}", options.seed)},
          {"--repeat", fmt::format("{}", options.repeats)},
          {"--prove", yes_or_no(options.prove)},
          {"--rebalance", yes_or_no(options.slots.rebalances)}};
}

void run(const Options& options, Output& output) {
  const Environment environment = read_environment();
  check_transport(options.transport, options.backend);
  if (ran_as_processes(options.transport, std::max(1, options.ranks), environment.peer_timeout,
                       output)) {
    return;
  }
  Launch launch(options.transport, options.ranks, environment.peer_timeout, output);
  std::optional<Checkpoint> checkpoint;
  LayerRunConfig config;
  launch.together([&] {
    checkpoint = Checkpoint::open(options.checkpoint);
    config = resolve(options, environment, launch, *checkpoint);
    if (options.prove) (void)proving_twin(config.recipe);  // Refuse before working.
    const std::string note = compare_with_real_hosts(config.hosts, launch.hosts());
    print_checkpoint(options, config, *checkpoint);
    if (!note.empty()) fmt::print("note      {}\n", note);
  });
  launch.check_alike(lab_options(options, config));
  RunResult result = run_layers(config, *checkpoint, launch);
  RunResult twin;
  if (options.prove) twin = run_layers(twin_of(config), *checkpoint, launch);
  launch.finish();
  if (!launch.is_reporter()) return;

  const double peak = peak_of_ranks(result.layers.back().ranks, launch.has_processes());
  const double read_bytes_per_s = measure_ceiling(config);  // Takes 128 MiB or more.
  for (LayerRunResult& layer : result.layers) layer.read_bytes_per_s = read_bytes_per_s;
  report(options, config, *checkpoint, result, twin, peak, launch.has_processes(), output);
}

}  // namespace

void add_run(Command& program, Output& output) {
  Command command = program.add_subcommand("run", "Run MoE layers over ranks, timed and verified");
  const auto options = std::make_shared<Options>();
  command.add_option("--checkpoint", options->checkpoint, "Checkpoint directory")
      .required()
      .existing_directory();
  command.add_option("--layer", options->layer, "Layer index; default: the first with experts")
      .non_negative();
  command
      .add_option("--layers", options->layers,
                  "Several layers on one set of buffers, by number: all, or a list such as 3,5-10")
      .not_empty();
  command
      .add_option("--ranks", options->ranks,
                  "Expert-parallel ranks; default: 1, or one for each process of a job")
      .range(1, 1024);
  command.add_option("--tokens", options->tokens, "Tokens per rank: one value, or one per rank")
      .comma_separated()
      .range(0, 1 << 20);
  command.add_option("--mode", options->mode, "low-latency | normal").shows_default();
  command.add_option("--recipe", options->recipe, "What is rounded where").shows_default();
  command.add_backend_option(options->backend);
  command
      .add_option("--devices", options->devices,
                  "GPUs of each host to spread its ranks over; default: all there are")
      .range(1, 64);
  command
      .add_option("--transport", options->transport,
                  "inproc (ranks are threads) | ipc (ranks are processes of this host, started "
                  "here, by torchrun, mpirun or srun) | mpi (ranks are the processes of mpirun) | "
                  "nccl (GPUs of processes on several hosts, started by torchrun, mpirun or srun)")
      .one_of({"inproc", "mpi", "ipc", "nccl"})
      .shows_default();
  command
      .add_option("--routing", options->routing,
                  "uniform | zipf | one-expert | dead-expert | one-hot")
      .shows_default();
  command.add_option("--seed", options->seed, "Seed of tokens and routing").shows_default();
  command.add_option("--repeat", options->repeats, "Timed repeats; the median is shown")
      .range(1, 100000)
      .shows_default();
  command.add_option("--verify", options->verify, "Tokens compared with the float64 reference")
      .range(1, 1 << 24)
      .shows_default();
  command
      .add_option("--routed-scaling-factor", options->routed_scaling_factor,
                  "Applied once, by combine")
      .positive()
      .shows_default();
  command.add_flag("--prove", options->prove,
                   "Also run the recipe's twin and compare the bytes GEMM1 consumes");
  command.add_flag("--stats", options->stats,
                   "Also print bytes, rows and waits between each pair of ranks");
  command
      .add_option("--metrics", options->metrics_path,
                  "Write the counters to FILE in Prometheus text format")
      .type_name("FILE")
      .writable_file();
  command
      .add_option("--placement", options->slots.placement,
                  "Which slot holds which expert, of each layer: a file that balance --out wrote")
      .existing_file();
  command
      .add_option("--slots", options->slots.num_slots,
                  "Slots for experts over all ranks, so that experts may repeat and move, and the "
                  "ranks need not divide them")
      .range(1, Placement::kMaxSlots);
  command
      .add_option("--hosts", options->hosts,
                  "Hosts that the ranks are on, as many on each, real ones or virtual: tokens then "
                  "cross the network once for each host; over nccl those that there are")
      .range(1, 1024)
      .shows_default();
  command
      .add_option("--sum-parts", options->sum_parts,
                  "Parts of the experts that are added up apart; default: as many as hosts. The "
                  "same bits for any number of hosts; with 1 those of one host, for more bytes")
      .range(1, Placement::kMaxSlots);
  command.add_flag(
      "--rebalance", options->slots.rebalances,
      "After the repeats of a layer, balance its experts by their rows, move them, and "
      "repeat: the outputs must be the same bits");
  command
      .add_option("--expert-rows", options->expert_rows_path,
                  "Write the rows of every expert of each layer to FILE, for balance --counts")
      .type_name("FILE")
      .writable_file();
  command.on_parsed([options, &output] { run(*options, output); });
}

}  // namespace sluice::cli
