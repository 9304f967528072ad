// Dispatch, combine and the layer, from bytes and rates. docs/clusters.md has these formulas in
// words, with the reason for each.
#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "core/fail.h"
#include "exchange/sum_parts.h"
#include "network/model_parts.h"
#include "network/traffic.h"
#include "sluice/lab/network_model.h"

namespace sluice {
namespace {

double microseconds(double bytes, double gbytes_per_s) {
  return bytes > 0 ? bytes / (1e3 * gbytes_per_s) : 0.0;
}

/// Two steps, of which the share `overlap` of the shorter one lies beside the longer one.
double together(double a, double b, double overlap) {
  return a + b - overlap * std::min(a, b);
}

/// Latencies of one crossing of the network, without its bytes.
double network_latency(const MachineModel& machine, const ClusterLayer& layer) {
  if (layer.num_hosts == 1) return 0;
  return machine.network_latency_us + (layer.num_hosts - 1) * machine.network_peer_us;
}

/// Tokens go to rows in a kernel of their own, and counts cross the network before them.
bool copies_tokens(const MachineModel& machine, Mode mode) {
  return mode == Mode::kNormal && machine.rules == ExchangeRules::kSluice;
}

void check_network(const MachineModel& machine, const ClusterLayer& layer) {
  check_argument(layer.num_hosts == 1 || machine.network_gbytes_per_s > 0,
                 "machine {} has no network between hosts: network_gbytes_per_s is 0, num_hosts {}",
                 machine.name, layer.num_hosts);
  const bool has_link = layer.num_ranks / layer.num_hosts > machine.ranks_per_device;
  check_argument(
      !has_link || (machine.push_gbytes_per_s > 0 && machine.pull_gbytes_per_s > 0),
      "machine {} has no link between devices: push_gbytes_per_s or pull_gbytes_per_s is "
      "0, and a host has {} ranks",
      machine.name, layer.num_ranks / layer.num_hosts);
}

/// By the exchange's own check.
void check_sum_parts(const ClusterLayer& layer, std::size_t num_slots) {
  (void)SumParts({.num_experts = layer.geometry.num_experts,
                  .num_slots = static_cast<int>(num_slots),
                  .hosts = Hosts::even(layer.num_hosts, layer.num_ranks),
                  .sum_parts = layer.sum_parts},
                 layer.num_ranks);
}

/// A piece has room for what the fullest host needs on average: with less, most would overflow.
void check_piece(const ClusterLayer& layer, const TokenSpread& spread) {
  if (layer.piece_tokens == 0) return;
  check_argument(layer.mode == Mode::kLowLatency && layer.num_hosts > 1,
                 "piece_tokens {} is of low-latency mode over several hosts; mode {}, num_hosts {}",
                 layer.piece_tokens, to_string(layer.mode), layer.num_hosts);
  const int tokens = layer.tokens_per_rank;
  const double records = tokens * *std::ranges::max_element(spread.hosts);
  const int least = std::clamp(static_cast<int>(std::ceil(records - 1e-6)), 1, tokens);
  check_argument(layer.piece_tokens >= least && layer.piece_tokens <= tokens,
                 "piece_tokens {} is not in {} .. {}: of {} tokens, {:.1f} need the fullest host "
                 "on average",
                 layer.piece_tokens, least, tokens, tokens, records);
}

}  // namespace

double largest_sum(std::span<const double> values, std::size_t num_parts) {
  const std::size_t size = values.size() / num_parts;
  double largest = 0;
  for (std::size_t p = 0; p < num_parts; ++p) {
    largest = std::max(largest, sum_of(values.subspan(p * size, size)));
  }
  return largest;
}

void check_layer(const MachineModel& machine, const ClusterLayer& layer,
                 const TokenSpread& spread) {
  check_argument(layer.num_hosts >= 1, "num_hosts {}; at least one", layer.num_hosts);
  check_argument(layer.num_ranks >= 1 && layer.num_ranks % layer.num_hosts == 0,
                 "num_ranks {} is no multiple of num_hosts {}", layer.num_ranks, layer.num_hosts);
  check_argument(layer.tokens_per_rank >= 1, "tokens_per_rank {}; at least one",
                 layer.tokens_per_rank);
  const int ranks_per_host = layer.num_ranks / layer.num_hosts;
  check_argument(machine.ranks_per_device >= 1 && ranks_per_host % machine.ranks_per_device == 0,
                 "machine {} has {} ranks on a device, which do not divide the {} of a host",
                 machine.name, machine.ranks_per_device, ranks_per_host);
  check_argument(spread.hosts.size() == static_cast<std::size_t>(layer.num_hosts) &&
                     spread.ranks.size() == static_cast<std::size_t>(layer.num_ranks) &&
                     !spread.slots.empty() && spread.slots.size() % spread.ranks.size() == 0,
                 "the spread is of {} hosts, {} ranks and {} slots; the layer has {} and {}",
                 spread.hosts.size(), spread.ranks.size(), spread.slots.size(), layer.num_hosts,
                 layer.num_ranks);
  check_sum_parts(layer, spread.slots.size());
  check_piece(layer, spread);
}

StepPrediction predict_dispatch(const MachineModel& machine, const ClusterLayer& layer,
                                const TokenSpread& spread) {
  check_layer(machine, layer, spread);
  check_network(machine, layer);
  const TrafficModel traffic(machine, layer, spread);
  const Moved network = traffic.network_dispatch(), link = traffic.link_dispatch();
  const bool copies = copies_tokens(machine, layer.mode);
  StepPrediction step{.latency_us = machine.dispatch_fixed_us + network_latency(machine, layer),
                      .network_us = microseconds(network.most, machine.network_gbytes_per_s),
                      .link_us = microseconds(link.most, machine.push_gbytes_per_s),
                      .network_bytes = network.mean,
                      .link_bytes = link.mean};
  if (copies) {
    step.latency_us += machine.normal_fixed_us;
    // Counts go first, and the CPU has to know them before the rows leave.
    if (layer.num_hosts > 1)
      step.latency_us += network_latency(machine, layer) + machine.host_sync_us;
  }
  double place = 0, copy = 0;
  if (machine.rules == ExchangeRules::kSluice) {
    place = microseconds(traffic.place_bytes(), machine.place_gbytes_per_s);
    if (copies) copy = microseconds(traffic.copy_bytes(), machine.memory_gbytes_per_s);
  }
  const double inside = std::max(step.link_us, place);
  step.memory_us = place + copy;
  step.total_us = step.latency_us + together(step.network_us, inside, machine.overlap) + copy;
  return step;
}

StepPrediction predict_combine(const MachineModel& machine, const ClusterLayer& layer,
                               const TokenSpread& spread) {
  check_layer(machine, layer, spread);
  check_network(machine, layer);
  const TrafficModel traffic(machine, layer, spread);
  const Moved network = traffic.network_combine(), link = traffic.link_combine();
  StepPrediction step{.latency_us = machine.combine_fixed_us + network_latency(machine, layer),
                      .network_us = microseconds(network.most, machine.network_gbytes_per_s),
                      .link_us = microseconds(link.most, machine.pull_gbytes_per_s),
                      .network_bytes = network.mean,
                      .link_bytes = link.mean};
  if (machine.rules == ExchangeRules::kSluice) {
    step.memory_us =
        microseconds(traffic.sum_bytes(traffic.own_share()), machine.memory_gbytes_per_s);
  }
  const double inside = std::max(step.link_us, step.memory_us);
  step.total_us = step.latency_us + together(step.network_us, inside, machine.overlap);
  return step;
}

double network_latency_of(const MachineModel& machine, Mode mode, int num_hosts, double fixed_us) {
  check_argument(num_hosts >= 2, "num_hosts {}: a network has at least 2", num_hosts);
  // Both steps together, as they are predicted above.
  double others = machine.dispatch_fixed_us + machine.combine_fixed_us;
  int num_crossings = 2;
  if (copies_tokens(machine, mode)) {
    others += machine.normal_fixed_us + machine.host_sync_us;
    num_crossings = 3;
  }
  const double crossing = (2 * fixed_us - others) / num_crossings;
  return std::max(0.0, crossing - (num_hosts - 1) * machine.network_peer_us);
}

namespace {

/// What each part of a step takes of its time: of two that lie beside each other the longer one
/// counts, and the shorter one as far as it sticks out.
void add_step(const MachineModel& machine, const StepPrediction& step, TimeShares& shares) {
  shares.latency_us += step.latency_us;
  const double rest = step.total_us - step.latency_us;
  if (rest <= 0) return;
  const double inside = std::max(step.link_us, std::min(step.memory_us, rest));
  const double shorter = std::min(step.network_us, inside) * (1 - machine.overlap);
  const double network = step.network_us >= inside ? step.network_us : shorter;
  shares.network_us += std::min(network, rest);
  const double left = rest - std::min(network, rest);
  const double link = step.link_us >= step.memory_us ? left : std::min(left, step.link_us);
  shares.link_us += link, shares.memory_us += left - link;
}

/// On one host a layer's rows leave from the experts' kernel, so their way home lies beside it.
void add_rows_from_experts(const MachineModel& machine, const ClusterLayer& layer,
                           const TokenSpread& spread, const StagePrediction& stage,
                           LayerPrediction& result) {
  const TrafficModel traffic(machine, layer, spread);
  const double home = microseconds(traffic.link_combine().most, machine.push_gbytes_per_s);
  const double experts = stage.weights_us + stage.products_us;
  const double late = std::max(0.0, home - experts);
  const double sum = microseconds(traffic.sum_bytes(1), machine.memory_gbytes_per_s);
  result.shares.link_us += late, result.shares.memory_us += sum;
  result.shares.latency_us += machine.combine_fixed_us;
  result.layer_us += late + sum + machine.combine_fixed_us;
}

/// The largest part of a layer's time. Experts and steps inside a host are one part each, named
/// with the larger of the two numbers that they are the sum of.
std::string bound_of(const TimeShares& s) {
  const std::array<std::pair<double, const char*>, 4> parts{
      {{s.latency_us, "latency"},
       {s.network_us, "network"},
       {s.link_us + s.memory_us,
        s.link_us >= s.memory_us ? "inside a host (link)" : "inside a host (memory)"},
       {s.weights_us + s.products_us,
        s.weights_us >= s.products_us ? "experts (weights)" : "experts (products)"}}};
  return std::ranges::max_element(parts, {}, [](const auto& p) { return p.first; })->second;
}

}  // namespace

LayerPrediction predict_layer(const MachineModel& machine, const ClusterLayer& layer,
                              const TokenSpread& spread) {
  LayerPrediction result;
  result.dispatch = predict_dispatch(machine, layer, spread);
  result.combine = predict_combine(machine, layer, spread);
  const StagePrediction stage = predict_stage_parts(machine, layer, spread);
  result.stage_us = stage.weights_us + stage.products_us + stage.cast_us;
  result.layer_us = result.dispatch.total_us + result.stage_us;
  TimeShares& shares = result.shares;
  add_step(machine, result.dispatch, shares);
  shares.weights_us = stage.weights_us, shares.products_us = stage.products_us;
  shares.memory_us += stage.cast_us;
  const bool leaves_early = machine.rules == ExchangeRules::kSluice && layer.num_hosts == 1 &&
                            layer.recipe.gemm1 == Cast::kNone;
  if (leaves_early) {
    add_rows_from_experts(machine, layer, spread, stage, result);
  } else {
    add_step(machine, result.combine, shares);
    result.layer_us += result.combine.total_us;
  }
  result.rows_per_expert = static_cast<double>(layer.tokens_per_rank) * layer.num_ranks *
                           sum_of(spread.slots) / static_cast<double>(spread.slots.size());
  result.hosts_per_token = spread.hosts_per_token() * (layer.num_hosts - 1) / layer.num_hosts;
  result.bytes_per_host = (result.dispatch.network_bytes + result.combine.network_bytes) *
                          layer.num_ranks / layer.num_hosts;
  result.bound = bound_of(shares);
  return result;
}

std::vector<Sensitivity> sensitivities(const MachineModel& machine, const ClusterLayer& layer,
                                       const TokenSpread& spread) {
  const double now = predict_layer(machine, layer, spread).layer_us;
  std::vector<Sensitivity> result;
  for (const MachineParameter& parameter : machine_parameters()) {
    if (machine.*parameter.value == 0) continue;
    Sensitivity one{.parameter = &parameter};
    for (const auto& [factor, change] :
         {std::pair{0.7, &Sensitivity::less_us}, std::pair{1.3, &Sensitivity::more_us}}) {
      MachineModel other = machine;
      other.*parameter.value = std::min(parameter.high, machine.*parameter.value * factor);
      one.*change = predict_layer(other, layer, spread).layer_us - now;
    }
    if (one.less_us != 0 || one.more_us != 0) result.push_back(one);
  }
  std::ranges::stable_sort(result, std::greater{}, [](const Sensitivity& s) {
    return std::max(std::fabs(s.less_us), std::fabs(s.more_us));
  });
  return result;
}

}  // namespace sluice
