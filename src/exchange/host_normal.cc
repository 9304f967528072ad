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
    take_copies(config, layout_, protocol_.local(route.use),
                expanded_[static_cast<std::size_t>(route.use.slot)]->data(), route.rows,
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
      const auto slot_of = [&](std::size_t k) {
        return route.slots[static_cast<std::size_t>(t) * topk + k];
      };
      if (!local_experts_on(peer, placement, slot_of, experts)) continue;
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
};

}  // namespace

std::unique_ptr<HostExchange> make_host_normal(const ExchangeConfig& config, Transport& transport,
                                               Backend& backend) {
  return std::make_unique<HostNormal>(config, transport, backend);
}

}  // namespace sluice
