// sluice run - one layer of a checkpoint over R ranks: timed, counted and verified.
#include <fmt/core.h>

#include <algorithm>
#include <numeric>
#include <optional>

#include "command.h"
#include "launch.h"
#include "layer_run.h"
#include "report.h"
#include "run_stats.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/lab/ranks.h"

namespace sluice::cli {
namespace {

/// What ranks that failed may take to load, check and say so, beyond their timeouts.
constexpr std::chrono::milliseconds kPatience{10'000};

struct Options {
  std::string checkpoint, mode = "low-latency", recipe = "direct", backend = "cpu",
                          transport = "inproc", routing = "uniform";
  int layer = -1, ranks = 0, repeats = 5, devices = 0;
  std::vector<std::int64_t> tokens = {32};
  std::uint64_t seed = 1;
  std::int64_t verify = 8;
  float routed_scaling_factor = 1.0f;
  bool prove = false, stats = false;
  std::string metrics_path;
};

LayerRunConfig resolve(const Options& options, const Environment& environment, int num_ranks,
                       const Checkpoint& checkpoint) {
  LayerRunConfig config{
      .layer = options.layer,
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
  if (config.layer < 0) config.layer = checkpoint.moe_layers().front();
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

/// Sums and maxima over ranks that both the table and the JSON show.
struct Summary {
  StageTimes slowest;
  std::uint64_t weight_bytes = 0, wire_bytes = 0, remote_bytes = 0, flops = 0;
  std::int64_t rows = 0, min_rows = 0, max_rows = 0;
  double num_devices = 0;  // That the ranks share; CPU ranks of one host share one.
  double experts_us = 0, gbytes_per_s = 0, share_of_read = 0, imbalance_max_over_mean = 0;
};

Summary summarize(const LayerRunResult& result) {
  Summary s;
  s.min_rows = std::numeric_limits<std::int64_t>::max();
  std::size_t num_experts = 0;
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    const StageTimes& t = rank.stats.times;
    for (const auto field :
         {&StageTimes::dispatch_us, &StageTimes::quantize_us, &StageTimes::gemm1_us,
          &StageTimes::activation_us, &StageTimes::gemm2_us, &StageTimes::combine_us,
          &StageTimes::total_us}) {
      s.slowest.*field = std::max(s.slowest.*field, t.*field);
    }
    s.experts_us = std::max(s.experts_us, t.gemm1_us + t.activation_us + t.gemm2_us);
    s.weight_bytes += rank.stats.weight_bytes_read;
    s.flops += rank.stats.flops;
    s.num_devices += 1.0 / rank.num_ranks_on_device;
    for (std::size_t peer = 0; peer < result.ranks.size(); ++peer) {
      const std::uint64_t bytes =
          rank.counters.dispatch_bytes[peer] + rank.counters.combine_bytes[peer];
      s.wire_bytes += bytes;
      if (peer != r) s.remote_bytes += bytes;
    }
    for (const std::int64_t rows : rank.stats.rows_per_expert) {
      s.rows += rows;
      s.min_rows = std::min(s.min_rows, rows);
      s.max_rows = std::max(s.max_rows, rows);
      ++num_experts;
    }
  }
  s.gbytes_per_s = static_cast<double>(s.weight_bytes) / s.experts_us * 1e-3;
  s.share_of_read = s.gbytes_per_s * 1e9 / (s.num_devices * result.read_bytes_per_s);
  const double mean = static_cast<double>(s.rows) / static_cast<double>(num_experts);
  s.imbalance_max_over_mean = mean > 0 ? static_cast<double>(s.max_rows) / mean : 0;
  return s;
}

std::string ms(double us) {
  return fmt::format("{:.2f}", us / 1000);
}

void print_ranks(const LayerRunConfig& config, const LayerRunResult& result, const Summary& s) {
  Table table({"rank", "tokens", "rows", "rows/expert", "sent MB", "dispatch ms", "quantize",
               "GEMM1", "activation", "GEMM2", "combine", "total"});
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    const auto& rows = rank.stats.rows_per_expert;
    const auto [low, high] = std::ranges::minmax(rows);
    std::uint64_t sent = 0;
    for (std::size_t peer = 0; peer < result.ranks.size(); ++peer) {
      if (peer == r) continue;
      sent += rank.counters.dispatch_bytes[peer] + rank.counters.combine_bytes[peer];
    }
    const StageTimes& t = rank.stats.times;
    table.add({fmt::format("{}", r), fmt::format("{}", config.tokens[r]),
               fmt::format("{}", std::accumulate(rows.begin(), rows.end(), std::int64_t{0})),
               fmt::format("{}-{}", low, high), fmt::format("{:.2f}", sent * 1e-6),
               ms(t.dispatch_us), ms(t.quantize_us), ms(t.gemm1_us), ms(t.activation_us),
               ms(t.gemm2_us), ms(t.combine_us), ms(t.total_us)});
  }
  const StageTimes& t = s.slowest;
  table.add({"slowest", "", fmt::format("{}", s.rows), fmt::format("{}-{}", s.min_rows, s.max_rows),
             fmt::format("{:.2f}", s.remote_bytes * 1e-6), ms(t.dispatch_us), ms(t.quantize_us),
             ms(t.gemm1_us), ms(t.activation_us), ms(t.gemm2_us), ms(t.combine_us),
             ms(t.total_us)});
  fmt::print("{}", table.to_string());
  fmt::print(
      "experts   {} of weights in {} ms: {:.1f} GB/s, {:.0f} % of the {}{:.1f} GB/s this machine "
      "reads; {:.3g} TFLOPS\n",
      human_bytes(static_cast<double>(s.weight_bytes)), ms(s.experts_us), s.gbytes_per_s,
      s.share_of_read * 100, s.num_devices > 1.5 ? fmt::format("{:.0f} x ", s.num_devices) : "",
      result.read_bytes_per_s * 1e-9, s.flops / s.experts_us * 1e-6);
  fmt::print("balance   fullest expert has {:.2f} x the mean rows\n", s.imbalance_max_over_mean);
}

nlohmann::ordered_json to_json(const StageTimes& t) {
  return {{"dispatch_us", t.dispatch_us}, {"quantize_us", t.quantize_us},
          {"gemm1_us", t.gemm1_us},       {"activation_us", t.activation_us},
          {"gemm2_us", t.gemm2_us},       {"combine_us", t.combine_us},
          {"total_us", t.total_us}};
}

/// With the names of `sluice plan`.
nlohmann::ordered_json to_json(const LayerGroupMemory& m) {
  return {{"codes_bytes", m.codes_bytes},       {"scales_bytes", m.scales_bytes},
          {"prepared_bytes", m.prepared_bytes}, {"exchange_bytes", m.exchange_bytes},
          {"scratch_bytes", m.scratch_bytes},   {"total_bytes", m.total_bytes()}};
}

void fill_json(Output& output, const LayerRunConfig& config, const LayerRunResult& result,
               const Summary& s) {
  auto& json = output.json;
  json["backend"] = result.backend;
  json["read_bytes_per_s"] = result.read_bytes_per_s;  // Of one device.
  json["num_devices"] = s.num_devices;
  json["recipe"] = {{"name", to_string(result.recipe)},
                    {"mode", to_string(result.recipe.mode)},
                    {"wire", to_string(result.recipe.wire)},
                    {"s1", result.recipe.s1},
                    {"s2", result.recipe.s2},
                    {"describe", result.recipe.describe()}};
  json["repeats_us"] = result.total_us;
  json["slowest"] = to_json(s.slowest);
  json["experts_gbytes_per_s"] = s.gbytes_per_s;
  json["share_of_read"] = s.share_of_read;
  json["imbalance_max_over_mean"] = s.imbalance_max_over_mean;
  json["wire_bytes"] = s.wire_bytes;
  json["wire_bytes_off_rank"] = s.remote_bytes;
  for (std::size_t r = 0; r < result.ranks.size(); ++r) {
    const RankResult& rank = result.ranks[r];
    json["ranks"].push_back({{"tokens", config.tokens[r]},
                             {"rows_per_expert", rank.stats.rows_per_expert},
                             {"dispatch_bytes", rank.counters.dispatch_bytes},
                             {"dispatch_rows", rank.counters.dispatch_rows},
                             {"combine_bytes", rank.counters.combine_bytes},
                             {"transport_bytes", rank.transport_bytes},
                             {"wait_ns", rank.counters.wait_ns},
                             {"saturated_values", rank.counters.saturated_values},
                             {"weight_bytes", rank.memory.prepared_bytes},
                             {"memory", to_json(rank.memory)},
                             {"times", to_json(rank.stats.times)}});
  }
}

/// The recipe whose GEMM1 must see the same bytes, which travel in another format.
Recipe proving_twin(const Recipe& recipe) {
  if (const std::optional<Recipe> other = twin(recipe)) return *other;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--prove: recipe {} rounds twice; no other recipe gives the same bytes",
                          to_string(recipe)));
}

std::uint64_t digest_of(const LayerRunResult& result) {
  std::uint64_t sum = 0;
  for (const RankResult& rank : result.ranks) sum += rank.digest;
  return sum;
}

/// The run with which --prove compares.
LayerRunConfig twin_of(const LayerRunConfig& config) {
  LayerRunConfig other = config;
  other.recipe = proving_twin(config.recipe);
  other.repeats = 1;
  other.environment.dispatch_dtype = DispatchDtype::kAuto;
  return other;
}

bool print_identity(const LayerRunConfig& config, std::uint64_t mine, const LayerRunConfig& other,
                    std::uint64_t theirs, Output& output) {
  const bool same = mine == theirs;
  fmt::print("identity  GEMM1 input: {} {:016x}, {} {:016x}: {}\n", to_string(config.recipe), mine,
             to_string(other.recipe), theirs, same ? "the same bytes" : "DIFFERENT");
  output.json["identity"] = {{"digest", fmt::format("{:016x}", mine)},
                             {"twin", to_string(other.recipe)},
                             {"twin_digest", fmt::format("{:016x}", theirs)},
                             {"same", same}};
  return same;
}

void print_verification(const VerifyReport& report, Output& output) {
  fmt::print(
      "verified  {} rows, {} elements against float64: {}\n", report.num_rows, report.num_elements,
      report.passed() ? "all within bounds" : fmt::format("{} OUT OF BOUNDS", report.num_wrong));
  fmt::print(
      "          worst: token {}, element {}: {:.6g}, float64 {:.6g}, error {:.2f} of its bound "
      "{:.3g}; relative L2 {:.2e}\n",
      report.worst_token, report.worst_element, report.worst_actual, report.worst_expected,
      report.worst_ratio, report.worst_bound, report.relative_l2);
  output.json["verify"] = {{"rows", report.num_rows},
                           {"elements", report.num_elements},
                           {"wrong", report.num_wrong},
                           {"worst_ratio", report.worst_ratio},
                           {"worst_token", report.worst_token},
                           {"worst_element", report.worst_element},
                           {"worst_actual", report.worst_actual},
                           {"worst_expected", report.worst_expected},
                           {"worst_bound", report.worst_bound},
                           {"relative_l2", report.relative_l2},
                           {"passed", report.passed()}};
}

void print_layer(const Options& options, const LayerRunConfig& config,
                 const Checkpoint& checkpoint) {
  const ModelGeometry& g = checkpoint.geometry();
  fmt::print("layer     {} of {}: {}, {} experts, top-{}, hidden {}, intermediate {}\n",
             config.layer, options.checkpoint, checkpoint.format(), g.num_experts, g.num_topk,
             g.hidden, g.intermediate);
  for (const auto& warnings : {checkpoint.warnings(), checkpoint.warnings(config.layer)}) {
    for (const CheckpointWarning& w : warnings) {
      fmt::print("{}   {}: {}\n", w.is_note ? "note   " : "warning", w.tensor, w.text);
    }
  }
}

/// Everything after the run itself: only the reporter does this, the other ranks are gone.
void report(const Options& options, const LayerRunConfig& config, const Checkpoint& checkpoint,
            const LayerRunResult& result, Output& output) {
  fmt::print("recipe    {}\n", result.recipe.describe());
  fmt::print("ranks     {} over {}, each {}; routing {}, seed {}, median of {}\n", config.num_ranks,
             options.transport, result.backend, options.routing, options.seed, config.repeats);
  const Summary summary = summarize(result);
  print_ranks(config, result, summary);

  output.json["command"] = "run";
  output.json["checkpoint"] = options.checkpoint;
  output.json["layer"] = config.layer;
  output.json["transport"] = options.transport;
  output.json["routing"] = options.routing;
  output.json["seed"] = options.seed;
  fill_json(output, config, result, summary);
  const std::string digest = fmt::format("{:016x}", outputs_digest(result));
  fmt::print("outputs   digest {}\n", digest);
  output.json["outputs_digest"] = digest;
  output.json["stats"] = stats_json(result, checkpoint.geometry());
  if (options.stats) print_stats(result, checkpoint.geometry());
  if (!options.metrics_path.empty()) {
    write_metrics(options.metrics_path, config, result, checkpoint.geometry());
  }
}

void print_memory(const LayerRunConfig& config, const LayerRunResult& result, bool has_processes,
                  Output& output) {
  double experts_bytes = 0, peak = 0;
  for (const RankResult& rank : result.ranks) {
    experts_bytes += static_cast<double>(rank.memory.prepared_bytes);
    peak += rank.peak_resident_bytes;
  }
  if (!has_processes) peak = peak_resident_bytes();
  fmt::print("memory    peak resident {}{}, experts {}\n", human_bytes(peak),
             has_processes ? fmt::format(" in {} processes", config.num_ranks) : "",
             human_bytes(experts_bytes));
  // Every rank has the same sizes.
  const LayerGroupMemory& m = result.ranks.front().memory;
  const auto human = [](std::size_t bytes) { return human_bytes(static_cast<double>(bytes)); };
  fmt::print("          each rank: prepared {}, exchange {}, scratch {}; {} in all\n",
             human(m.prepared_bytes), human(m.exchange_bytes), human(m.scratch_bytes),
             human(m.total_bytes()));
  output.json["peak_resident_bytes"] = peak;
  output.json["experts_bytes"] = experts_bytes;
}

void run(const Options& options, Output& output) {
  const Environment environment = read_environment();
  if (options.transport == "ipc" && !read_job_place()) {
    output.exit_status =
        run_as_processes(std::max(1, options.ranks), 2 * environment.peer_timeout + kPatience);
    output.json_path.clear();  // Rank 0 has written it.
    return;
  }
  Launch launch(options.transport, options.ranks, environment.peer_timeout, output);
  std::optional<Checkpoint> checkpoint;
  LayerRunConfig config;
  launch.together([&] {
    checkpoint = Checkpoint::open(options.checkpoint);
    config = resolve(options, environment, launch.num_ranks(), *checkpoint);
    if (options.prove) (void)proving_twin(config.recipe);  // Refuse before working.
    print_layer(options, config, *checkpoint);
  });
  LayerRunResult result = run_layer(config, *checkpoint, launch);
  std::uint64_t twin_digest = 0;
  if (options.prove) twin_digest = digest_of(run_layer(twin_of(config), *checkpoint, launch));
  launch.finish();
  if (!launch.is_reporter()) return;

  result.read_bytes_per_s = measure_ceiling(config);
  report(options, config, *checkpoint, result, output);
  bool passed = true;
  if (options.prove) {
    passed = print_identity(config, digest_of(result), twin_of(config), twin_digest, output);
  }
  const VerifyReport verified = verify_run(config, *checkpoint, result, options.verify);
  print_verification(verified, output);
  print_memory(config, result, launch.has_processes(), output);
  output.exit_status = passed && verified.passed() ? 0 : 1;
}

}  // namespace

void add_run(Command& program, Output& output) {
  Command command =
      program.add_subcommand("run", "Run one MoE layer over ranks, timed and verified");
  const auto options = std::make_shared<Options>();
  command.add_option("--checkpoint", options->checkpoint, "Checkpoint directory")
      .required()
      .existing_directory();
  command.add_option("--layer", options->layer, "Layer index; default: the first with experts")
      .non_negative();
  command
      .add_option("--ranks", options->ranks,
                  "Expert-parallel ranks; default: 1, or one for each process of a job")
      .range(1, 1024);
  command.add_option("--tokens", options->tokens, "Tokens per rank: one value, or one per rank")
      .comma_separated()
      .range(0, 1 << 20);
  command.add_option("--mode", options->mode, "low-latency | normal").shows_default();
  command.add_option("--recipe", options->recipe, "What is rounded where").shows_default();
  command.add_option("--backend", options->backend, "cpu | cuda")
      .one_of({"cpu", "cuda"})
      .shows_default();
  command
      .add_option("--devices", options->devices,
                  "GPUs of each host to spread its ranks over; default: all there are")
      .range(1, 64);
  command
      .add_option("--transport", options->transport,
                  "inproc (ranks are threads) | ipc (ranks are processes of this host, started "
                  "here, by torchrun, mpirun or srun) | mpi (ranks are the processes of mpirun)")
      .one_of({"inproc", "mpi", "ipc"})
      .shows_default();
  command.add_option("--routing", options->routing, "uniform | zipf | one-expert").shows_default();
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
      .shows_default();
  command.add_flag("--prove", options->prove,
                   "Also run the recipe's twin and compare the bytes GEMM1 consumes");
  command.add_flag("--stats", options->stats,
                   "Also print bytes, rows and waits between each pair of ranks");
  command
      .add_option("--metrics", options->metrics_path,
                  "Write the counters to FILE in Prometheus text format")
      .type_name("FILE");
  command.on_parsed([options, &output] { run(*options, output); });
}

}  // namespace sluice::cli
