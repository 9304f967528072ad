#include "exchange/one_host_exchange.h"

namespace sluice {

OneHostExchange::OneHostExchange(const ExchangeConfig& config_in, Transport& transport,
                                 Backend& backend)
    : HostExchange(config_in, HostLayout(config_in, transport.num_ranks()),
                   protocol_steps(config_in.mode == Mode::kLowLatency),
                   ProtocolPeers::all(transport.num_ranks()), transport, backend),
      home_(HostLayout(config_in, transport.num_ranks()).home) {}

void OneHostExchange::send_tokens(HostRoute& route, std::int64_t num_tokens) {
  std::vector<std::int32_t> counts;
  if (config.mode == Mode::kLowLatency) {
    counts = count_entries(route.slots, placement.num_experts());
  }
  const SpreadTokens own{.source = rank,
                         .num_tokens = num_tokens,
                         .token = [&](std::int64_t t) { return own_token(route, t); },
                         .counts = std::as_bytes(std::span(counts))};
  spread(route, std::span(&own, 1));
}

void OneHostExchange::send_rows_home(const HostRoute& route, TensorView expert_y) {
  const auto* const rows = static_cast<const std::byte*>(expert_y.data);
  route.rows.for_each([&](const RowOrigin& origin, std::size_t row) {
    const auto place = static_cast<std::size_t>(origin.token_slot);
    send_back(route, origin.source, home_ + place * layout_.row_bytes,
              {rows + row * layout_.row_bytes, layout_.row_bytes});
  });
  protocol_.signal_all(route.use, Flag::kCombined);
}

void OneHostExchange::sum_rows(const HostRoute& route, MutableTensorView y) {
  if (parts_.is_one()) {
    sum_entries(route, home_, y);
  } else {
    sum_by_parts(route, y);
  }
}

/// What several hosts would add up, on one.
void OneHostExchange::sum_by_parts(const HostRoute& route, MutableTensorView y) {
  const auto* const rows = received<std::uint16_t>(route, home_);
  const auto* const weights = route.routing.topk_weights.as<float>();
  PartSum sum(parts_.num_parts(), config.hidden);
  for (std::int64_t t = 0; t < y.dim(0); ++t) {
    sum.clear();
    for (std::int64_t i = t * config.num_topk; i < (t + 1) * config.num_topk; ++i) {
      const std::int32_t slot = route.slots[static_cast<std::size_t>(i)];
      if (slot >= 0) sum.add_row(parts_.part_of(slot), weights[i], rows + i * config.hidden);
    }
    round_sum(sum.total(), config.hidden, config.routed_scaling_factor,
              y.as<std::uint16_t>() + t * config.hidden);
  }
}

}  // namespace sluice
