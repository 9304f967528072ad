// sluice bench layer - a whole layer over ranks of this host, beside its stage and its exchange.
#include <fmt/core.h>

#include <algorithm>
#include <memory>

#include "bench_runs.h"
#include "command.h"
#include "launch.h"
#include "report.h"
#include "scale_dtype.h"
#include "sluice/config.h"
#include "sluice/lab/layer_bench.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset = "r1-layer", backend = "cpu", transport = "inproc", mode = "low-latency",
              routing = "uniform", scale_dtype;
  int ranks = 2, experts = 0, hidden = 0, intermediate = 0, calls = 4, repeats = 7, devices = 0,
      copies = 1;
  std::vector<int> tokens = {1, 16, 128};
  std::uint64_t seed = 1;
};

LayerBenchConfig resolve(const Options& options) {
  LayerBenchConfig config{
      .geometry = preset_geometry(options.preset),
      .scale_dtype =
          parse_scale_dtype(preset_geometry(options.preset), options.scale_dtype, DType::kBFloat16),
      .device = options.backend == "cuda" ? Device::Kind::kCuda : Device::Kind::kHost,
      .num_ranks = options.ranks,
      .num_devices = options.devices,
      .mode = parse_mode(options.mode),
      .tokens_per_rank = options.tokens,
      .routing = parse_routing(options.routing),
      .calls = options.calls,
      .repeats = options.repeats,
      .copies = options.copies,
      .seed = options.seed};
  if (options.experts > 0) config.geometry.num_experts = options.experts;
  if (options.hidden > 0) config.geometry.hidden = options.hidden;
  if (options.intermediate > 0) config.geometry.intermediate = options.intermediate;
  return config;
}

std::string stages(const LayerBenchCase::Stages& s) {
  return us(s.dispatch_us) + " + " + us(s.experts_us) + " + " + us(s.combine_us);
}

nlohmann::ordered_json to_json(const LayerBenchCase::Stages& s) {
  return {
      {"dispatch_us", s.dispatch_us}, {"experts_us", s.experts_us}, {"combine_us", s.combine_us}};
}

void print_report(const Options& options, const LayerBenchConfig& config,
                  const LayerBenchReport& report) {
  const ModelGeometry& g = config.geometry;
  fmt::print(
      "layer     {} experts over {} ranks ({}, {} device(s)), top-{}, hidden {}, intermediate {}; "
      "direct, {} mode, {} routing\n",
      g.num_experts, options.ranks, options.transport, report.num_devices, g.num_topk, g.hidden,
      g.intermediate, options.mode, options.routing);
  fmt::print("device    {}; exchange {} on each rank\n", report.device,
             human_bytes(static_cast<double>(report.exchange_bytes)));
  fmt::print("times     us, slowest rank, medians; layers: {} in a row, {} cop{}, {} replays\n",
             options.calls, options.copies, options.copies == 1 ? "y" : "ies", options.repeats);
  Table table({"tokens/rank", "dispatch", "combine", "pair", "stage", "apart", "layer", "saved",
               "of the larger", "apart: with waits", "layer: with waits"});
  for (const LayerBenchCase& c : report.cases) {
    table.add({fmt::format("{}", c.tokens_per_rank), us(c.dispatch_us), us(c.combine_us),
               us(c.pair_us), us(c.stage_us), us(c.apart_us), us(c.overlapped_us),
               us(c.apart_us - c.overlapped_us),
               fmt::format("{:.3f}", c.overlapped_us / std::max(c.stage_us, c.pair_us)),
               stages(c.apart), stages(c.overlapped)});
  }
  fmt::print("{}", table.to_string());
  fmt::print("checked   {} elements: both ways, and replays, give the same bits\n",
             checked_elements(report.cases));
}

void fill_json(const Options& options, const LayerBenchReport& report, Output& output) {
  output.json["command"] = "bench layer";
  output.json["transport"] = options.transport;
  output.json["num_ranks"] = options.ranks;
  output.json["mode"] = options.mode;
  output.json["copies"] = options.copies;
  output.json["device"] = report.device;
  output.json["num_devices"] = report.num_devices;
  output.json["exchange_bytes"] = report.exchange_bytes;
  for (const LayerBenchCase& c : report.cases) {
    output.json["cases"].push_back({{"tokens_per_rank", c.tokens_per_rank},
                                    {"checked_elements", c.checked_elements},
                                    {"dispatch_us", c.dispatch_us},
                                    {"combine_us", c.combine_us},
                                    {"pair_us", c.pair_us},
                                    {"stage_us", c.stage_us},
                                    {"apart_us", c.apart_us},
                                    {"layer_us", c.overlapped_us},
                                    {"apart", to_json(c.apart)},
                                    {"layer", to_json(c.overlapped)}});
  }
}

/// Of the codes of one layer, in the backend's form alone.
void check_memory(const LayerBenchConfig& config) {
  if (config.device != Device::Kind::kHost) return;
  const ModelGeometry& g = config.geometry;
  require_memory(1.5 * config.copies * g.hidden * g.intermediate * g.num_experts,
                 fmt::format("the weights of --experts {} of --hidden {} and --intermediate {}",
                             g.num_experts, g.hidden, g.intermediate));
}

void run(const Options& options, Output& output) {
  const Environment environment = read_environment();
  const LayerBenchConfig config = resolve(options);
  check_memory(config);
  if (ran_as_processes(options.transport, options.ranks, environment.peer_timeout, output)) {
    return;
  }
  Launch launch(options.transport, options.ranks, environment.peer_timeout, output);
  const auto report = bench_on_ranks("bench layer", launch, config, bench_layer);
  if (!report) return;
  print_report(options, config, *report);
  fill_json(options, *report, output);
}

}  // namespace

void add_bench_layer(Command& bench, Output& output) {
  Command command = bench.add_subcommand(
      "layer",
      "A layer over ranks of this host, beside its stage and its exchange; the rows of "
      "each token are summed with and without send_from_experts, compared, then timed");
  const auto options = std::make_shared<Options>();
  command.add_backend_option(options->backend);
  command
      .add_option("--transport", options->transport,
                  "inproc (ranks are threads, on CUDA streams of one process) | ipc (ranks are "
                  "processes)")
      .one_of({"inproc", "ipc"})
      .shows_default();
  command.add_option("--ranks", options->ranks, "Expert-parallel ranks")
      .range(1, 64)
      .shows_default();
  command
      .add_option("--devices", options->devices,
                  "GPUs to spread ranks over; default: all there are")
      .range(1, 64);
  command.add_option("--preset", options->preset, "Geometry of the layer").shows_default();
  command.add_option("--experts", options->experts, "Over all ranks, instead of the preset's")
      .range(1, 4096);
  command.add_option("--hidden", options->hidden, "Instead of the preset's").range(1, 1 << 20);
  command.add_option("--intermediate", options->intermediate, "Instead of the preset's")
      .range(1, 1 << 20);
  command.add_option("--mode", options->mode, "low-latency | normal").shows_default();
  command.add_option("--tokens", options->tokens, "Tokens per rank, one case each")
      .comma_separated()
      .range(1, 1 << 16)
      .shows_default();
  command
      .add_option("--routing", options->routing,
                  "uniform | zipf | one-expert | dead-expert | one-hot")
      .shows_default();
  command.add_option("--scale-dtype", options->scale_dtype, "Of int4 weights: bf16 (default) | f32")
      .one_of({"bf16", "f32"});
  command.add_option("--calls", options->calls, "Layers of one recording")
      .range(1, 100)
      .shows_default();
  command.add_option("--repeat", options->repeats, "Replays of each recording")
      .range(1, 10000)
      .shows_default();
  command
      .add_option("--copies", options->copies,
                  "Of the layer, in memory of their own, that calls take in turn: as in a model, a "
                  "cache has nothing of the next call's weights")
      .range(1, 64)
      .shows_default();
  command.add_option("--seed", options->seed, "Seed of weights and tokens").shows_default();
  command.on_parsed([options, &output] { run(*options, output); });
}

}  // namespace sluice::cli
