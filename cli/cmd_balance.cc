// sluice balance - from rows of experts to a placement: what it gives, as a table, JSON, a picture.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <numeric>

#include "command.h"
#include "report.h"
#include "report/placement_report.h"
#include "sluice/balance.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/lab/files.h"
#include "sluice/placement_files.h"

namespace sluice::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string counts, previous, out, html;
  int ranks = 0, slots = 0, hosts = 1, groups = 0, window = 0;
};

/// What the file --previous has of a layer; without one, experts in their order, each once.
Placement placement_before(const std::vector<LayerPlacement>& previous, const Options& options,
                           int num_experts, int layer) {
  if (previous.empty()) return Placement::even(num_experts, options.ranks, options.slots);
  const auto found = std::ranges::find(previous, layer, &LayerPlacement::layer);
  if (found == previous.end()) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("--previous {} has no layer {}", options.previous, layer));
  }
  return found->placement;
}

struct Balanced {
  const LayerRows* rows;
  std::vector<std::int64_t> seen;  ///< [num_experts] what the placement was made from.
  Placement before, after;
};

Json slots_json(const Placement& placement) {
  Json slots = Json::array();
  for (const int e : placement.slot_experts()) slots.push_back(e == kEmptySlot ? Json() : Json(e));
  return slots;
}

Json state_json(const Balanced& b, const Placement& placement) {
  const std::vector<double> rows = expected_rows(b.seen, placement);
  return {{"max_over_mean", max_over_mean(rows)},
          {"rows_per_rank", rows},
          {"slot_experts", slots_json(placement)}};
}

std::vector<double> over_steps(const Balanced& b, const Placement& placement) {
  std::vector<double> values;
  for (const auto& step : b.rows->steps) {
    values.push_back(max_over_mean(expected_rows(step, placement)));
  }
  return values;
}

/// Slots beyond an expert's first, and slots without one.
std::pair<int, int> count_spare(const Placement& placement) {
  const auto num_empty = static_cast<int>(std::ranges::count(placement.slot_experts(), kEmptySlot));
  return {placement.num_slots() - placement.num_experts() - num_empty, num_empty};
}

Json layer_json(const Balanced& b) {
  const auto [num_replicas, num_empty] = count_spare(b.after);
  return {{"layer", b.rows->layer},
          {"rows", std::accumulate(b.seen.begin(), b.seen.end(), std::int64_t{0})},
          {"rows_per_expert", b.seen},
          {"before", state_json(b, b.before)},
          {"after", state_json(b, b.after)},
          {"steps", {{"before", over_steps(b, b.before)}, {"after", over_steps(b, b.after)}}},
          {"num_replicas", num_replicas},
          {"num_empty", num_empty},
          {"num_moves", count_moves(b.before, b.after)}};
}

void print(const Options& options, const ExpertRows& rows, const Json& json) {
  const std::size_t num_steps = rows.layers.front().steps.size();
  fmt::print("counts    {}: {} of {}, the last {} of {}\n", options.counts,
             counted(rows.layers.size(), "layer"), counted(rows.num_experts, "expert"),
             json.at("window").get<int>(), counted(num_steps, "step"));
  fmt::print("slots     {} on {}, {}: {} on each rank, {} more than experts\n", options.slots,
             counted(options.ranks, "rank"), counted(options.hosts, "host"),
             options.slots / options.ranks, options.slots - rows.num_experts);
  Table table({"layer", "rows", "fullest/mean before", "after", "replicas", "empty", "travel"});
  double before = 0, after = 0;
  std::int64_t moves = 0;
  for (const Json& layer : json.at("layers")) {
    const auto was = layer.at("before").at("max_over_mean").get<double>();
    const auto is = layer.at("after").at("max_over_mean").get<double>();
    before = std::max(before, was), after = std::max(after, is);
    moves += layer.at("num_moves").get<std::int64_t>();
    table.add({layer.at("layer").dump(), layer.at("rows").dump(), fmt::format("{:.3f}", was),
               fmt::format("{:.3f}", is), layer.at("num_replicas").dump(),
               layer.at("num_empty").dump(), layer.at("num_moves").dump()});
  }
  fmt::print("{}", table.to_string());
  fmt::print("expected  fullest rank over the mean, worst layer: {:.3f} before, {:.3f} after\n",
             before, after);
  fmt::print("moves     {} to other ranks; before: {}\n", counted(moves, "expert"),
             json.at("previous").get<std::string>());
  fmt::print("time      {} balanced in {:.2f} ms\n", counted(rows.layers.size(), "layer"),
             json.at("balance_us").get<double>() * 1e-3);
}

void write_html(const std::string& path, const Json& json) {
  write_file(path, report::placement_report(json));
  fmt::print("report    {}\n", path);
}

void balance_layers(const Options& options, Output& output) {
  const ExpertRows rows = read_expert_rows(options.counts);
  std::vector<LayerPlacement> previous;
  if (!options.previous.empty()) previous = read_placements(options.previous);
  const BalanceConfig config{.num_ranks = options.ranks,
                             .num_slots = options.slots,
                             .num_hosts = options.hosts,
                             .num_groups = options.groups};
  std::vector<Balanced> layers;
  double microseconds = 0;
  for (const LayerRows& layer : rows.layers) {
    Balanced b{.rows = &layer,
               .seen = layer.sum(options.window),
               .before = placement_before(previous, options, rows.num_experts, layer.layer),
               .after = {}};
    const auto begin = std::chrono::steady_clock::now();
    b.after = balance(b.seen, config, b.before);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    microseconds += took.count();
    layers.push_back(std::move(b));
  }
  const auto num_steps = static_cast<int>(rows.layers.front().steps.size());
  output.json = {{"command", "balance"},
                 {"version", version()},
                 {"counts", options.counts},
                 {"previous", options.previous.empty() ? "experts in their order, each once"
                                                       : options.previous},
                 {"num_experts", rows.num_experts},
                 {"num_ranks", options.ranks},
                 {"num_slots", options.slots},
                 {"num_hosts", options.hosts},
                 {"num_groups", options.groups},
                 {"window", options.window == 0 ? num_steps : options.window},
                 {"balance_us", microseconds}};
  for (const Balanced& b : layers) output.json["layers"].push_back(layer_json(b));
  print(options, rows, output.json);
  if (!options.out.empty()) {
    std::vector<LayerPlacement> placements;
    for (const Balanced& b : layers) placements.push_back({b.rows->layer, b.after});
    write_placements(options.out, placements);
    fmt::print("written   {}\n", options.out);
  }
  if (!options.html.empty()) write_html(options.html, output.json);
}

}  // namespace

void add_balance(Command& program, Output& output) {
  Command command =
      program.add_subcommand("balance", "Which experts to repeat and where to put them");
  const auto options = std::make_shared<Options>();
  command
      .add_option("--counts", options->counts,
                  "Rows of the experts of each layer, e.g. of run --expert-rows")
      .required()
      .existing_file();
  command.add_option("--ranks", options->ranks, "Expert-parallel ranks")
      .required()
      .range(1, int{BalanceConfig::kMaxRanks});
  command
      .add_option("--slots", options->slots,
                  "Room for experts on all ranks together: a multiple of the ranks")
      .required()
      .range(1, 1 << 16);
  command
      .add_option("--hosts", options->hosts,
                  "Hosts of the ranks; all replicas of an expert are then on one of them")
      .range(1, int{BalanceConfig::kMaxRanks})
      .shows_default();
  command
      .add_option("--groups", options->groups,
                  "Groups of consecutive experts that stay on one host; 0: every expert by itself")
      .non_negative()
      .shows_default();
  command
      .add_option("--window", options->window,
                  "Balance the last steps of the file, so many; 0: all of them")
      .non_negative()
      .shows_default();
  command
      .add_option("--previous", options->previous,
                  "The placement of now: experts stay where they are as far as that costs nothing; "
                  "--out may take its place")
      .existing_file()
      .gives_way_to("--out");
  command.add_option("--out", options->out, "Write the placement to FILE")
      .type_name("FILE")
      .writable_file();
  command.add_option("--html", options->html, "Write a report with pictures to FILE")
      .type_name("FILE")
      .writable_file();
  command.on_parsed([options, &output] { balance_layers(*options, output); });
}

}  // namespace sluice::cli
