// exchange_bench.h - the measurement behind `sluice bench exchange`: checked, then timed.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/exchange.h"
#include "sluice/lab/workload.h"
#include "sluice/tensor.h"
#include "sluice/transport.h"

namespace sluice {

struct ExchangeBenchConfig {
  Device::Kind device = Device::Kind::kHost;
  int num_ranks = 8;
  int num_devices = 0;  ///< That the ranks spread over; 0 = all there are.
  /// mode, wire, num_experts, num_topk, hidden, num_in_flight; the rest is set for each case.
  ExchangeConfig exchange;
  float static_scale = 0;  ///< Of every dispatch, for WireFormat::kE4m3Static.
  std::vector<int> tokens_per_rank = {1, 16, 64, 128};  ///< One case each.
  RoutingKind routing = RoutingKind::kUniform;
  /// Dispatch-combine pairs of one recording that count; one more comes first, in which ranks that
  /// were launched early wait for the others.
  int pairs = 20;
  int repeats = 10;  ///< Replays of each recording.
  /// Also time what stacks do without an exchange: every token to every rank, every rank's partial
  /// sum home. It is the same exchange with one expert per rank, chosen by every token.
  bool with_all_gather = true;
  std::uint64_t seed = 1;
};

/// Medians over pairs; of each pair the slowest rank.
struct ExchangeBenchTimes {
  double pair_us = 0;      ///< Free-running pairs, nothing between: the honest figure.
  double dispatch_us = 0;  ///< Between time stamps, less what two stamps with nothing between take.
  double combine_us = 0;
  double dispatch_call_us = 0;  ///< Host time of one call that is not captured.
  double combine_call_us = 0;
  double dispatch_bytes = 0;  ///< Put by all ranks in one dispatch, own memory included.
  double combine_bytes = 0;
  double off_rank_share = 0;  ///< Of those bytes, to other ranks.
};

struct ExchangeBenchCase {
  int tokens_per_rank = 0;
  std::int64_t rows = 0;              ///< All ranks' token copies for experts.
  std::int64_t checked_elements = 0;  ///< Compared with the definition before timing; all equal.
  std::size_t workspace_bytes = 0;    ///< Of one rank.
  bool host_waits = false;            ///< In each dispatch, for sizes: normal mode over hosts.
  ExchangeBenchTimes exchange = {}, all_gather = {};
};

struct ExchangeBenchReport {
  std::string device;
  double copy_gbytes_per_s = 0;  ///< Read and written, by a plain copy on one rank's device.
  double read_gbytes_per_s = 0;
  int num_devices = 1;           ///< Used.
  double link_gbytes_per_s = 0;  ///< Copied from device 1 to device 0; 0 with one device.
  /// The slowest device's copy while each copies from the next one: both directions of its link.
  double links_together_gbytes_per_s = 0;
  std::vector<ExchangeBenchCase> cases = {};
};

/// Runs body(rank, transport) for each rank that is in this process, and returns what the bodies of
/// all ranks returned, in order of the ranks. Throws the cause if a rank of any process failed.
using RunRanks = std::function<std::vector<std::string>(
    const std::function<std::string(int rank, Transport& transport)>& body)>;

/// Ranks are threads of this process, or what `run_ranks` makes of them, on one host; on CUDA, rank
/// r is a stream of device r % num_devices. Over processes every one calls this with the same
/// configuration and gets the same report.
/// `on_progress`, if any, is told the fraction that is done.
/// Throws: kInternal naming rank, row and byte if anything arrives wrong; nothing is timed then.
[[nodiscard]] ExchangeBenchReport bench_exchange(
    const ExchangeBenchConfig& config, const std::function<void(double)>& on_progress = {},
    const RunRanks& run_ranks = {});

}  // namespace sluice
