// sluice bench exchange - dispatch and combine by themselves, beside all-gather and reduce-scatter.
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <set>

#include "bench_runs.h"
#include "command.h"
#include "launch.h"
#include "report.h"
#include "sluice/config.h"
#include "sluice/lab/exchange_bench.h"
#include "sluice/lab/network_model.h"
#include "sluice/recipe.h"

namespace sluice::cli {
namespace {

struct Options {
  std::string backend = "cpu", transport = "inproc", mode = "low-latency", wire = "fp8",
              routing = "uniform";
  int ranks = 8, experts = 256, topk = 8, hidden = 7168, pairs = 20, repeats = 10, sms = 0,
      devices = 0;
  std::vector<int> tokens = {1, 16, 64, 128};
  bool without_all_gather = false, calibrate = false;
  std::string machine = "h200-ib400";  ///< --calibrate: where all other numbers are from.
  std::uint64_t seed = 1;
};

WireFormat parse_wire(const std::string& name) {
  if (name == "bf16") return WireFormat::kBf16;
  if (name == "pow2") return WireFormat::kE4m3Pow2;
  if (name == "static") return WireFormat::kE4m3Static;
  if (name == "fp8") return WireFormat::kE4m3Group;
  if (name == "token") return WireFormat::kE4m3Token;
  throw Error(ErrorCode::kInvalidArgument, "--wire: '" + name + "' is unknown");
}

nlohmann::ordered_json to_json(const ExchangeBenchTimes& t) {
  return {{"pair_us", t.pair_us},
          {"dispatch_us", t.dispatch_us},
          {"combine_us", t.combine_us},
          {"dispatch_call_us", t.dispatch_call_us},
          {"combine_call_us", t.combine_call_us},
          {"dispatch_bytes", t.dispatch_bytes},
          {"combine_bytes", t.combine_bytes},
          {"off_rank_share", t.off_rank_share}};
}

/// What one device sends and receives over its link in a pair, against what a copy gets.
std::string share_of_link(const ExchangeBenchTimes& t, const ExchangeBenchReport& report) {
  if (report.link_gbytes_per_s == 0) return "-";
  const double bytes = (t.dispatch_bytes + t.combine_bytes) * t.off_rank_share;
  const double gbytes_per_s = bytes / report.num_devices / t.pair_us * 1e-3;
  return fmt::format("{:.0f} %", 100 * gbytes_per_s / report.link_gbytes_per_s);
}

ExchangeBenchConfig resolve(const Options& options) {
  const WireFormat wire = parse_wire(options.wire);
  return {.device = options.backend == "cuda" ? Device::Kind::kCuda : Device::Kind::kHost,
          .num_ranks = options.ranks,
          .num_devices = options.devices,
          .exchange = {.mode = parse_mode(options.mode),
                       .wire = wire,
                       .num_experts = options.experts,
                       .num_topk = options.topk,
                       .hidden = options.hidden,
                       .num_in_flight = 1,
                       .num_sms = options.sms},
          .static_scale = wire == WireFormat::kE4m3Static ? 0.05f : 0.0f,
          .tokens_per_rank = options.tokens,
          .routing = parse_routing(options.routing),
          .pairs = options.pairs,
          .repeats = options.repeats,
          .with_all_gather = !options.without_all_gather,
          .seed = options.seed};
}

void print_header(const Options& options, const ExchangeBenchConfig& config,
                  const ExchangeBenchReport& report) {
  fmt::print(
      "exchange  {} ranks over {}, {} mode, {} out, bf16 home; {} experts, top-{}, hidden {}; {}\n",
      options.ranks, options.transport, options.mode, to_string(config.exchange.wire),
      options.experts, options.topk, options.hidden, options.routing);
  fmt::print("device    {}: copies {:.0f} GB/s (read and written), reads {:.0f} GB/s\n",
             report.device, report.copy_gbytes_per_s, report.read_gbytes_per_s);
  if (report.link_gbytes_per_s > 0) {
    fmt::print(
        "link      {} devices; one copies {:.0f} GB/s from another, {:.0f} while each copies from "
        "the next\n",
        report.num_devices, report.link_gbytes_per_s, report.links_together_gbytes_per_s);
  }
  const bool host_waits = !report.cases.empty() && report.cases.front().host_waits;
  fmt::print(
      "times     us, slowest rank, medians; pair: {} free-running pairs, {}; calls: host time\n",
      options.pairs, host_waits ? "in each of which the host waits for sizes" : "no host between");
}

void print_cases(const ExchangeBenchConfig& config, const ExchangeBenchReport& report) {
  Table table({"tokens/rank", "rows", "dispatch", "combine", "pair", "calls", "out MB", "home MB",
               "pair GB/s", "of link", "AG", "RS", "AG+RS", "workspace"});
  for (const ExchangeBenchCase& c : report.cases) {
    const ExchangeBenchTimes& t = c.exchange;
    const bool ag = config.with_all_gather;
    table.add({fmt::format("{}", c.tokens_per_rank), fmt::format("{}", c.rows), us(t.dispatch_us),
               us(t.combine_us), us(t.pair_us),
               us(t.dispatch_call_us) + " + " + us(t.combine_call_us),
               fmt::format("{:.2f}", t.dispatch_bytes * 1e-6),
               fmt::format("{:.2f}", t.combine_bytes * 1e-6),
               fmt::format("{:.0f}", (t.dispatch_bytes + t.combine_bytes) / t.pair_us * 1e-3),
               share_of_link(t, report), ag ? us(c.all_gather.dispatch_us) : "-",
               ag ? us(c.all_gather.combine_us) : "-", ag ? us(c.all_gather.pair_us) : "-",
               human_bytes(static_cast<double>(c.workspace_bytes))});
  }
  fmt::print("{}", table.to_string());
  fmt::print("checked   {} elements before timing, all equal to the definition\n",
             checked_elements(report.cases));
}

void fill_json(const Options& options, const ExchangeBenchReport& report, Output& output) {
  output.json["command"] = "bench exchange";
  output.json["transport"] = options.transport;
  output.json["num_ranks"] = options.ranks;
  output.json["mode"] = options.mode;
  output.json["hidden"] = options.hidden;
  for (const ExchangeBenchCase& c : report.cases) {
    nlohmann::ordered_json row = {{"tokens_per_rank", c.tokens_per_rank},
                                  {"rows", c.rows},
                                  {"checked_elements", c.checked_elements},
                                  {"workspace_bytes", c.workspace_bytes},
                                  {"host_waits", c.host_waits},
                                  {"exchange", to_json(c.exchange)}};
    if (!options.without_all_gather) row["all_gather"] = to_json(c.all_gather);
    output.json["cases"].push_back(row);
  }
  output.json["device"] = report.device;
  output.json["copy_gbytes_per_s"] = report.copy_gbytes_per_s;
  output.json["read_gbytes_per_s"] = report.read_gbytes_per_s;
  output.json["num_devices"] = report.num_devices;
  output.json["link_gbytes_per_s"] = report.link_gbytes_per_s;
  output.json["links_together_gbytes_per_s"] = report.links_together_gbytes_per_s;
}

/// On how many hosts the ranks are, for --calibrate: one, or as many as there are ranks.
/// Throws on every rank: kInvalidArgument for anything between, where a time would be of both ways.
std::size_t count_hosts(Launch& launch, std::chrono::milliseconds timeout) {
  const auto parts = launch.run_ranks([&](int, Transport& transport) {
    std::array<char, 512> name{};
    host_id().copy(name.data(), name.size() - 1);
    std::set<std::string> hosts;
    for (const auto& other : transport.all_gather(std::as_bytes(std::span(name)), timeout)) {
      hosts.emplace(reinterpret_cast<const char*>(other.data()));
    }
    const auto num_ranks = static_cast<std::size_t>(transport.num_ranks());
    if (hosts.size() != 1 && hosts.size() != num_ranks) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("--calibrate: {} ranks are on {} hosts; put all on one, or each on a "
                              "host of its own",
                              num_ranks, hosts.size()));
    }
    return std::to_string(hosts.size());
  });
  return parts.empty() ? 0 : std::stoul(parts.front());
}

/// Bytes that one rank sends to others in an operation, against its time.
std::vector<SizeTime> points_of(const Options& options, const ExchangeBenchReport& report,
                                double ExchangeBenchTimes::*bytes, double ExchangeBenchTimes::*us) {
  std::vector<SizeTime> points;
  for (const ExchangeBenchCase& c : report.cases) {
    points.push_back(
        {c.exchange.*bytes * c.exchange.off_rank_share / options.ranks, c.exchange.*us});
  }
  return points;
}

/// Lines through the times, as numbers of a machine. On one host dispatch pushes and combine pulls;
/// over the network both are one kind of crossing.
void calibrate(const Options& options, const ExchangeBenchReport& report, std::size_t num_hosts,
               Output& output) {
  const auto out = points_of(options, report, &ExchangeBenchTimes::dispatch_bytes,
                             &ExchangeBenchTimes::dispatch_us);
  const auto home = points_of(options, report, &ExchangeBenchTimes::combine_bytes,
                              &ExchangeBenchTimes::combine_us);
  auto both = out;
  both.insert(both.end(), home.begin(), home.end());
  struct Line {
    const char *what, *fixed, *rate;
    const std::vector<SizeTime>& points;
  };
  const std::vector<Line> lines =
      num_hosts == 1
          ? std::vector<Line>{{"dispatch", "dispatch_fixed_us", "push_gbytes_per_s", out},
                              {"combine", "combine_fixed_us", "pull_gbytes_per_s", home}}
          : std::vector<Line>{{"crossing", "network_latency_us", "network_gbytes_per_s", both}};
  output.json["base"] = options.machine;
  MachineModel machine = machine_preset(options.machine);
  for (const Line& line : lines) {
    const LineFit fit = fit_line(line.points);
    const double fixed = num_hosts == 1 ? fit.fixed_us
                                        : network_latency_of(machine, parse_mode(options.mode),
                                                             options.ranks, fit.fixed_us);
    set_parameter(machine, line.fixed, fixed);
    set_parameter(machine, line.rate, fit.gbytes_per_s);
    output.json["parameters"][line.fixed] = fixed;
    output.json["parameters"][line.rate] = fit.gbytes_per_s;
    output.json["fits"].push_back({{"operation", line.what},
                                   {"num_points", line.points.size()},
                                   {"rms_error", fit.rms_error},
                                   {"worst_error", fit.worst_error}});
    fmt::print(
        "fit       {}: {:.1f} us and {:.3g} GB/s to other ranks; {} times, error {:.0f} % rms, "
        "{:+.0f} % at worst\n",
        line.what, fit.fixed_us, fit.gbytes_per_s, line.points.size(), 100 * fit.rms_error,
        100 * fit.worst_error);
  }
  if (num_hosts > 1) {
    fmt::print("fit       network_latency_us {:.1f}: without what {} says of a host's own times\n",
               machine.network_latency_us, options.machine);
  }
  fmt::print("machine   {} with these numbers{}\n", options.machine,
             output.json_path.empty() ? "; --json FILE writes it for plan --machine FILE"
                                      : ": plan --machine " + output.json_path);
}

void check_calibrate(const Options& options) {
  if (!options.calibrate) return;
  (void)machine_preset(options.machine);
  const std::set<int> sizes(options.tokens.begin(), options.tokens.end());
  if (options.ranks >= 2 && sizes.size() >= 2) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("--calibrate needs two ranks and two numbers of tokens; --ranks is {}, "
                          "--tokens has {}",
                          options.ranks, sizes.size()));
}

/// Of ranks on this host, in its memory.
void check_memory(const Options& options, const ExchangeBenchConfig& config) {
  const bool is_here = options.transport == "inproc" || options.transport == "ipc";
  if (!is_here || config.device != Device::Kind::kHost) return;
  ExchangeConfig exchange = config.exchange;
  exchange.max_tokens_per_rank = std::ranges::max(options.tokens);
  const auto bytes = static_cast<double>(Exchange::workspace_bytes(exchange, options.ranks));
  require_memory(bytes * options.ranks,
                 fmt::format("exchanges of --ranks {} with --tokens {} of --hidden {}",
                             options.ranks, exchange.max_tokens_per_rank, options.hidden));
}

void run(const Options& options, Output& output) {
  const Environment environment = read_environment();
  check_transport(options.transport, options.backend);
  ExchangeBenchConfig config = resolve(options);
  check_calibrate(options);
  check_memory(options, config);
  if (ran_as_processes(options.transport, options.ranks, environment.peer_timeout, output)) {
    return;
  }
  Launch launch(options.transport, options.ranks, environment.peer_timeout, output);
  config.exchange.hosts = launch.transport_hosts();
  const std::size_t num_hosts =
      options.calibrate ? count_hosts(launch, environment.peer_timeout) : 0;
  const auto report = bench_on_ranks("bench exchange", launch, config, bench_exchange);
  if (!report) return;
  print_header(options, config, *report);
  print_cases(config, *report);
  fill_json(options, *report, output);
  if (options.calibrate) calibrate(options, *report, num_hosts, output);
}

}  // namespace

void add_bench_exchange(Command& bench, Output& output) {
  Command command =
      bench.add_subcommand("exchange", "Dispatch and combine over ranks; checked, then timed");
  const auto options = std::make_shared<Options>();
  command
      .add_option("--devices", options->devices,
                  "GPUs to spread ranks over; default: all there are")
      .range(1, 64);
  command
      .add_option("--backend", options->backend,
                  "cpu | cuda (rank r on device r modulo their number)")
      .one_of({"cpu", "cuda"})
      .shows_default();
  command
      .add_option(
          "--transport", options->transport,
          "inproc (ranks are threads, on CUDA streams of one process) | ipc (ranks are "
          "processes) | mpi (CPU: processes of mpirun) | nccl (GPUs of processes on several "
          "hosts)")
      .one_of({"inproc", "ipc", "mpi", "nccl"})
      .shows_default();
  command.add_option("--ranks", options->ranks, "Expert-parallel ranks")
      .range(1, 64)
      .shows_default();
  command.add_option("--tokens", options->tokens, "Tokens per rank, one case each")
      .comma_separated()
      .range(1, 1 << 20)
      .shows_default();
  command.add_option("--mode", options->mode, "low-latency | normal").shows_default();
  command.add_option("--wire", options->wire, "fp8 | token | pow2 | static | bf16")
      .one_of({"fp8", "token", "pow2", "static", "bf16"})
      .shows_default();
  command.add_option("--experts", options->experts, "Over all ranks")
      .range(1, 1 << 16)
      .shows_default();
  command.add_option("--topk", options->topk, "Experts per token").range(1, 32).shows_default();
  command.add_option("--hidden", options->hidden, "Channels per token")
      .range(1, 1 << 20)
      .shows_default();
  command
      .add_option("--routing", options->routing,
                  "uniform | zipf | one-expert | dead-expert | one-hot")
      .shows_default();
  command.add_option("--pairs", options->pairs, "Dispatch-combine pairs of one recording")
      .range(1, 1000)
      .shows_default();
  command.add_option("--repeat", options->repeats, "Replays of each recording")
      .range(1, 10000)
      .shows_default();
  command.add_option("--sms", options->sms, "CUDA: SMs of one rank's operation; 0 = even share")
      .non_negative()
      .shows_default();
  command.add_option("--seed", options->seed, "Seed of values and routing").shows_default();
  command.add_flag("--no-all-gather", options->without_all_gather,
                   "Leave the all-gather + reduce-scatter baseline out");
  command.add_flag("--calibrate", options->calibrate,
                   "Fit latency and rate, and write them with --json for plan --machine");
  command
      .add_option("--machine", options->machine,
                  "--calibrate: the preset that all other numbers of the machine are of")
      .shows_default();
  command.on_parsed([options, &output] { run(*options, output); });
}

}  // namespace sluice::cli
