// How a rank of a host exchange spreads tokens over its host: the sending half of both modes.
#include "exchange/host_exchange.h"

namespace sluice {

void HostExchange::spread(const HostRoute& route, std::span<const SpreadTokens> from) {
  if (config.mode == Mode::kLowLatency) {
    spread_rows(route, from);
  } else {
    spread_copies(route, from);
  }
}

/// Low-latency: the counts of all ranks first, then every row straight to its final place.
void HostExchange::spread_rows(const HostRoute& route, std::span<const SpreadTokens> from) {
  send_counts(route, from);
  protocol_.wait_for_all(route.use, Flag::kCounts, "dispatch (row counts)");
  const RowCounts counts(received<std::int32_t>(route, layout_.counts), num_ranks,
                         placement.num_experts());
  counts.check_capacity(config.max_m, route.routing.slots);  // No row has been spread yet.
  for (const SpreadTokens& tokens : from) {
    std::vector<std::int64_t> next = counts.first_rows(tokens.source);
    for (std::int64_t i = 0; i < tokens.num_tokens; ++i) {
      const WireToken token = tokens.token(i);
      for (int k = 0; k < config.num_topk; ++k) {
        const std::int32_t slot = token.slots[static_cast<std::size_t>(k)];
        if (slot >= 0) send_row(route, token, k, next[static_cast<std::size_t>(slot)]++);
      }
    }
  }
  protocol_.signal_all(route.use, Flag::kDispatched);
}

void HostExchange::send_counts(const HostRoute& route, std::span<const SpreadTokens> from) {
  for (const int peer : protocol_.peers().mates) {
    for (const SpreadTokens& tokens : from) {
      const auto source = static_cast<std::size_t>(tokens.source);
      send(route, peer, layout_.counts + source * tokens.counts.size(), tokens.counts);
    }
    protocol_.signal(route.use, peer, Flag::kCounts);
  }
}

void HostExchange::send_row(const HostRoute& route, const WireToken& token, int k,
                            std::int64_t row_of_expert) {
  const std::int32_t slot = token.slots[static_cast<std::size_t>(k)];
  const std::int32_t token_slot = token.idx * config.num_topk + k;
  const int peer = placement.rank_of(slot);
  const auto row = static_cast<std::size_t>(std::int64_t{placement.local_of(slot)} * config.max_m +
                                            row_of_expert);
  send(route, peer, layout_.x + row * token.payload.size(), token.payload);
  if (!token.scales.empty()) {
    send(route, peer, layout_.scale + row * token.scales.size(), token.scales);
  }
  send(route, peer, layout_.origin + row * sizeof(token_slot),
       std::as_bytes(std::span(&token_slot, 1)));
  count_rows_sent(peer, 1);
}

/// Normal: each token once to each rank that needs it.
void HostExchange::spread_copies(const HostRoute& route, std::span<const SpreadTokens> from) {
  for (const int peer : protocol_.peers().mates) {
    for (const SpreadTokens& tokens : from) send_copies(route, peer, tokens);
    protocol_.signal(route.use, peer, Flag::kDispatched);
  }
}

void HostExchange::send_copies(const HostRoute& route, int peer, const SpreadTokens& from) {
  const auto topk = static_cast<std::size_t>(config.num_topk);
  const auto source = static_cast<std::size_t>(from.source);
  const std::size_t region = source * static_cast<std::size_t>(config.max_tokens_per_rank);
  std::vector<std::int32_t> experts(topk);
  std::int32_t copies = 0;
  for (std::int64_t i = 0; i < from.num_tokens; ++i) {
    const WireToken token = from.token(i);
    if (!local_experts_on(peer, placement, token.slots, experts)) continue;
    const std::size_t row = region + static_cast<std::size_t>(copies++);
    send(route, peer, layout_.x + row * token.payload.size(), token.payload);
    if (!token.scales.empty()) {
      send(route, peer, layout_.scale + row * token.scales.size(), token.scales);
    }
    send(route, peer, layout_.experts + row * topk * sizeof(std::int32_t),
         std::as_bytes(std::span(experts)));
    send(route, peer, layout_.token + row * sizeof(token.idx),
         std::as_bytes(std::span(&token.idx, 1)));
  }
  send(route, peer, layout_.counts + source * sizeof(copies), std::as_bytes(std::span(&copies, 1)));
  count_rows_sent(peer, copies);
}

}  // namespace sluice
