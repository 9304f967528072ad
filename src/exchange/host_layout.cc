#include "exchange/host_layout.h"

#include "exchange/impl.h"
#include "exchange/two_level_layout.h"

namespace sluice {

HostLayout::HostLayout(const ExchangeConfig& config, int num_ranks_in)
    : SlotLayout{.num_ranks = num_ranks_in, .num_slots = config.num_in_flight},
      placement(config.total_slots(), num_ranks_in) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  const auto tokens = static_cast<std::size_t>(config.max_tokens_per_rank);
  const auto topk = static_cast<std::size_t>(config.num_topk);
  const auto hidden = static_cast<std::size_t>(config.hidden);
  payload_bytes = wire_payload_bytes(config.wire, config.hidden);
  scale_bytes = wire_scale_bytes(config.wire, config.hidden);
  home_bytes = 2 * hidden;
  staging_bytes = tokens * (payload_bytes + scale_bytes);

  SlotParts parts;
  const bool masked = config.mode == Mode::kLowLatency;
  window_rows = masked ? std::int64_t{placement.num_local()} * config.max_m
                       : static_cast<std::int64_t>(ranks * tokens);
  const auto rows = static_cast<std::size_t>(window_rows);
  parts.place(counts, ranks * (masked ? static_cast<std::size_t>(config.total_slots()) : 1) * 4);
  parts.place(x, rows * payload_bytes);
  parts.place(scale, rows * scale_bytes);
  if (masked) {
    parts.place(origin, rows * 4);
  } else {
    parts.place(experts, rows * topk * 4);
    parts.place(token, rows * 4);
    // A token copy becomes at most one row for each of its slots.
    expanded_rows = window_rows * config.num_topk;
    rows_x_bytes = static_cast<std::size_t>(expanded_rows) * payload_bytes;
    rows_scale_bytes = static_cast<std::size_t>(expanded_rows) * scale_bytes;
  }
  parts.place(home, tokens * topk * home_bytes);
  slot_bytes = parts.bytes();
}

std::size_t host_workspace_bytes(const ExchangeConfig& config, int num_ranks) {
  if (config.hosts.num_hosts() > 1) return TwoLevelLayout(config, num_ranks).total_bytes();
  return HostLayout(config, num_ranks).total_bytes();
}

}  // namespace sluice
