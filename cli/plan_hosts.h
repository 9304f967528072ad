// plan_hosts.h - `sluice plan --hosts`: what a layer is to take over one or many hosts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/checkpoint.h"

namespace sluice::cli {

struct Output;

/// The options that only `--hosts` has, and what it needs of the others.
struct HostsOptions {
  int hosts = 0;  ///< 0: not asked for.
  std::string machine = "h200-ib400", routing, counts;
  std::vector<std::string> set = {};
  int groups = 1, topk_groups = 1, sum_parts = 0, piece_tokens = 0;
  std::uint64_t seed = 1;
};

struct HostsPlan {
  ModelGeometry geometry;
  std::string recipe, mode;  ///< mode: low-latency, normal or both.
  int ranks = 0, slots = 0;
  std::vector<int> tokens = {};  ///< Empty: some for each mode.
};

/// Predicts and prints. Throws: kInvalidArgument naming field, value and limit.
void plan_hosts(const HostsOptions& options, const HostsPlan& plan, Output& output);

}  // namespace sluice::cli
