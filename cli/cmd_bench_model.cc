// sluice bench model - all layers of a model in one graph, for several batch sizes.
#include <fmt/core.h>

#include <memory>

#include "bench_runs.h"
#include "command.h"
#include "report.h"
#include "scale_dtype.h"
#include "sluice/backend.h"
#include "sluice/lab/model_bench.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset = "r1-slice", backend = "cpu", scale_dtype;
  std::vector<int> tokens = {1, 16, 64};
  int layers = 4, experts = 0, threads = 0, repeats = 7;
  std::uint64_t seed = 1;
};

void report_case(const ModelBenchCase& c, int num_layers, double unit_us, Table& table,
                 Output& output) {
  const auto time = [&](double us) {
    return fmt::format("{:.{}f}", us / unit_us, unit_us > 1 ? 3 : 1);
  };
  const auto above = [&](double us) { return time((us - c.stages_us) / num_layers); };
  table.add({fmt::format("{}", c.num_tokens), time(c.exchange_us), time(c.local_us),
             time(c.stages_us), above(c.exchange_us), above(c.local_us)});
  output.json["cases"].push_back({{"num_tokens", c.num_tokens},
                                  {"exchange_us", c.exchange_us},
                                  {"local_us", c.local_us},
                                  {"stages_us", c.stages_us}});
}

void bench_model_command(const Options& options, Output& output) {
  ModelBenchConfig config{.geometry = preset_geometry(options.preset),
                          .scale_dtype = parse_scale_dtype(preset_geometry(options.preset),
                                                           options.scale_dtype, DType::kBFloat16),
                          .num_layers = options.layers,
                          .num_tokens = options.tokens,
                          .repeats = options.repeats,
                          .seed = options.seed};
  if (options.experts > 0) config.geometry.num_experts = options.experts;
  const bool cuda = options.backend == "cuda";
  const auto backend = bench_backend(options.backend, options.threads);
  ProgressLine progress("bench model");
  const ModelBenchReport report =
      bench_model(config, *backend, [&](double fraction) { progress.update(fraction); });

  const ModelGeometry& g = config.geometry;
  fmt::print("layers    {} of {} experts, top-{}, hidden {}, intermediate {}, recipe direct\n",
             config.num_layers, g.num_experts, g.num_topk, g.hidden, g.intermediate);
  fmt::print("device    {}\n", report.device);
  fmt::print("times     {} of all layers, median of {}{}\n", cuda ? "us" : "ms", options.repeats,
             cuda ? " replays of a graph" : "");
  fmt::print(
      "verified  worst error {:.2f} of its bound; exchange and local call give the same bits\n",
      report.worst_error_ratio);
  const LayerGroupMemory& m = report.memory;
  fmt::print("memory    weights {}, exchange {}, scratch {}: as planned\n",
             human_bytes(static_cast<double>(m.prepared_bytes)),
             human_bytes(static_cast<double>(m.exchange_bytes)),
             human_bytes(static_cast<double>(m.scratch_bytes)));
  Table table({"tokens", "exchange", "local", "stages alone", "exchange above, a layer",
               "local above, a layer"});
  output.json["command"] = "bench model";
  output.json["device"] = report.device;
  output.json["geometry"] = {{"num_experts", g.num_experts},
                             {"num_topk", g.num_topk},
                             {"hidden", g.hidden},
                             {"intermediate", g.intermediate},
                             {"scale_dtype", scale_dtype_text(config.scale_dtype)}};
  output.json["num_layers"] = config.num_layers;
  output.json["worst_error_ratio"] = report.worst_error_ratio;
  output.json["memory"] = {{"prepared_bytes", m.prepared_bytes},
                           {"exchange_bytes", m.exchange_bytes},
                           {"scratch_bytes", m.scratch_bytes}};
  for (const ModelBenchCase& c : report.cases) {
    report_case(c, config.num_layers, cuda ? 1 : 1000, table, output);
  }
  fmt::print("{}", table.to_string());
}

}  // namespace

void add_bench_model(Command& bench, Output& output) {
  Command command = bench.add_subcommand(
      "model", "All layers of a model in one graph, for several batch sizes; checked, then timed");
  const auto options = std::make_shared<Options>();
  command.add_backend_option(options->backend);
  command.add_option("--preset", options->preset, "Geometry of a layer").shows_default();
  command.add_option("--experts", options->experts, "Experts of a layer, instead of the preset's")
      .range(1, 512);
  command.add_option("--num-layers", options->layers, "How many").range(1, 1024).shows_default();
  command.add_option("--tokens", options->tokens, "Batch sizes, a graph each")
      .comma_separated()
      .range(1, 1 << 16)
      .shows_default();
  command.add_option("--scale-dtype", options->scale_dtype, "Of int4 weights: bf16 (default) | f32")
      .one_of({"bf16", "f32"});
  command.add_option("--threads", options->threads, "CPU threads; default: all").range(1, 1024);
  command.add_option("--repeat", options->repeats, "Timed repeats")
      .range(1, 100000)
      .shows_default();
  command.add_option("--seed", options->seed, "Seed of weights and tokens").shows_default();
  command.on_parsed([options, &output] { bench_model_command(*options, output); });
}

}  // namespace sluice::cli
