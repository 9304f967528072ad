// Low-latency dispatch inside a host of several: the relays pass on the counts that came with their
// pieces, then put every row at its final place.
#include "exchange/two_level_exchange.h"

namespace sluice {
namespace {

class TwoLevelLowLatency final : public TwoLevelExchange {
 public:
  using TwoLevelExchange::TwoLevelExchange;

 protected:
  void spread(TwoLevelRoute& route) override {
    exchange_counts(route);
    const RowCounts counts = received_counts(route);
    counts.check_capacity(config.max_m, route.routing.slots);  // On all hosts alike.
    for (std::size_t i = 0; i < relayed().size(); ++i) {
      std::vector<std::int64_t> next = counts.first_rows(relayed()[i]);
      const PieceView from = piece(route, i);
      for (std::int32_t r = 0; r < from.num_records(); ++r) {
        const RecordView record = from.record(r);
        for (int k = 0; k < config.num_topk; ++k) {
          const std::int32_t slot = record.slot(k);
          if (slot < 0) continue;
          send_row(route, record, record.token() * config.num_topk + k, slot,
                   next[static_cast<std::size_t>(slot)]++);
        }
      }
    }
    protocol_.signal_all(route.use, Flag::kDispatched);
  }

  void receive_rows(TwoLevelRoute& route) override {
    take_masked_rows(config, layout_, rank, protocol_.local(route.use), route.rows, route.batch);
  }

 private:
  /// [num_ranks, num_slots] in this rank's window.
  [[nodiscard]] RowCounts received_counts(const TwoLevelRoute& route) {
    return {received<std::int32_t>(route, layout_.counts), num_ranks, placement.num_experts()};
  }

  /// Every rank of the host gets the counts of all ranks: from each relay those it relays for.
  void exchange_counts(const TwoLevelRoute& route) {
    for (std::size_t i = 0; i < relayed().size(); ++i) {
      const std::span<const std::byte> counts = piece(route, i).counts();
      const std::size_t place =
          layout_.counts + static_cast<std::size_t>(relayed()[i]) * counts.size();
      for (const int mate : protocol_.peers().mates) send(route, mate, place, counts);
    }
    protocol_.signal_all(route.use, Flag::kCounts);
    protocol_.wait_for_all(route.use, Flag::kCounts, "dispatch (row counts)");
  }

  void send_row(const TwoLevelRoute& route, const RecordView& record, std::int32_t token_slot,
                std::int32_t slot, std::int64_t row_of_expert) {
    const int peer = placement.rank_of(slot);
    const auto row = static_cast<std::size_t>(
        std::int64_t{placement.local_of(slot)} * config.max_m + row_of_expert);
    const auto payload = record.payload(), scales = record.scales();
    send(route, peer, layout_.x + row * payload.size(), payload);
    if (!scales.empty()) send(route, peer, layout_.scale + row * scales.size(), scales);
    send(route, peer, layout_.origin + row * sizeof(token_slot),
         std::as_bytes(std::span(&token_slot, 1)));
    count_rows_sent(peer, 1);
  }
};

}  // namespace

std::unique_ptr<TwoLevelExchange> make_two_level_low_latency(const ExchangeConfig& config,
                                                             Transport& transport,
                                                             Backend& backend) {
  return std::make_unique<TwoLevelLowLatency>(config, transport, backend);
}

}  // namespace sluice
