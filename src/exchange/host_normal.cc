// Normal dispatch on the host: each token crosses once to each rank that needs it, and the receiver
// spreads the copies over its experts.
#include <cstring>

#include "core/fail.h"
#include "exchange/host_exchange.h"

namespace sluice {
namespace {

class HostNormal final : public HostExchange {
 public:
  using HostExchange::HostExchange;

 protected:
  void send_rows(HostRoute& route, std::int64_t num_tokens,
                 const std::vector<std::int32_t>& idx) override {
    for (int peer = 0; peer < num_ranks; ++peer) {
      send_tokens(route, peer, num_tokens, idx);
      protocol_.signal(route.use, peer, Flag::kDispatched);
    }
  }

  void receive_rows(HostRoute& route) override {
    count_rows(route);
    expand(route);
  }

 private:
  void send_tokens(const HostRoute& route, int peer, std::int64_t num_tokens,
                   const std::vector<std::int32_t>& idx) {
    const HostLayout& layout = protocol_.layout();
    const auto topk = static_cast<std::size_t>(config.num_topk);
    const auto region =
        static_cast<std::size_t>(rank) * static_cast<std::size_t>(config.max_tokens_per_rank);
    std::vector<std::int32_t> experts(topk);
    std::int32_t copies = 0;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      bool needed = false;
      for (std::size_t k = 0; k < topk; ++k) {
        const std::int32_t expert = idx[static_cast<std::size_t>(t) * topk + k];
        const bool here = expert >= 0 && placement.rank_of(expert) == peer;
        experts[k] = here ? placement.local_of(expert) : -1;
        needed |= here;
      }
      if (!needed) continue;
      const std::size_t row = region + static_cast<std::size_t>(copies++);
      const auto token = static_cast<std::int32_t>(t);
      const auto payload = staged_payload(t), scales = staged_scales(t);
      protocol_.put(route.use, peer, layout.x + row * payload.size(), payload);
      if (!scales.empty())
        protocol_.put(route.use, peer, layout.scale + row * scales.size(), scales);
      protocol_.put(route.use, peer, layout.experts + row * topk * sizeof(std::int32_t),
                    std::as_bytes(std::span(experts)));
      protocol_.put(route.use, peer, layout.token + row * sizeof(token),
                    std::as_bytes(std::span(&token, 1)));
      count_sent(peer, payload.size() + scales.size() + (topk + 1) * sizeof(std::int32_t), 1);
    }
    protocol_.put(route.use, peer, layout.counts + static_cast<std::size_t>(rank) * sizeof(copies),
                  std::as_bytes(std::span(&copies, 1)));
    count_sent(peer, sizeof(copies), 0);
  }

  template <class T>
  [[nodiscard]] const T* received(const HostRoute& route, std::size_t offset) {
    return reinterpret_cast<const T*>(protocol_.local(route.use) + offset);
  }

  /// Calls body(copy, source, entry, local expert) in order of (source, token, entry).
  template <class Body>
  void for_each_row(const HostRoute& route, const Body& body) {
    const HostLayout& layout = protocol_.layout();
    const auto topk = static_cast<std::size_t>(config.num_topk);
    const auto* copies = received<std::int32_t>(route, layout.counts);
    const auto* experts = received<std::int32_t>(route, layout.experts);
    for (int source = 0; source < num_ranks; ++source) {
      const std::size_t first =
          static_cast<std::size_t>(source) * static_cast<std::size_t>(config.max_tokens_per_rank);
      const std::size_t last = first + static_cast<std::size_t>(copies[source]);
      for (std::size_t copy = first; copy < last; ++copy) {
        for (std::size_t k = 0; k < topk; ++k) {
          const std::int32_t e = experts[copy * topk + k];
          if (e >= 0) body(copy, source, static_cast<int>(k), static_cast<std::size_t>(e));
        }
      }
    }
  }

  void count_rows(HostRoute& route) {
    const auto num_local = static_cast<std::size_t>(placement.num_local());
    route.num_rows.assign(num_local, 0);
    route.row_begin.assign(num_local, 0);
    for_each_row(route, [&](std::size_t, int, int, std::size_t e) { ++route.num_rows[e]; });
    for (std::size_t e = 1; e < num_local; ++e) {
      route.row_begin[e] = route.row_begin[e - 1] + route.num_rows[e - 1];
    }
    route.origin.resize(static_cast<std::size_t>(route.row_begin.back() + route.num_rows.back()));
  }

  void expand(HostRoute& route) {
    const HostLayout& layout = protocol_.layout();
    std::byte* const rows_x = expanded_[static_cast<std::size_t>(route.use.slot)]->data();
    std::byte* const rows_scale = rows_x + layout.rows_x_bytes;
    const auto* x = received<std::byte>(route, layout.x);
    const auto* scale = received<std::byte>(route, layout.scale);
    const auto* token = received<std::int32_t>(route, layout.token);
    std::vector<std::int64_t> next = route.row_begin;
    for_each_row(route, [&](std::size_t copy, int source, int k, std::size_t e) {
      const auto row = static_cast<std::size_t>(next[e]++);
      std::memcpy(rows_x + row * layout.payload_bytes, x + copy * layout.payload_bytes,
                  layout.payload_bytes);
      if (layout.scale_bytes > 0) {
        std::memcpy(rows_scale + row * layout.scale_bytes, scale + copy * layout.scale_bytes,
                    layout.scale_bytes);
      }
      route.origin[row] = {source, token[copy] * config.num_topk + k};
    });
    fill_batch(route, rows_x, rows_scale, Shape{layout.expanded_rows, config.hidden});
  }
};

}  // namespace

std::unique_ptr<HostExchange> make_host_normal(const ExchangeConfig& config, Transport& transport,
                                               Backend& backend) {
  return std::make_unique<HostNormal>(config, transport, backend);
}

}  // namespace sluice
