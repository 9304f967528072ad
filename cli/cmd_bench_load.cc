// sluice bench load - experts from a checkpoint's files to a device, beside a plain read of the
// same bytes and the copy to the device.
#include <fmt/core.h>

#include <algorithm>
#include <memory>

#include "command.h"
#include "layers_option.h"
#include "report.h"
#include "sluice/backend.h"
#include "sluice/lab/load_bench.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string checkpoint, layers = "all", backend = "cpu";
  int ranks = 1, rank = 0, threads = 0, repeats = 3;
  bool without_cold = false, without_check = false;
};

std::string rate(double bytes_per_s) {
  return bytes_per_s > 0 ? fmt::format("{:.2f}", bytes_per_s * 1e-9) : "-";
}

void print_report(const Options& options, const LoadBenchConfig& config,
                  const Checkpoint& checkpoint, const LoadBenchReport& r) {
  const auto human = [](auto bytes) { return human_bytes(static_cast<double>(bytes)); };
  fmt::print("loading   {} of {}: {}, experts {} of rank {} of {}, {} of files\n",
             counted(config.layers.size(), "layer"), options.checkpoint, checkpoint.format(),
             r.num_experts, config.rank, config.num_ranks, human(r.file_bytes));
  fmt::print("device    {}; {} threads read and repack\n", r.device, r.num_threads);
  if (config.with_check) {
    fmt::print("checked   every byte is that of mapped and repacked weights: digest {:016x}\n",
               r.digest);
  }
  const bool is_host = options.backend == "cpu";
  Table table({"files", "in memory before", "plain read GB/s",
               is_host ? "read and kept GB/s" : "copy GB/s", "load GB/s", "load s",
               "% of the slower"});
  for (const LoadBenchPass& p : r.passes) {
    table.add({p.is_cold ? "cold" : "warm", fmt::format("{:.0f} %", 100 * p.cached_share),
               rate(p.read_bytes_per_s),
               rate(is_host ? p.kept_read_bytes_per_s : r.copy_bytes_per_s),
               rate(p.load_bytes_per_s), fmt::format("{:.3f}", p.load_seconds),
               fmt::format("{:.0f}", 100 * p.load_bytes_per_s / r.bound(p))});
  }
  fmt::print("{}", table.to_string());
  if (!r.without_cold.empty()) fmt::print("no cold   {}\n", r.without_cold);
  fmt::print("memory    {} that matrices are read into; anonymous memory grew by {} at most{}\n",
             human(r.slots_bytes), human(r.host_growth_bytes),
             is_host ? " beyond the prepared experts" : "");
  fmt::print("first     the first layer of the process in {:.3f} s\n", r.first_load_seconds);
}

void bench_load_command(const Options& options, Output& output) {
  const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
  const LoadBenchConfig config{.layers = parse_layers(options.layers, checkpoint.moe_layers()),
                               .num_ranks = options.ranks,
                               .rank = options.rank,
                               .num_threads = options.threads,
                               .repeats = options.repeats,
                               .with_cold = !options.without_cold,
                               .with_check = !options.without_check};
  const bool is_cuda = options.backend == "cuda";
  const auto backend =
      make_backend({.device = {is_cuda ? Device::Kind::kCuda : Device::Kind::kHost, 0}});
  ProgressLine progress("bench load");
  const LoadBenchReport r =
      bench_load(config, checkpoint, *backend, [&](double fraction) { progress.update(fraction); });
  print_report(options, config, checkpoint, r);
  output.json["command"] = "bench load";
  output.json["checkpoint"] = options.checkpoint;
  output.json["format"] = checkpoint.format();
  output.json["layers"] = config.layers;
  output.json["num_ranks"] = config.num_ranks;
  output.json["rank"] = config.rank;
  output.json["device"] = r.device;
  output.json["num_experts"] = r.num_experts;
  output.json["file_bytes"] = r.file_bytes;
  output.json["prepared_bytes"] = r.prepared_bytes;
  output.json["threads"] = r.num_threads;
  output.json["slots_bytes"] = r.slots_bytes;
  output.json["host_growth_bytes"] = r.host_growth_bytes;
  output.json["copy_gbytes_per_s"] = r.copy_bytes_per_s * 1e-9;
  output.json["first_load_seconds"] = r.first_load_seconds;
  output.json["digest"] =
      config.with_check ? nlohmann::ordered_json(fmt::format("{:016x}", r.digest)) : nullptr;
  output.json["without_cold"] = r.without_cold;
  for (const LoadBenchPass& p : r.passes) {
    output.json["passes"].push_back({{"files", p.is_cold ? "cold" : "warm"},
                                     {"cached_share", p.cached_share},
                                     {"read_gbytes_per_s", p.read_bytes_per_s * 1e-9},
                                     {"kept_read_gbytes_per_s", p.kept_read_bytes_per_s * 1e-9},
                                     {"load_gbytes_per_s", p.load_bytes_per_s * 1e-9},
                                     {"load_seconds", p.load_seconds},
                                     {"share", p.load_bytes_per_s / r.bound(p)}});
  }
}

}  // namespace

void add_bench_load(Command& bench, Output& output) {
  Command command = bench.add_subcommand(
      "load", "Experts from files to the device; checked, then timed beside a plain read");
  const auto options = std::make_shared<Options>();
  command.add_option("--checkpoint", options->checkpoint, "Checkpoint directory")
      .required()
      .existing_directory();
  command.add_option("--layers", options->layers, "all, or a list such as 3,5-10")
      .shows_default()
      .not_empty();
  command.add_option("--ranks", options->ranks, "Ranks that share the experts of each layer")
      .range(1, 1024)
      .shows_default();
  command.add_option("--rank", options->rank, "Whose experts are loaded")
      .range(0, 1023)
      .shows_default();
  command.add_backend_option(options->backend);
  command
      .add_option("--threads", options->threads,
                  "That read and repack; default: the cores, between 4 and 16")
      .range(1, 256);
  command.add_option("--repeat", options->repeats, "Timed reads and loads of warm files")
      .range(1, 1000)
      .shows_default();
  command.add_flag("--no-cold", options->without_cold,
                   "Leave out the pass for which the files are put out of memory");
  command.add_flag("--no-check", options->without_check,
                   "Leave out the comparison with mapped weights");
  command.on_parsed([options, &output] { bench_load_command(*options, output); });
}

}  // namespace sluice::cli
