// sluice bench - the parts by themselves, against what the machine can do.
#include <fmt/core.h>

#include <algorithm>
#include <memory>

#include "bench_runs.h"
#include "command.h"
#include "report.h"
#include "scale_dtype.h"
#include "sluice/backend.h"
#include "sluice/lab/experts_bench.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset = "r1-slice", backend = "cpu", scale_dtype, weight_format, recipe = "direct";
  std::vector<std::string> routing = {"uniform"}, activations;
  std::vector<int> experts, rows = {1, 4, 16, 64};
  int hidden = 0, intermediate = 0, group_size = 0, threads = 0, repeats = 7;
  double rest_ms = 200;
  bool has_minus8 = false, sweep = false;
  std::uint64_t seed = 1;
};

/// A preset's sizes, perhaps in another weight format.
ModelGeometry bench_geometry(const Options& options) {
  ModelGeometry geometry = preset_geometry(options.preset);
  if (!options.weight_format.empty()) {
    geometry.weight_format = parse_weight_format(options.weight_format);
    if (!allows_group_size(geometry.weight_format, geometry.group_size)) geometry.group_size = 32;
  }
  return geometry;
}

ExpertsBenchConfig bench_config(const Options& options) {
  const ModelGeometry geometry = bench_geometry(options);
  ExpertsBenchConfig config{
      .geometry = geometry,
      .scale_dtype = parse_scale_dtype(geometry, options.scale_dtype, DType::kBFloat16),
      .has_minus8 = options.has_minus8,
      .recipes = {parse_recipe(options.recipe)},
      .num_experts = options.experts,
      .routing = {},
      .rows_per_expert = options.rows,
      .repeats = options.repeats,
      .rest_ms = options.rest_ms,
      .seed = options.seed};
  if (options.hidden > 0) config.geometry.hidden = options.hidden;
  if (options.intermediate > 0) config.geometry.intermediate = options.intermediate;
  if (options.group_size > 0) config.geometry.group_size = options.group_size;
  for (const std::string& name : options.routing) config.routing.push_back(parse_routing(name));
  for (const std::string& text : options.activations) {
    config.activations.push_back(parse_activation(text));
  }
  return config;
}

const char* values_of(const ExpertsBenchConfig& config) {
  if (config.geometry.weight_format == WeightFormat::kMxfp4) return "-6..6";
  return config.has_minus8 ? "-8..7" : "-7..7";
}

const char* name_of(RoutingKind routing) {
  return routing == RoutingKind::kUniform ? "uniform"
         : routing == RoutingKind::kZipf  ? "zipf"
                                          : "one-expert";
}

/// What --sweep runs. First every kind of weights and of activation scales, then what else a rank
/// may have: fewer experts, uneven rows, experts cut for tensor parallelism.
std::vector<ExpertsBenchConfig> sweep_of(const ExpertsBenchConfig& base) {
  std::vector<ExpertsBenchConfig> sweep;
  ExpertsBenchConfig config = base;
  if (config.geometry.weight_format != WeightFormat::kInt4) {  // MXFP4 has one kind of scales.
    config.geometry.weight_format = WeightFormat::kInt4;
    config.scale_dtype = DType::kBFloat16;
  }
  config.stage_only = true;
  config.num_experts = {32};
  config.routing = {RoutingKind::kUniform};
  config.rows_per_expert = {1, 16, 64, 128, 256, 1024};
  config.recipes = {Recipe{}, parse_recipe("bf16-static"), parse_recipe("direct-token")};
  for (const int group_size : {128, 32}) {
    config.geometry.group_size = group_size;
    for (const bool has_minus8 : {false, true}) {
      config.has_minus8 = has_minus8;
      sweep.push_back(config);
    }
  }
  config.geometry.group_size = 128, config.has_minus8 = false;
  config.recipes = {Recipe{}};
  config.rows_per_expert = {1, 16, 64, 128};
  config.num_experts = {8, 16};
  sweep.push_back(config);
  config.num_experts = {32};
  config.routing = {RoutingKind::kZipf, RoutingKind::kOneExpert};
  sweep.push_back(config);
  config.routing = {RoutingKind::kUniform};
  config.num_experts = {48}, config.geometry.group_size = 32;  // Kimi-K2 over eight ranks.
  config.rows_per_expert = {8, 32, 128};
  sweep.push_back(config);
  config.num_experts = {256}, config.geometry.group_size = 128, config.geometry.intermediate = 256;
  config.rows_per_expert = {1, 4, 16, 64};
  sweep.push_back(config);
  return sweep;
}

void report_case(const ExpertsBenchConfig& config, const ExpertsBenchCase& c,
                 const ExpertsBenchReport& report, double unit_us, Table& table, Output& output) {
  const bool has_cpu_time = unit_us > 1;  // CPU.
  const auto time = [&](double us) {
    return fmt::format("{:.{}f}", us / unit_us, unit_us > 1 ? 3 : 1);
  };
  const auto percent = [](double part, double whole) {
    return part > 0 ? fmt::format("{:.0f}", 100 * part / whole) : "-";
  };
  nlohmann::ordered_json kernels;
  for (const ExpertsBenchKernel& k : c.kernels) {
    std::vector<std::string> cells{
        fmt::format("{} of {}", c.num_experts, config.geometry.intermediate),
        fmt::format("{}", config.geometry.group_size),
        values_of(config),
        to_string(c.recipe),
        to_string(c.activation),
        name_of(c.routing),
        fmt::format("{}", c.rows_per_expert),
        k.name,
        time(k.median_us),
        time(k.min_us),
        time(k.max_us),
        k.gbytes_per_s > 0 ? fmt::format("{:.{}f}", k.gbytes_per_s, unit_us > 1 ? 1 : 0) : "-",
        percent(k.gbytes_per_s, report.read_gbytes_per_s),
        k.tflops > 0 ? fmt::format("{:.{}f}", k.tflops, unit_us > 1 ? 3 : 0) : "-",
        percent(k.tflops, report.peak_tflops),
        &k == c.kernels.data() ? fmt::format("{:.2f}", c.worst_error_ratio) : ""};
    if (has_cpu_time) cells.push_back(k.cpu_us > 0 ? time(k.cpu_us) : "-");
    table.add(std::move(cells));
    kernels.push_back({{"name", k.name},
                       {"median_us", k.median_us},
                       {"min_us", k.min_us},
                       {"max_us", k.max_us},
                       {"cpu_us", k.cpu_us},
                       {"gbytes_per_s", k.gbytes_per_s},
                       {"tflops", k.tflops}});
  }
  output.json["cases"].push_back({{"num_experts", c.num_experts},
                                  {"intermediate", config.geometry.intermediate},
                                  {"group_size", config.geometry.group_size},
                                  {"has_minus8", config.has_minus8},
                                  {"recipe", to_string(c.recipe)},
                                  {"activation", to_string(c.activation)},
                                  {"routing", name_of(c.routing)},
                                  {"rows_per_expert", c.rows_per_expert},
                                  {"total_rows", c.total_rows},
                                  {"worst_error_ratio", c.worst_error_ratio},
                                  {"kernels", kernels}});
}

/// ", 0.190 TFLOPS of byte dot products, 0.2 TFLOPS of ..."
std::string ceilings_text(const ExpertsBenchReport& report, int digits) {
  std::string text;
  for (const ExpertsBenchCeiling& ceiling : report.arithmetic) {
    text += fmt::format(", {:.{}f} TFLOPS of {}", ceiling.tflops, digits, ceiling.kind);
  }
  return text;
}

/// Of the weights that every case has, in the backend's form alone.
void check_memory(const ExpertsBenchConfig& config) {
  const ModelGeometry& g = config.geometry;
  const int experts =
      config.num_experts.empty() ? g.num_experts : std::ranges::max(config.num_experts);
  const double codes = 1.5 * g.hidden * g.intermediate;  // Half a byte each, of three matrices.
  require_memory(codes * experts, fmt::format("the weights of {} experts of --hidden {} and "
                                              "--intermediate {}",
                                              experts, g.hidden, g.intermediate));
}

void bench_experts_command(const Options& options, Output& output) {
  const ExpertsBenchConfig base = bench_config(options);
  const std::vector<ExpertsBenchConfig> configs =
      options.sweep ? sweep_of(base) : std::vector{base};
  const bool cuda = options.backend == "cuda";
  if (!cuda) check_memory(base);
  const auto backend = bench_backend(options.backend, options.threads);
  ProgressLine progress("bench experts");
  std::vector<ExpertsBenchReport> reports;
  const auto num_configs = static_cast<double>(configs.size());
  for (const ExpertsBenchConfig& config : configs) {
    reports.push_back(bench_experts(config, *backend, [&](double fraction) {
      progress.update((static_cast<double>(reports.size()) + fraction) / num_configs);
    }));
    check_ceiling(reports.back());
  }

  const ModelGeometry& g = base.geometry;
  const ExpertsBenchReport& first = reports.front();
  const double unit_us = cuda ? 1 : 1000;
  const char* const scales = scale_dtype_text(base.scale_dtype);
  fmt::print("experts   {}, hidden {}, {} scales\n", to_string(g.weight_format), g.hidden, scales);
  fmt::print("device    {}: reads {:.1f} GB/s{}\n", first.device, first.read_gbytes_per_s,
             ceilings_text(first, cuda ? 0 : 3));
  fmt::print("times     {}, median, smallest and largest of {}{}\n", cuda ? "us" : "ms",
             options.repeats,
             cuda ? fmt::format(" replays of a graph, {:.0f} ms of rest before each GEMM's",
                                options.rest_ms)
                  : "; gate_up, activation and down: shares of the threads' time; CPU ms: least "
                    "processor time of a thread");
  std::vector<std::string> columns{
      "experts",    "groups",      "values",    "recipe", "activation",
      "routing",    "rows/expert", "kernel",    "us",     "min",
      "max",        "GB/s",        "% of read", "TFLOPS", cuda ? "% of FP8" : "% of dots",
      "error/bound"};
  if (!cuda) columns[8] = "ms", columns.push_back("CPU ms");
  Table table(columns);
  for (std::size_t i = 0; i < configs.size(); ++i) {
    for (const ExpertsBenchCase& c : reports[i].cases) {
      report_case(configs[i], c, reports[i], unit_us, table, output);
    }
  }
  fmt::print("{}", table.to_string());
  output.json["command"] = "bench experts";
  output.json["device"] = first.device;
  output.json["geometry"] = {{"hidden", g.hidden},
                             {"intermediate", g.intermediate},
                             {"group_size", g.group_size},
                             {"weight_format", to_string(g.weight_format)},
                             {"scale_dtype", scales}};
  output.json["read_gbytes_per_s"] = first.read_gbytes_per_s;
  output.json["peak_tflops"] = first.peak_tflops;
  for (const ExpertsBenchCeiling& ceiling : first.arithmetic) {
    output.json["arithmetic"].push_back({{"kind", ceiling.kind}, {"tflops", ceiling.tflops}});
  }
}

}  // namespace

void add_bench(Command& program, Output& output) {
  Command bench = program.add_subcommand("bench", "Measure parts of the layer by themselves");
  bench.require_subcommand();
  add_bench_exchange(bench, output);
  add_bench_layer(bench, output);
  add_bench_model(bench, output);
  add_bench_load(bench, output);
  Command command = bench.add_subcommand(
      "experts",
      "GEMM1, activation, quantization and GEMM2 of one rank's experts; checked, then timed");
  const auto options = std::make_shared<Options>();
  command.add_backend_option(options->backend);
  command.add_option("--preset", options->preset, "Geometry").shows_default();
  command
      .add_option("--experts", options->experts, "Local experts, instead of the preset's; a list")
      .comma_separated()
      .range(1, 512);
  command.add_option("--hidden", options->hidden, "Instead of the preset's").range(1, 1 << 20);
  command.add_option("--intermediate", options->intermediate, "Instead of the preset's")
      .range(1, 1 << 20);
  command.add_option("--rows", options->rows, "Mean rows per expert, one case each")
      .comma_separated()
      .range(1, 1 << 20)
      .shows_default();
  command.add_option("--routing", options->routing, "uniform | zipf | one-expert; a list")
      .one_of({"uniform", "zipf", "one-expert"})
      .comma_separated()
      .shows_default();
  command.add_option("--activation", options->activations,
                     "swiglu | swiglu:limit=L | swiglu-oai:alpha=A,limit=L | "
                     "situ:beta=B,linear_beta=LB, instead of the preset's; may be repeated");
  command.add_flag(
      "--sweep", options->sweep,
      "The stage with every kind of weights and activation scales, 1 to 1024 rows; with "
      "fewer experts, uneven rows and slices of experts: 95 cases. Uses none of the "
      "options that choose one of these");
  command.add_option("--group-size", options->group_size, "Weights of one scale: 128 | 32")
      .one_of({128, 32});
  command
      .add_option("--recipe", options->recipe,
                  "direct: activation scales per 128 | bf16-static: static scales, as in the GEMMs "
                  "of every static recipe | direct-token: one scale per row of x")
      .one_of({"direct", "bf16-static", "direct-token"})
      .shows_default();
  command.add_flag("--minus8", options->has_minus8, "Weights that use -8 too, not -7..7 only");
  command.add_option("--rest", options->rest_ms, "CUDA: ms of rest before each GEMM's timing")
      .range(0.0, 10000.0)
      .shows_default();
  command.add_option("--scale-dtype", options->scale_dtype, "Of int4 weights: bf16 (default) | f32")
      .one_of({"bf16", "f32"});
  command.add_option("--weight-format", options->weight_format,
                     "int4 | mxfp4, instead of the preset's");
  command.add_option("--threads", options->threads, "CPU threads; default: all").range(1, 1024);
  command.add_option("--repeat", options->repeats, "Timed repeats")
      .range(1, 100000)
      .shows_default();
  command.add_option("--seed", options->seed, "Seed of weights and rows").shows_default();
  command.on_parsed([options, &output] { bench_experts_command(*options, output); });
}

}  // namespace sluice::cli
