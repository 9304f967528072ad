// sluice bench - the parts by themselves, against what the machine can do.
#include <fmt/core.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "command.h"
#include "sluice/backend.h"
#include "sluice/bench.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string preset = "r1-slice", backend = "cpu", routing = "uniform", scale_dtype = "bf16";
  int experts = 0, hidden = 0, intermediate = 0, threads = 0, repeats = 7;
  std::vector<int> rows = {1, 4, 16, 64};
  std::uint64_t seed = 1;
};

void bench_experts_command(const Options& options, Output& output) {
  ExpertsBenchConfig config{
      .geometry = preset_geometry(options.preset),
      .scale_dtype = options.scale_dtype == "f32" ? DType::kFloat32 : DType::kBFloat16,
      .rows_per_expert = options.rows,
      .routing = parse_routing(options.routing),
      .repeats = options.repeats,
      .seed = options.seed};
  if (options.experts > 0) config.geometry.num_experts = options.experts;
  if (options.hidden > 0) config.geometry.hidden = options.hidden;
  if (options.intermediate > 0) config.geometry.intermediate = options.intermediate;
  config.num_threads = options.threads > 0
                           ? options.threads
                           : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const bool cuda = options.backend == "cuda";
  const auto backend =
      make_backend({.device = {cuda ? Device::Kind::kCuda : Device::Kind::kHost, 0},
                    .num_threads = cuda ? 0 : config.num_threads});
  const ExpertsBenchReport report = bench_experts(config, *backend);

  const ModelGeometry& g = config.geometry;
  fmt::print("experts   {} of hidden {}, intermediate {}, groups of {}; routing {}, median of {}\n",
             g.num_experts, g.hidden, g.intermediate, g.group_size, options.routing,
             options.repeats);
  fmt::print(
      "device    {}: reads {:.1f} GB/s{}\n", report.device, report.read_gbytes_per_s,
      cuda ? ""
           : fmt::format(", {:.0f} GFLOP/s of float32 multiply-adds", report.peak_tflops * 1e3));
  Table table({"rows/expert", "ms", "min", "max", "GB/s", "% of read", "TFLOPS", "% of f32",
               "GEMM1", "activation", "GEMM2", "quantize", "requantize", "error/bound"});
  const auto ms = [](double us) { return fmt::format("{:.3f}", us / 1000); };
  for (const ExpertsBenchCase& c : report.cases) {
    const bool has_peak = report.peak_tflops > 0;
    table.add({fmt::format("{}", c.rows_per_expert), ms(c.median_us), ms(c.min_us), ms(c.max_us),
               fmt::format("{:.1f}", c.gbytes_per_s),
               fmt::format("{:.0f}", 100 * c.gbytes_per_s / report.read_gbytes_per_s),
               fmt::format("{:.3f}", c.tflops),
               has_peak ? fmt::format("{:.0f}", 100 * c.tflops / report.peak_tflops) : "-",
               cuda ? "-" : ms(c.gemm1_us), cuda ? "-" : ms(c.activation_us),
               cuda ? "-" : ms(c.gemm2_us), ms(c.quantize_us), ms(c.requantize_us),
               fmt::format("{:.2f}", c.worst_error_ratio)});
    output.json["cases"].push_back({{"rows_per_expert", c.rows_per_expert},
                                    {"total_rows", c.total_rows},
                                    {"median_us", c.median_us},
                                    {"min_us", c.min_us},
                                    {"max_us", c.max_us},
                                    {"gbytes_per_s", c.gbytes_per_s},
                                    {"tflops", c.tflops},
                                    {"gemm1_us", c.gemm1_us},
                                    {"activation_us", c.activation_us},
                                    {"gemm2_us", c.gemm2_us},
                                    {"quantize_us", c.quantize_us},
                                    {"requantize_us", c.requantize_us},
                                    {"worst_error_ratio", c.worst_error_ratio}});
  }
  fmt::print("{}", table.to_string());
  output.json["command"] = "bench experts";
  output.json["device"] = report.device;
  output.json["read_gbytes_per_s"] = report.read_gbytes_per_s;
  output.json["peak_tflops"] = report.peak_tflops;
}

}  // namespace

void add_bench(CLI::App& app, Output& output) {
  CLI::App* bench = app.add_subcommand("bench", "Measure parts of the layer by themselves");
  bench->require_subcommand(1);
  add_bench_exchange(*bench, output);
  CLI::App* command = bench->add_subcommand(
      "experts",
      "GEMM1, SwiGLU, quantization and GEMM2 of one rank's experts; checked, then timed");
  const auto options = std::make_shared<Options>();
  command->add_option("--backend", options->backend, "cpu | cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--preset", options->preset, "Geometry")->capture_default_str();
  command->add_option("--experts", options->experts, "Local experts, instead of the preset's")
      ->check(CLI::Range(1, 1024));
  command->add_option("--hidden", options->hidden, "Instead of the preset's");
  command->add_option("--intermediate", options->intermediate, "Instead of the preset's");
  command->add_option("--rows", options->rows, "Mean rows per expert, one case each")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--routing", options->routing, "uniform | zipf | one-expert")
      ->capture_default_str();
  command->add_option("--scale-dtype", options->scale_dtype, "Of the weights: bf16 | f32")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "CPU threads; default: all")
      ->check(CLI::Range(1, 4096));
  command->add_option("--repeat", options->repeats, "Timed repeats")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command->add_option("--seed", options->seed, "Seed of weights and rows")->capture_default_str();
  command->callback([options, &output] { bench_experts_command(*options, output); });
}

}  // namespace sluice::cli
