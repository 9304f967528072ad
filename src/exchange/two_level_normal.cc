// Normal dispatch inside a host of several: the relays give each token once to each rank of the
// host that needs it, and the receiver spreads the copies over its experts.
#include "exchange/two_level_exchange.h"

namespace sluice {
namespace {

class TwoLevelNormal final : public TwoLevelExchange {
 public:
  using TwoLevelExchange::TwoLevelExchange;

 protected:
  void spread(TwoLevelRoute& route) override {
    for (const int mate : protocol_.peers().mates) {
      for (std::size_t i = 0; i < relayed().size(); ++i) send_copies(route, mate, i);
      protocol_.signal(route.use, mate, Flag::kDispatched);
    }
  }

  void receive_rows(TwoLevelRoute& route) override {
    take_copies(config, layout_, protocol_.local(route.use),
                expanded_[static_cast<std::size_t>(route.use.slot)]->data(), route.rows,
                route.batch);
  }

 private:
  /// Of one relayed rank to one rank of this host.
  void send_copies(const TwoLevelRoute& route, int mate, std::size_t relayed_index) {
    const auto topk = static_cast<std::size_t>(config.num_topk);
    const auto source = static_cast<std::size_t>(relayed()[relayed_index]);
    const std::size_t region = source * static_cast<std::size_t>(config.max_tokens_per_rank);
    const PieceView from = piece(route, relayed_index);
    std::vector<std::int32_t> experts(topk);
    std::int32_t copies = 0;
    for (std::int32_t r = 0; r < from.num_records(); ++r) {
      const RecordView record = from.record(r);
      const auto slot_of = [&](std::size_t k) { return record.slot(static_cast<int>(k)); };
      if (!local_experts_on(mate, placement, slot_of, experts)) continue;
      const std::size_t row = region + static_cast<std::size_t>(copies++);
      const std::int32_t token = record.token();
      const auto payload = record.payload(), scales = record.scales();
      send(route, mate, layout_.x + row * payload.size(), payload);
      if (!scales.empty()) send(route, mate, layout_.scale + row * scales.size(), scales);
      send(route, mate, layout_.experts + row * topk * sizeof(std::int32_t),
           std::as_bytes(std::span(experts)));
      send(route, mate, layout_.token + row * sizeof(token), std::as_bytes(std::span(&token, 1)));
    }
    send(route, mate, layout_.counts + source * sizeof(copies),
         std::as_bytes(std::span(&copies, 1)));
    count_rows_sent(mate, static_cast<std::uint64_t>(copies));
  }
};

}  // namespace

std::unique_ptr<TwoLevelExchange> make_two_level_normal(const ExchangeConfig& config,
                                                        Transport& transport, Backend& backend) {
  return std::make_unique<TwoLevelNormal>(config, transport, backend);
}

}  // namespace sluice
