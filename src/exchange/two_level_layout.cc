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
    : ReceiveLayout(config, num_ranks_in, kTwoLevelFlagKinds),
      record(config),
      max_sources(most_sources(config.hosts)),
      max_tokens(config.max_tokens_per_rank),
      entries(max_tokens * config.num_topk) {
  const auto sources = static_cast<std::size_t>(max_sources);
  piece_bytes = (record.piece_bytes(max_tokens) + 127) / 128 * 128;

  SlotParts parts;
  parts.place(sent, sources * piece_bytes);
  parts.place(gather, sources * static_cast<std::size_t>(entries) * row_bytes);
  const auto home_rows = static_cast<std::size_t>(config.hosts.num_hosts() * max_tokens * 2);
  parts.place(home, config.total_parts() == 1 ? 0 : home_rows * row_bytes);
  place_received(parts, config);
  slot_bytes = parts.bytes();
}

}  // namespace sluice
