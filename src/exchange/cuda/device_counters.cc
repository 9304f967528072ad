#include "exchange/cuda/device_counters.h"

#include <cstddef>

namespace sluice {

ExchangeCounters counters_of(const cuda::DeviceStats& stats, const DeviceLayout& layout,
                             const ExchangeConfig& config, int rank, std::uint64_t num_dispatches) {
  ExchangeCounters counters;
  counters.num_dispatches = num_dispatches;
  counters.saturated_values = stats.saturated;
  const std::uint64_t token = layout.payload_bytes + layout.scale_bytes;
  const std::uint64_t counts = static_cast<std::uint64_t>(config.total_slots()) * 8u;
  for (int r = 0; r < layout.placement.num_ranks(); ++r) {
    const std::uint64_t origins = (stats.rows[r] + stats.repeats[r]) * 8u;
    const bool has_lists = config.mode == Mode::kNormal && r != rank;
    const std::uint64_t lists = has_lists ? origins : 0;  // A word for each row, too.
    counters.dispatch_rows.push_back(stats.rows[r]);
    counters.dispatch_bytes.push_back(stats.rows[r] * token + origins + lists +
                                      num_dispatches * counts);
    counters.combine_bytes.push_back(stats.returned[r] * 2u *
                                     static_cast<std::uint64_t>(config.hidden));
    counters.wait_ns.push_back(stats.wait_ns[r]);
  }
  return counters;
}

}  // namespace sluice
