// The model's bytes against the exchange's own functions of bytes, for every recipe, mode and order
// of the sum: the model has the formulas of its own, since it needs them for expectations.
#include <gtest/gtest.h>

#include "sluice/lab/network_model.h"
#include "sluice/network_bytes.h"

namespace sluice {
namespace {

constexpr int kTokens = 96;

ClusterLayer layer_of(const Recipe& recipe, Mode mode, int hosts, int ranks, int sum_parts) {
  return {.geometry = preset_geometry("r1-layer"),
          .recipe = recipe,
          .mode = mode,
          .num_hosts = hosts,
          .num_ranks = ranks,
          .tokens_per_rank = kTokens,
          .sum_parts = sum_parts};
}

ExchangeConfig config_of(const ClusterLayer& layer) {
  return {.mode = layer.mode,
          .wire = layer.recipe.wire,
          .num_experts = layer.geometry.num_experts,
          .num_topk = layer.geometry.num_topk,
          .hidden = layer.geometry.hidden,
          .max_tokens_per_rank = layer.tokens_per_rank,
          .hosts = Hosts::even(layer.num_hosts, layer.num_ranks),
          .sum_parts = layer.sum_parts};
}

/// What the exchange sends if `share` of a rank's tokens need another host, with `entries` each.
double exchange_dispatch(const ExchangeConfig& config, const ClusterLayer& layer, double share) {
  const double others = layer.num_hosts - 1;
  if (layer.mode == Mode::kLowLatency) {
    return others * static_cast<double>(network_dispatch_piece_bytes(config));
  }
  const double none = static_cast<double>(network_dispatch_bytes(config, 0));
  const double each = static_cast<double>(network_dispatch_bytes(config, 1)) - none;
  return others * (none + kTokens * share * each);
}

double exchange_combine(const ExchangeConfig& config, const ClusterLayer& layer, double share,
                        double one, double rows) {
  const double others = layer.num_hosts - 1;
  if (layer.mode == Mode::kLowLatency) {
    return others * static_cast<double>(network_combine_piece_bytes(config));
  }
  const auto of = [&](int n) { return static_cast<double>(network_combine_bytes(config, n)); };
  const double header = kNetworkHomeHeaderBytes;
  if (layer.sum_parts == 1) return others * (header + kTokens * rows * of(1));
  return others * (header + kTokens * (one * of(1) + (share - one) * of(5)));
}

TEST(NetworkBytes, OfTheModelAreThoseOfTheExchange) {
  const MachineModel machine = machine_preset("h200-ib400");
  for (const NamedRecipe& named : named_recipes()) {
    for (const Mode mode : {Mode::kLowLatency, Mode::kNormal}) {
      for (const int hosts : {2, 4, 32}) {
        for (const int sum_parts : {0, 1, 2 * hosts}) {
          const ClusterLayer layer = layer_of(named.recipe, mode, hosts, 4 * hosts, sum_parts);
          const TokenSpread spread = even_spread({.num_experts = 256, .num_topk = 8},
                                                 Placement::identity(256, layer.num_ranks), hosts);
          const ExchangeConfig config = config_of(layer);
          const double share = spread.hosts[0], one = spread.one_entry[0], rows = 8.0 / hosts;
          const double dispatch = predict_dispatch(machine, layer, spread).network_bytes;
          const double combine = predict_combine(machine, layer, spread).network_bytes;
          EXPECT_NEAR(dispatch, exchange_dispatch(config, layer, share), 1e-6 * dispatch)
              << named.name << ", " << to_string(mode) << ", " << hosts << " hosts";
          EXPECT_NEAR(combine, exchange_combine(config, layer, share, one, rows), 1e-6 * combine)
              << named.name << ", " << to_string(mode) << ", " << hosts << " hosts, " << sum_parts;
        }
      }
    }
  }
}

}  // namespace
}  // namespace sluice
