#include "plan_hosts.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <set>

#include "command.h"
#include "report.h"
#include "sluice/balance.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/lab/network_model.h"
#include "sluice/lab/workload.h"
#include "sluice/layer.h"
#include "sluice/placement_files.h"

namespace sluice::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kNote = "a prediction: over real hosts nothing of Sluice has been timed";

constexpr int kSampledTokens = 16384;  // Standard error of hosts per token: below 0.02.

template <class... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> text, Args&&... args) {
  throw Error(ErrorCode::kInvalidArgument, fmt::format(text, std::forward<Args>(args)...));
}

/// --machine, a preset or a file, with what --set says.
MachineModel resolve_machine(const HostsOptions& options) {
  const std::vector<std::string> names = machine_names();
  const bool is_preset = std::ranges::find(names, options.machine) != names.end();
  if (!is_preset && (!std::filesystem::exists(options.machine) ||
                     std::filesystem::is_directory(options.machine))) {
    refuse("--machine '{}' is no file, and none of: {}", options.machine, fmt::join(names, ", "));
  }
  MachineModel machine =
      is_preset ? machine_preset(options.machine) : read_machine(options.machine);
  std::set<std::string> given;
  for (const std::string& text : options.set) {
    const std::size_t equal = text.find('=');
    double value = 0;
    const char* const end = text.data() + text.size();
    if (equal == std::string::npos) refuse("--set '{}' is not NAME=NUMBER", text);
    const auto parsed = std::from_chars(text.data() + equal + 1, end, value);
    if (parsed.ec != std::errc() || parsed.ptr != end || !std::isfinite(value)) {
      refuse("--set '{}' is not NAME=NUMBER", text);
    }
    const std::string name = text.substr(0, equal);
    if (!given.insert(name).second) refuse("--set: {} is given twice", name);
    set_parameter(machine, name, value);
  }
  return machine;
}

/// Rows of each expert in --counts, of all its layers and steps.
std::vector<std::int64_t> read_counts(const HostsOptions& options, int num_experts) {
  const ExpertRows rows = read_expert_rows(options.counts);
  if (rows.num_experts != num_experts) {
    refuse("--counts {} is of {} experts, the model has {}", options.counts, rows.num_experts,
           num_experts);
  }
  std::vector<std::int64_t> sum(static_cast<std::size_t>(num_experts));
  for (const LayerRows& layer : rows.layers) {
    const std::vector<std::int64_t> some = layer.sum();
    for (std::size_t e = 0; e < sum.size(); ++e) sum[e] += some[e];
  }
  return sum;
}

struct Routed {
  std::string about;
  TokenSpread spread;
};

/// Where experts are and where tokens go.
Routed route(const HostsOptions& options, const HostsPlan& plan) {
  const ModelGeometry& g = plan.geometry;
  const RoutingRule rule{.num_experts = g.num_experts,
                         .num_topk = g.num_topk,
                         .num_groups = options.groups,
                         .num_topk_groups = options.topk_groups};
  std::vector<std::int64_t> rows(static_cast<std::size_t>(g.num_experts), 1000);
  std::vector<std::int32_t> topk;
  std::string about = "uniform";
  const bool is_grouped = options.groups > 1;
  if (!options.counts.empty()) {
    rows = read_counts(options, g.num_experts);
    topk = sample_routing(rule, rows, kSampledTokens, options.seed);
    about = fmt::format("as {} counts", options.counts);
  } else if (options.routing == "zipf") {
    if (is_grouped) refuse("--routing zipf knows no groups; --groups is {}", options.groups);
    topk = make_workload({.num_experts = g.num_experts,
                          .num_topk = g.num_topk,
                          .hidden = 128,
                          .routing = RoutingKind::kZipf,
                          .seed = options.seed},
                         0, kSampledTokens)
               .topk_idx;
    std::ranges::fill(rows, 0);
    for (const std::int32_t e : topk) ++rows[static_cast<std::size_t>(e)];
    about = "zipf";
  }
  if (is_grouped) {
    about += fmt::format(", {} of {} groups", options.topk_groups, options.groups);
  }
  const Placement placement =
      plan.slots == g.num_experts
          ? Placement::identity(g.num_experts, plan.ranks)
          : balance(rows, {.num_ranks = plan.ranks, .num_slots = plan.slots});
  if (is_grouped && topk.empty()) topk = sample_routing(rule, rows, kSampledTokens, options.seed);
  if (topk.empty()) return {about, even_spread(rule, placement, options.hosts)};
  const int tokens_per_rank = (kSampledTokens + plan.ranks - 1) / plan.ranks;
  return {about + fmt::format(", {} tokens sampled", kSampledTokens),
          count_spread(topk, g.num_topk, tokens_per_rank, placement, options.hosts)};
}

std::string us(double value) {
  return value < 100 ? fmt::format("{:.1f}", value) : fmt::format("{:.0f}", value);
}

Json shares_json(const TimeShares& s) {
  return {{"latency_us", s.latency_us}, {"network_us", s.network_us},
          {"link_us", s.link_us},       {"memory_us", s.memory_us},
          {"weights_us", s.weights_us}, {"products_us", s.products_us}};
}

struct Case {
  ClusterLayer layer;
  LayerPrediction p = {};
  std::size_t exchange_bytes = 0;  ///< Of each rank, in memory of its GPU.
  std::string refused = {};  ///< Why an exchange in CUDA memory does not take the layer today.
  std::vector<Sensitivity> changes = {};
};

Json case_json(const Case& c) {
  const auto step = [](const StepPrediction& s) {
    return Json{{"us", s.total_us},
                {"latency_us", s.latency_us},
                {"network_us", s.network_us},
                {"link_us", s.link_us},
                {"memory_us", s.memory_us},
                {"network_bytes_per_rank", s.network_bytes},
                {"link_bytes_per_rank", s.link_bytes}};
  };
  Json json = {{"mode", to_string(c.layer.mode)},
               {"tokens_per_rank", c.layer.tokens_per_rank},
               {"rows_per_slot", c.p.rows_per_expert},
               {"dispatch", step(c.p.dispatch)},
               {"stage_us", c.p.stage_us},
               {"combine", step(c.p.combine)},
               {"layer_us", c.p.layer_us},
               {"network_bytes_per_host", c.p.bytes_per_host},
               {"exchange_bytes", c.refused.empty() ? Json(c.exchange_bytes) : Json(nullptr)},
               {"shares", shares_json(c.p.shares)},
               {"bound", c.p.bound}};
  if (!c.refused.empty()) json["exchange_refused"] = c.refused;
  for (const Sensitivity& s : c.changes) {
    json["sensitivity"].push_back(
        {{"parameter", s.parameter->name}, {"less_us", s.less_us}, {"more_us", s.more_us}});
  }
  return json;
}

void print_cases(const std::vector<Case>& cases) {
  Table table({"mode", "tokens", "rows", "dispatch", "stage", "combine", "layer", "MB/host",
               "latency", "network", "inside", "weights", "products"});
  for (const Case& c : cases) {
    const auto share = [&](double part) {
      return fmt::format("{:.0f} %", 100 * part / c.p.layer_us);
    };
    const TimeShares& s = c.p.shares;
    table.add({to_string(c.layer.mode), fmt::format("{}", c.layer.tokens_per_rank),
               fmt::format("{:.1f}", c.p.rows_per_expert), us(c.p.dispatch.total_us),
               us(c.p.stage_us), us(c.p.combine.total_us), us(c.p.layer_us),
               fmt::format("{:.1f}", c.p.bytes_per_host * 1e-6), share(s.latency_us),
               share(s.network_us), share(s.link_us + s.memory_us), share(s.weights_us),
               share(s.products_us)});
  }
  fmt::print(
      "tokens    of each rank; rows of each expert slot; times in us; MB that a host sends to "
      "others; "
      "parts of the layer\n");
  fmt::print("{}", table.to_string());
}

/// For the last case of each mode, side by side: what a layer's time becomes.
void print_sensitivities(const MachineModel& machine, const std::vector<const Case*>& cases) {
  std::vector<std::string> head = {"parameter", "value", "unit"};
  for (const Case* c : cases) {
    const std::string name =
        fmt::format("{} {}", to_string(c->layer.mode), c->layer.tokens_per_rank);
    head.push_back(name + ": -30 %"), head.push_back("+30 %");
  }
  Table table(head);
  for (const MachineParameter& p : machine_parameters()) {
    std::vector<std::string> row = {p.name, fmt::format("{:g}", machine.*p.value), p.unit};
    bool changes = false;
    for (const Case* c : cases) {
      const auto found = std::ranges::find(c->changes, &p, &Sensitivity::parameter);
      const bool is_here = found != c->changes.end();
      changes |= is_here;
      for (const double change : {is_here ? found->less_us : 0, is_here ? found->more_us : 0}) {
        row.push_back(fmt::format("{:+.1f} %", 100 * change / c->p.layer_us));
      }
    }
    if (changes) table.add(row);
  }
  fmt::print("A layer takes longer by, if one number of the machine were 30 % less or more:\n{}",
             table.to_string());
}

/// Exchange of the case, as the layer's group would take it on GPUs: every preset is of these, also
/// the one that a file's other numbers are of.
void plan_exchange(Case& c, int num_slots) {
  const ClusterLayer& layer = c.layer;
  LayerGroupConfig config{.geometry = layer.geometry};
  config.num_slots = num_slots;
  if (layer.num_hosts > 1) config.hosts = Hosts::even(layer.num_hosts, layer.num_ranks);
  config.sum_parts = layer.sum_parts;
  PlannedLayer planned{.weight_format = layer.geometry.weight_format,
                       .group_size = layer.geometry.group_size};
  planned.recipes.dispatch_dtype = read_environment().dispatch_dtype;
  if (layer.mode == Mode::kLowLatency) {
    config.low_latency.max_tokens_per_rank = layer.tokens_per_rank;
    planned.recipes.low_latency = layer.recipe;
  } else {
    config.normal.max_tokens_per_rank = layer.tokens_per_rank;
    planned.recipes.normal = layer.recipe;
  }
  const std::vector layers = {planned};
  // Throws for what no device takes.
  (void)LayerGroup::plan_memory(config, layers, Device::Kind::kHost, layer.num_ranks);
  try {
    c.exchange_bytes = LayerGroup::plan_memory(config, layers, Device::Kind::kCuda, layer.num_ranks)
                           .exchange_bytes;
  } catch (const Error& error) {  // Time is predicted all the same.
    if (error.code() != ErrorCode::kInvalidArgument && error.code() != ErrorCode::kUnsupported) {
      throw;
    }
    c.refused = error.what();
  }
}

std::vector<Case> predict_cases(const HostsOptions& options, const HostsPlan& plan,
                                const MachineModel& machine, const TokenSpread& spread) {
  std::vector<Case> cases;
  for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
    if (plan.mode != "both" && parse_mode(plan.mode) != mode) continue;
    std::vector<int> tokens = plan.tokens;
    if (tokens.empty()) {
      tokens = mode == Mode::kLowLatency ? std::vector{1, 16, 64, 128} : std::vector{1024, 4096};
    }
    for (const int t : tokens) {
      Case c{.layer = {.geometry = plan.geometry,
                       .recipe = parse_recipe(plan.recipe),
                       .mode = mode,
                       .num_hosts = options.hosts,
                       .num_ranks = plan.ranks,
                       .tokens_per_rank = t,
                       .sum_parts = options.sum_parts}};
      if (mode == Mode::kLowLatency) c.layer.piece_tokens = std::min(options.piece_tokens, t);
      c.p = predict_layer(machine, c.layer, spread);
      c.changes = sensitivities(machine, c.layer, spread);
      plan_exchange(c, plan.slots);
      cases.push_back(std::move(c));
    }
  }
  return cases;
}

void print_head(const HostsOptions& options, const HostsPlan& plan, const MachineModel& machine,
                const Routed& routed) {
  const ModelGeometry& g = plan.geometry;
  fmt::print("plan      {} over {} of {}: EP{}, {} experts in {} slots, top-{}, recipe {}\n",
             g.name, counted(options.hosts, "host"), counted(plan.ranks / options.hosts, "rank"),
             plan.ranks, g.num_experts, plan.slots, g.num_topk, plan.recipe);
  fmt::print("machine   {}: {}\n", machine.name, machine.about);
  const double own = 1.0 / options.hosts;
  fmt::print("routing   {}: a token needs {:.2f} other hosts and {:.2f} ranks\n", routed.about,
             routed.spread.hosts_per_token() * (1 - own), routed.spread.ranks_per_token());
  if (options.hosts > 1) fmt::print("note      {}\n", kNote);
}

}  // namespace

void plan_hosts(const HostsOptions& options, const HostsPlan& plan_in, Output& output) {
  HostsPlan plan = plan_in;
  const bool has_ranks = plan.ranks != 0;
  if (!has_ranks) plan.ranks = 8 * options.hosts;
  if (plan.ranks % options.hosts != 0) {
    refuse("--ranks {} is no multiple of --hosts {}", plan.ranks, options.hosts);
  }
  const int num_experts = plan.geometry.num_experts;
  if (plan.slots == 0) {
    plan.slots = num_experts;
    if (num_experts % plan.ranks != 0) {
      const int slots = (num_experts + plan.ranks - 1) / plan.ranks * plan.ranks;
      if (has_ranks) {
        refuse("--ranks {} does not divide {} experts; give --slots, at least {}", plan.ranks,
               num_experts, slots);
      }
      refuse(
          "{} ranks, 8 for each of --hosts {}, do not divide {} experts; give --ranks, or "
          "--slots, at least {}",
          plan.ranks, options.hosts, num_experts, slots);
    }
  }
  if (options.piece_tokens != 0 && (plan.mode == "normal" || options.hosts == 1)) {
    refuse("--piece-tokens {} is for low-latency mode over several hosts; --mode {}, --hosts {}",
           options.piece_tokens, plan.mode, options.hosts);
  }
  const MachineModel machine = resolve_machine(options);
  const Routed routed = route(options, plan);
  const std::vector<Case> cases = predict_cases(options, plan, machine, routed.spread);
  print_head(options, plan, machine, routed);
  print_cases(cases);
  std::vector<const Case*> last;
  for (const Case& c : cases) {
    if (last.empty() || last.back()->layer.mode != c.layer.mode) last.push_back(&c);
    last.back() = &c;
  }
  for (const Case* c : last) {
    fmt::print("bound     {}, {} tokens: {}\n", to_string(c->layer.mode), c->layer.tokens_per_rank,
               c->p.bound);
  }
  for (const Case* c : last) {
    fmt::print("memory    {}, {} tokens: {}\n", to_string(c->layer.mode), c->layer.tokens_per_rank,
               c->refused.empty() ? fmt::format("the exchange takes {} of each GPU",
                                                human_bytes(static_cast<double>(c->exchange_bytes)))
                                  : fmt::format("refused today: {}", c->refused));
  }
  print_sensitivities(machine, last);
  Json parameters;
  for (const MachineParameter& p : machine_parameters()) parameters[p.name] = machine.*p.value;
  output.json = {{"command", "plan"},
                 {"model", plan.geometry.name},
                 {"recipe", plan.recipe},
                 {"hosts", options.hosts},
                 {"ranks", plan.ranks},
                 {"slots", plan.slots},
                 {"machine", machine.name},
                 {"parameters", parameters},
                 {"routing",
                  {{"about", routed.about},
                   {"hosts_per_token", routed.spread.hosts_per_token()},
                   {"ranks_per_token", routed.spread.ranks_per_token()},
                   {"standard_error", routed.spread.standard_error}}}};
  if (options.hosts > 1) output.json["note"] = kNote;
  for (const Case& c : cases) output.json["cases"].push_back(case_json(c));
}

}  // namespace sluice::cli
