// run_report.h - what `sluice run` prints and writes of its layers.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "layer_run.h"

namespace sluice::cli {

/// Sums and maxima over ranks that both the table and the JSON show.
struct Summary {
  StageTimes slowest;
  std::uint64_t weight_bytes = 0, wire_bytes = 0, remote_bytes = 0, flops = 0;
  std::int64_t rows = 0, min_rows = 0, max_rows = 0;
  double num_devices = 0;  // That the ranks share; CPU ranks of one host share one.
  double experts_us = 0, gbytes_per_s = 0, share_of_read = 0, imbalance_max_over_mean = 0;
};
[[nodiscard]] Summary summarize(const LayerRunResult& result);

/// A line for each rank of one layer, and what its experts reach.
void print_ranks(const LayerRunConfig& config, const LayerRunResult& result, const Summary& s);

/// A line for each layer, and the sum. `verified` has one report for each.
void print_layers(const RunResult& result, const std::vector<VerifyReport>& verified);

/// What all layers take in a row, and what loading them took.
void print_passes(const RunResult& result);
/// How long loading took, and how fast it was.
void print_load(const LayerRunConfig& config, const RunResult& result,
                nlohmann::ordered_json& json);

/// Adds what was verified of another layer.
void add(VerifyReport& all, const VerifyReport& one);
void print_verification(const VerifyReport& report);
[[nodiscard]] nlohmann::ordered_json to_json(const VerifyReport& report);

/// One layer: recipe, times, ranks, digest and verification.
void fill_json(nlohmann::ordered_json& json, const LayerRunConfig& config,
               const LayerRunResult& result, const Summary& s);

/// Resident memory of all ranks' processes. To be asked before anything else takes memory: a
/// process has one peak.
[[nodiscard]] double peak_of_ranks(const std::vector<RankResult>& ranks, bool has_processes);

/// What the ranks hold together: `peak` of peak_of_ranks(), and experts.
void print_memory(const LayerRunConfig& config, const std::vector<RankResult>& ranks, double peak,
                  bool has_processes, nlohmann::ordered_json& json);

}  // namespace sluice::cli
