// rank_results.h - what one rank of `sluice run` measured, and its way to the process that reports.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/exchange.h"
#include "sluice/layer.h"
#include "sluice/loading.h"

namespace sluice::cli {

/// What `run --rebalance` did on one rank, after its repeats.
struct RebalanceResult {
  std::vector<int> slot_experts = {};           ///< [num_slots] of the new placement.
  std::vector<std::int64_t> rows = {};          ///< [num_local_experts] of one forward with it.
  std::vector<std::int64_t> counted_rows = {};  ///< [num_local_experts] of all repeats with it.
  std::vector<double> total_us = {};            ///< [repeats] with it: the slowest rank of each.
  bool has_same_bits = false;                   ///< Every output, before and after.
};

/// One rank in one layer of the run.
struct RankResult {
  ForwardStats stats;                          ///< Of the median repeat.
  ExchangeCounters counters;                   ///< Of one forward().
  ExchangeCounters totals;                     ///< Of all repeats.
  std::vector<std::int64_t> counted_rows;      ///< [num_local_experts] of all repeats.
  std::vector<std::uint64_t> transport_bytes;  ///< [num_ranks] that the transport put in one.
  std::vector<std::uint16_t> y;
  LayerGroupMemory memory;  ///< Of all layers of the run together.
  RebalanceCounters moves = {};
  std::optional<RebalanceResult> rebalance = {};
  std::uint64_t digest = 0;
  double peak_resident_bytes = 0;  ///< Of its process, experts included.
  int num_ranks_on_device = 1;     ///< That share its device, itself included.
};

/// Everything that one rank sends to the reporter.
struct RankResults {
  std::vector<RankResult> layers;  ///< In the order of LayerRunConfig::layers.
  LoadStats load = {};
};

/// As bytes for Launch::run_ranks(): CBOR, between processes of one build.
[[nodiscard]] std::string pack_results(const RankResults& results);
[[nodiscard]] RankResults unpack_results(std::string_view bytes);

}  // namespace sluice::cli
