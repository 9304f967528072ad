#include "exchange/host_layout.h"

#include "exchange/impl.h"
#include "exchange/two_level_layout.h"

namespace sluice {

ReceiveLayout::ReceiveLayout(const ExchangeConfig& config, int num_ranks_in, int num_flag_kinds_in)
    : SlotLayout{.num_ranks = num_ranks_in,
                 .num_slots = config.num_in_flight,
                 .num_flag_kinds = num_flag_kinds_in},
      payload_bytes(wire_payload_bytes(config.wire, config.hidden)),
      scale_bytes(wire_scale_bytes(config.wire, config.hidden)),
      row_bytes(2 * static_cast<std::size_t>(config.hidden)),
      placement(config.total_slots(), num_ranks_in) {
  staging_bytes =
      static_cast<std::size_t>(config.max_tokens_per_rank) * (payload_bytes + scale_bytes);
}

void ReceiveLayout::place_received(SlotParts& parts, const ExchangeConfig& config) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  const auto tokens = static_cast<std::size_t>(config.max_tokens_per_rank);
  const bool masked = config.mode == Mode::kLowLatency;
  window_rows = masked ? std::int64_t{placement.num_local()} * config.max_m
                       : static_cast<std::int64_t>(ranks * tokens);
  const auto rows = static_cast<std::size_t>(window_rows);
  parts.place(counts, ranks * (masked ? static_cast<std::size_t>(config.total_slots()) : 1) * 4);
  parts.place(x, rows * payload_bytes);
  parts.place(scale, rows * scale_bytes);
  if (masked) {
    parts.place(origin, rows * 4);
    return;
  }
  parts.place(experts, rows * static_cast<std::size_t>(config.num_topk) * 4);
  parts.place(token, rows * 4);
  // A token copy becomes at most one row for each of its slots.
  expanded_rows = window_rows * config.num_topk;
  rows_x_bytes = static_cast<std::size_t>(expanded_rows) * payload_bytes;
  rows_scale_bytes = static_cast<std::size_t>(expanded_rows) * scale_bytes;
}

HostLayout::HostLayout(const ExchangeConfig& config, int num_ranks_in)
    : ReceiveLayout(config, num_ranks_in, kFlagKinds) {
  SlotParts parts;
  place_received(parts, config);
  parts.place(home, static_cast<std::size_t>(config.max_tokens_per_rank) *
                        static_cast<std::size_t>(config.num_topk) * row_bytes);
  slot_bytes = parts.bytes();
}

std::size_t host_workspace_bytes(const ExchangeConfig& config, int num_ranks) {
  if (config.hosts.num_hosts() > 1) return TwoLevelLayout(config, num_ranks).total_bytes();
  return HostLayout(config, num_ranks).total_bytes();
}

}  // namespace sluice
