// measured.h - every figure that was measured and that the model of the network can predict.
//
// A series has one source and one quantity; its cells differ in tokens, ranks or hosts. Figures of
// this project are from docs/performance-gpu.md. Public ones have their source beside them.
#pragma once

#include <string>
#include <vector>

#include "sluice/lab/network_model.h"

namespace sluice::testing {

enum class Quantity { kDispatch, kCombine, kStage, kLayer, kLayerApart };

struct Cell {
  std::string label;  ///< Head of the column.
  ClusterLayer layer;
  RoutingRule rule;
  double measured_us = 0;
  /// Instead of a time: the published rate, which counts the own host's or rank's copies, too.
  double published_gbytes_per_s = 0;
};

struct Series {
  std::string where;  ///< Heading of the table that it belongs to.
  std::string what;   ///< First column.
  MachineModel machine;
  Quantity quantity = Quantity::kDispatch;
  double bound = 0;  ///< Largest relative error that the test allows.
  std::vector<Cell> cells = {};
};

/// Sizes of a layer whose experts are INT4.
inline ModelGeometry sizes(int hidden, int topk, int experts, int intermediate = 2048) {
  ModelGeometry geometry;
  geometry.num_experts = experts, geometry.num_topk = topk;
  geometry.hidden = hidden, geometry.intermediate = intermediate;
  return geometry;
}

inline Cell cell(std::string label, const ModelGeometry& geometry, Mode mode, int hosts, int ranks,
                 int tokens, double us) {
  return {.label = std::move(label),
          .layer = {.geometry = geometry,
                    .mode = mode,
                    .num_hosts = hosts,
                    .num_ranks = ranks,
                    .tokens_per_rank = tokens},
          .rule = {.num_experts = geometry.num_experts, .num_topk = geometry.num_topk},
          .measured_us = us};
}

/// One host: cells over the number of tokens.
inline Series over_tokens(std::string where, std::string what, MachineModel machine,
                          Quantity quantity, double bound, const ModelGeometry& geometry, Mode mode,
                          int ranks, const std::vector<int>& tokens,
                          const std::vector<double>& us) {
  Series series{std::move(where), std::move(what), std::move(machine), quantity, bound};
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    series.cells.push_back(
        cell(std::to_string(tokens[i]), geometry, mode, 1, ranks, tokens[i], us[i]));
  }
  return series;
}

/// Hosts of eight ranks: cells over the number of ranks.
inline Series over_ranks(std::string where, std::string what, MachineModel machine,
                         Quantity quantity, double bound, int tokens, Mode mode,
                         const std::vector<int>& ranks, const std::vector<double>& us) {
  Series series{std::move(where), std::move(what), std::move(machine), quantity, bound};
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    series.cells.push_back(cell("EP" + std::to_string(ranks[i]), sizes(7168, 8, 256), mode,
                                ranks[i] / 8, ranks[i], tokens, us[i]));
  }
  return series;
}

std::vector<Series> sluice_series();
std::vector<Series> public_series();

}  // namespace sluice::testing
