// Low-latency dispatch on the host: counts first, then every row straight to its final place.
#include <cstring>
#include <numeric>

#include "core/fail.h"
#include "exchange/host_exchange.h"

namespace sluice {
namespace {

class HostLowLatency final : public HostExchange {
 public:
  using HostExchange::HostExchange;

 protected:
  void send_rows(HostRoute& route, std::int64_t num_tokens,
                 const std::vector<std::int32_t>& idx) override {
    const auto* counts = exchange_counts(route, idx);
    check_capacity(counts, route.routing.slots);

    // First row of this rank within each expert: the rows of all lower ranks come before it.
    std::vector<std::int64_t> next(static_cast<std::size_t>(placement.num_experts()));
    for (int source = 0; source < rank; ++source) {
      for (std::size_t e = 0; e < next.size(); ++e) next[e] += count(counts, source, e);
    }
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      for (int k = 0; k < config.num_topk; ++k) {
        const auto token_slot = static_cast<std::int32_t>(t * config.num_topk + k);
        const std::int32_t expert = idx[static_cast<std::size_t>(token_slot)];
        if (expert >= 0)
          send_row(route, t, token_slot, expert, next[static_cast<std::size_t>(expert)]++);
      }
    }
    for (int peer = 0; peer < num_ranks; ++peer)
      protocol_.signal(route.use, peer, Flag::kDispatched);
  }

  void receive_rows(HostRoute& route) override {
    const HostLayout& layout = protocol_.layout();
    read_routes(route, received_counts(route));
    std::byte* const slot = protocol_.local(route.use);
    fill_batch(route, slot + layout.x, slot + layout.scale,
               Shape{placement.num_local(), config.max_m, config.hidden});
  }

 private:
  [[nodiscard]] std::int32_t count(const std::int32_t* counts, int source, std::size_t e) const {
    return counts[static_cast<std::size_t>(source) *
                      static_cast<std::size_t>(placement.num_experts()) +
                  e];
  }

  /// [num_ranks, num_experts] rows that each rank sends to each expert, in this rank's window.
  const std::int32_t* exchange_counts(const HostRoute& route,
                                      const std::vector<std::int32_t>& idx) {
    const HostLayout& layout = protocol_.layout();
    std::vector<std::int32_t> mine(static_cast<std::size_t>(placement.num_experts()));
    for (const std::int32_t expert : idx) {
      if (expert >= 0) ++mine[static_cast<std::size_t>(expert)];
    }
    const auto bytes = std::as_bytes(std::span(mine));
    for (int peer = 0; peer < num_ranks; ++peer) {
      protocol_.put(route.use, peer, layout.counts + static_cast<std::size_t>(rank) * bytes.size(),
                    bytes);
      count_sent(peer, bytes.size(), 0);
      protocol_.signal(route.use, peer, Flag::kCounts);
    }
    protocol_.wait_for_all(route.use, Flag::kCounts, "dispatch (row counts)");
    return received_counts(route);
  }

  [[nodiscard]] const std::int32_t* received_counts(const HostRoute& route) {
    return reinterpret_cast<const std::int32_t*>(protocol_.local(route.use) +
                                                 protocol_.layout().counts);
  }

  /// Every rank has the same counts, so every rank refuses, or none; no row has been sent yet.
  void check_capacity(const std::int32_t* counts, const ExpertSlots* slots) const {
    for (int e = 0; e < placement.num_experts(); ++e) {
      std::int64_t rows = 0;
      for (int source = 0; source < num_ranks; ++source) {
        rows += count(counts, source, static_cast<std::size_t>(e));
      }
      if (rows <= config.max_m) continue;
      fail(ErrorCode::kInvalidArgument, "expert {} would receive {} rows{}, max_m is {}",
           slots == nullptr ? e : slots->placement().expert_of(e), rows,
           slots == nullptr ? "" : fmt::format(" in slot {}", e), config.max_m);
    }
  }

  void send_row(const HostRoute& route, std::int64_t token, std::int32_t token_slot,
                std::int32_t expert, std::int64_t row_of_expert) {
    const HostLayout& layout = protocol_.layout();
    const int peer = placement.rank_of(expert);
    const auto row = static_cast<std::size_t>(
        std::int64_t{placement.local_of(expert)} * config.max_m + row_of_expert);
    const auto payload = staged_payload(token);
    const auto scales = staged_scales(token);
    protocol_.put(route.use, peer, layout.x + row * payload.size(), payload);
    if (!scales.empty()) protocol_.put(route.use, peer, layout.scale + row * scales.size(), scales);
    protocol_.put(route.use, peer, layout.origin + row * sizeof(token_slot),
                  std::as_bytes(std::span(&token_slot, 1)));
    count_sent(peer, payload.size() + scales.size() + sizeof(token_slot), 1);
  }

  void read_routes(HostRoute& route, const std::int32_t* counts) {
    const HostLayout& layout = protocol_.layout();
    const auto num_local = static_cast<std::size_t>(placement.num_local());
    const auto* token_slot =
        reinterpret_cast<const std::int32_t*>(protocol_.local(route.use) + layout.origin);
    route.num_rows.resize(num_local);
    route.row_begin.resize(num_local);
    for (std::size_t e = 0; e < num_local; ++e) {
      const std::int64_t begin = static_cast<std::int64_t>(e) * config.max_m;
      const int expert = placement.expert_of(rank, static_cast<int>(e));
      std::int32_t row = 0;
      for (int source = 0; source < num_ranks; ++source) {
        const std::int32_t end = row + count(counts, source, static_cast<std::size_t>(expert));
        for (; row < end; ++row) route.origin.push_back({source, token_slot[begin + row]});
      }
      route.num_rows[e] = row;
      route.row_begin[e] = begin;
    }
  }
};

}  // namespace

std::unique_ptr<HostExchange> make_host_low_latency(const ExchangeConfig& config,
                                                    Transport& transport, Backend& backend) {
  return std::make_unique<HostLowLatency>(config, transport, backend);
}

}  // namespace sluice
