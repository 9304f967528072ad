// Normal dispatch on the host: each token crosses once to each rank that needs it, and the receiver
// spreads the copies over its experts.
#include "exchange/host_exchange.h"

namespace sluice {
namespace {

class HostNormal final : public HostExchange {
 public:
  using HostExchange::HostExchange;

 protected:
  void send_rows(HostRoute& route, std::int64_t num_tokens) override {
    for (int peer = 0; peer < num_ranks; ++peer) {
      send_tokens(route, peer, num_tokens);
      protocol_.signal(route.use, peer, Flag::kDispatched);
    }
  }

  void receive_rows(HostRoute& route) override {
    const TokenCopies copies{.num_copies = received<std::int32_t>(route, layout_.counts),
                             .x = received<std::byte>(route, layout_.x),
                             .scale = received<std::byte>(route, layout_.scale),
                             .experts = received<std::int32_t>(route, layout_.experts),
                             .token = received<std::int32_t>(route, layout_.token),
                             .num_ranks = num_ranks,
                             .num_topk = config.num_topk,
                             .max_tokens = config.max_tokens_per_rank,
                             .payload_bytes = layout_.payload_bytes,
                             .scale_bytes = layout_.scale_bytes};
    std::byte* const rows_x = expanded_[static_cast<std::size_t>(route.use.slot)]->data();
    std::byte* const rows_scale = rows_x + layout_.rows_x_bytes;
    route.rows = expand_copies(copies, placement.num_local(), rows_x, rows_scale);
    fill_batch(config, route.rows, rows_x, rows_scale, Shape{layout_.expanded_rows, config.hidden},
               route.batch);
  }

 private:
  void send_tokens(const HostRoute& route, int peer, std::int64_t num_tokens) {
    const auto topk = static_cast<std::size_t>(config.num_topk);
    const auto region =
        static_cast<std::size_t>(rank) * static_cast<std::size_t>(config.max_tokens_per_rank);
    std::vector<std::int32_t> experts(topk);
    std::int32_t copies = 0;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      bool needed = false;
      for (std::size_t k = 0; k < topk; ++k) {
        const std::int32_t slot = route.slots[static_cast<std::size_t>(t) * topk + k];
        const bool here = slot >= 0 && placement.rank_of(slot) == peer;
        experts[k] = here ? placement.local_of(slot) : -1;
        needed |= here;
      }
      if (!needed) continue;
      const std::size_t row = region + static_cast<std::size_t>(copies++);
      const auto token = static_cast<std::int32_t>(t);
      const auto payload = staged_.payload(t), scales = staged_.scales(t);
      protocol_.put(route.use, peer, layout_.x + row * payload.size(), payload);
      if (!scales.empty()) {
        protocol_.put(route.use, peer, layout_.scale + row * scales.size(), scales);
      }
      protocol_.put(route.use, peer, layout_.experts + row * topk * sizeof(std::int32_t),
                    std::as_bytes(std::span(experts)));
      protocol_.put(route.use, peer, layout_.token + row * sizeof(token),
                    std::as_bytes(std::span(&token, 1)));
      count_sent(peer, payload.size() + scales.size() + (topk + 1) * sizeof(std::int32_t), 1);
    }
    protocol_.put(route.use, peer, layout_.counts + static_cast<std::size_t>(rank) * sizeof(copies),
                  std::as_bytes(std::span(&copies, 1)));
    count_sent(peer, sizeof(copies), 0);
  }

  template <class T>
  [[nodiscard]] const T* received(const HostRoute& route, std::size_t offset) {
    return reinterpret_cast<const T*>(protocol_.local(route.use) + offset);
  }
};

}  // namespace

std::unique_ptr<HostExchange> make_host_normal(const ExchangeConfig& config, Transport& transport,
                                               Backend& backend) {
  return std::make_unique<HostNormal>(config, transport, backend);
}

}  // namespace sluice
