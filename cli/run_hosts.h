// run_hosts.h - what `sluice run --hosts` sent over the network, counted and by formula.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "layer_run.h"
#include "sluice/hosts.h"

namespace sluice::cli {

/// Where the ranks of `config` are, if not where they were `found`, and in how many parts the sum
/// is made; 0: as many as hosts.
/// Throws: kInvalidArgument if the hosts do not divide the ranks, or with --rebalance, which
///   compares bits, for more than one part.
void resolve_hosts(int num_hosts, const Hosts& found, int sum_parts, LayerRunConfig& config);

/// `names`: [num_ranks] host_id() of each rank, or empty where all are threads of one process.
/// Returns what is to be noted of ranks on several hosts in an exchange that takes them for one, or
/// nothing. A host may count as several, which are virtual then.
/// Throws: kInvalidArgument naming two ranks that `hosts` puts on one host and that are on two.
[[nodiscard]] std::string compare_with_real_hosts(const Hosts& hosts,
                                                  const std::vector<std::string>& names);

/// What one host sent to the others in one forward().
struct HostTraffic {
  std::int64_t token_copies = 0;  ///< Tokens, each once for every other host that needed it.
  std::int64_t rows = 0;          ///< Their rows: what would go if every row crossed by itself.
  std::uint64_t dispatch_bytes = 0, combine_bytes = 0;                  ///< As counted.
  std::uint64_t dispatch_formula_bytes = 0, combine_formula_bytes = 0;  ///< network_bytes.h
  [[nodiscard]] bool is_as_formula() const noexcept {
    return dispatch_bytes == dispatch_formula_bytes && combine_bytes == combine_formula_bytes;
  }
};

/// By host.   Requires: config.hosts has more than one.
[[nodiscard]] std::vector<HostTraffic> host_traffic(const LayerRunConfig& config,
                                                    const ModelGeometry& geometry,
                                                    const LayerRunResult& result,
                                                    const std::vector<Workload>& loads);

/// Prints a table, adds "hosts" to `json`, and returns whether all bytes are as the formula says.
[[nodiscard]] bool report_hosts(const LayerRunConfig& config, const ModelGeometry& geometry,
                                const LayerRunResult& result, const std::vector<Workload>& loads,
                                nlohmann::ordered_json& json);

}  // namespace sluice::cli
