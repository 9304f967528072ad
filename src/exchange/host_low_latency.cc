// Low-latency dispatch on the host: counts first, then every row straight to its final place.
#include <utility>

#include "exchange/host_exchange.h"

namespace sluice {
namespace {

class HostLowLatency final : public HostExchange {
 public:
  using HostExchange::HostExchange;

 protected:
  void send_rows(HostRoute& route, std::int64_t num_tokens) override {
    exchange_counts(route);
    const RowCounts counts = received_counts(route);
    counts.check_capacity(config.max_m, route.routing.slots);  // No row has been sent yet.
    std::vector<std::int64_t> next = counts.first_rows(rank);
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      for (int k = 0; k < config.num_topk; ++k) {
        const auto token_slot = static_cast<std::int32_t>(t * config.num_topk + k);
        const std::int32_t slot = route.slots[static_cast<std::size_t>(token_slot)];
        if (slot >= 0) send_row(route, t, token_slot, slot, next[static_cast<std::size_t>(slot)]++);
      }
    }
    protocol_.signal_all(route.use, Flag::kDispatched);
  }

  void receive_rows(HostRoute& route) override {
    take_masked_rows(config, layout_, rank, protocol_.local(route.use), route.rows, route.batch);
  }

 private:
  /// [num_ranks, num_slots] in this rank's window.
  [[nodiscard]] RowCounts received_counts(const HostRoute& route) {
    return {reinterpret_cast<const std::int32_t*>(protocol_.local(route.use) + layout_.counts),
            num_ranks, placement.num_experts()};
  }

  void exchange_counts(const HostRoute& route) {
    const std::vector<std::int32_t> mine = count_entries(route.slots, placement.num_experts());
    const auto bytes = std::as_bytes(std::span(mine));
    for (int peer = 0; peer < num_ranks; ++peer) {
      protocol_.put(route.use, peer, layout_.counts + static_cast<std::size_t>(rank) * bytes.size(),
                    bytes);
      count_sent(peer, bytes.size(), 0);
      protocol_.signal(route.use, peer, Flag::kCounts);
    }
    protocol_.wait_for_all(route.use, Flag::kCounts, "dispatch (row counts)");
  }

  void send_row(const HostRoute& route, std::int64_t token, std::int32_t token_slot,
                std::int32_t slot, std::int64_t row_of_expert) {
    const int peer = placement.rank_of(slot);
    const auto row = static_cast<std::size_t>(
        std::int64_t{placement.local_of(slot)} * config.max_m + row_of_expert);
    const auto payload = staged_.payload(token);
    const auto scales = staged_.scales(token);
    protocol_.put(route.use, peer, layout_.x + row * payload.size(), payload);
    if (!scales.empty()) {
      protocol_.put(route.use, peer, layout_.scale + row * scales.size(), scales);
    }
    protocol_.put(route.use, peer, layout_.origin + row * sizeof(token_slot),
                  std::as_bytes(std::span(&token_slot, 1)));
    count_sent(peer, payload.size() + scales.size() + sizeof(token_slot), 1);
  }
};

}  // namespace

std::unique_ptr<HostExchange> make_host_low_latency(const ExchangeConfig& config,
                                                    Transport& transport, Backend& backend) {
  return std::make_unique<HostLowLatency>(config, transport, backend);
}

}  // namespace sluice
