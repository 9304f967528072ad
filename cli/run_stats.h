// run_stats.h - what moved between each pair of ranks and who waited for whom: --stats, --metrics.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "layer_run.h"
#include "sluice/placement_files.h"

namespace sluice::cli {

/// Of all ranks' outputs, in order of the tokens: the same over every transport and rank count.
[[nodiscard]] std::uint64_t outputs_digest(const LayerRunResult& result);

/// Of one forward of each layer: a file for `sluice balance`.
[[nodiscard]] ExpertRows expert_rows(const RunResult& result);

/// Counters of all repeats, as they stood at the end: they only grow.
[[nodiscard]] nlohmann::ordered_json stats_json(const LayerRunResult& result,
                                                const ModelGeometry& geometry);
void print_stats(const LayerRunResult& result, const ModelGeometry& geometry);

/// Prometheus text format.   Throws: kIo naming the file.
void write_metrics(const std::string& path, const std::vector<LayerRunResult>& layers,
                   const ModelGeometry& geometry);

}  // namespace sluice::cli
