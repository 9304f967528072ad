#include "exchange/two_level_layout.h"

#include <algorithm>

namespace sluice {
namespace {

int most_sources(const Hosts& hosts) {
  std::size_t most = 1;
  for (int h = 0; h < hosts.num_hosts(); ++h) {
    const std::vector<int> index = relayed_indices(hosts, h);
    most = std::max(most, static_cast<std::size_t>(std::ranges::max(index)) + 1);
  }
  return static_cast<int>(most);
}

}  // namespace

std::vector<int> relayed_indices(const Hosts& hosts, int host) {
  std::vector<int> next(static_cast<std::size_t>(hosts.num_ranks())), index;
  for (int source = 0; source < hosts.num_ranks(); ++source) {
    index.push_back(next[static_cast<std::size_t>(hosts.relay(source, host))]++);
  }
  return index;
}

TwoLevelLayout::TwoLevelLayout(const ExchangeConfig& config, int num_ranks_in)
    : SlotLayout{.num_ranks = num_ranks_in,
                 .num_slots = config.num_in_flight,
                 .num_flag_kinds = kTwoLevelFlagKinds},
      record(config),
      max_sources(most_sources(config.hosts)),
      payload_bytes(record.payload_bytes),
      scale_bytes(record.scale_bytes),
      row_bytes(2 * static_cast<std::size_t>(config.hidden)),
      max_tokens(config.max_tokens_per_rank),
      entries(max_tokens * config.num_topk),
      placement(config.total_slots(), num_ranks_in) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  const auto tokens = static_cast<std::size_t>(max_tokens);
  const auto topk = static_cast<std::size_t>(config.num_topk);
  const auto sources = static_cast<std::size_t>(max_sources);
  piece_bytes = (record.piece_bytes(max_tokens) + 127) / 128 * 128;
  staging_bytes = tokens * (payload_bytes + scale_bytes);

  SlotParts parts;
  parts.place(sent, sources * piece_bytes);
  parts.place(gather, sources * static_cast<std::size_t>(entries) * row_bytes);
  const auto hosts = static_cast<std::size_t>(config.hosts.num_hosts());
  parts.place(home, config.total_parts() == 1 ? 0 : hosts * tokens * 2 * row_bytes);

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
    expanded_rows = window_rows * config.num_topk;
    rows_x_bytes = static_cast<std::size_t>(expanded_rows) * payload_bytes;
    rows_scale_bytes = static_cast<std::size_t>(expanded_rows) * scale_bytes;
  }
  slot_bytes = parts.bytes();
}

}  // namespace sluice
