// What an exchange over several hosts puts where: counted, and by the formulas of network_bytes.h.
#include <gtest/gtest.h>

#include "multirank/run_ranks.h"
#include "support/scalar_backend.h"
#include "two_level_model.h"

namespace sluice::testing {
namespace {

/// What rank r puts to each rank, by the formulas of network_bytes.h and docs/exchange.md.
struct Sent {
  std::vector<std::uint64_t> dispatch, combine;
};

Sent sent_by_formula(const Traffic& t, const ExchangeConfig& c, int r) {
  const Hosts& hosts = c.hosts;
  const int ranks = t.num_ranks(), own = hosts.host_of(r), num_local = c.num_experts / ranks;
  const auto row = static_cast<std::uint64_t>(2 * t.hidden);
  const std::uint64_t token = wire_bytes_per_token(c.wire, t.hidden);
  const bool low_latency = c.mode == Mode::kLowLatency;
  Sent sent{std::vector<std::uint64_t>(static_cast<std::size_t>(ranks)),
            std::vector<std::uint64_t>(static_cast<std::size_t>(ranks))};
  for (int h = 0; h < hosts.num_hosts(); ++h) {  // Out, to the relays.
    std::int64_t n = 0;
    for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) n += entries_by_host(t, hosts, r, i)[h] > 0;
    sent.dispatch[static_cast<std::size_t>(hosts.relay(r, h))] += network_dispatch_bytes(c, n);
  }
  for (const int source : hosts.sources_of(r)) {
    for (const int mate : hosts.ranks_of(own)) {  // Inside the host, out.
      std::uint64_t rows = 0, copies = 0;
      for (std::int64_t i = 0; i < t.num_tokens[source]; ++i) {
        std::uint64_t here = 0;
        for (int k = 0; k < t.num_topk; ++k) {
          const int e = t.topk_idx[source][i * t.num_topk + k];
          here += e >= 0 && e / num_local == mate;
        }
        rows += here, copies += here > 0;
      }
      sent.dispatch[static_cast<std::size_t>(mate)] +=
          low_latency ? rows * (token + 4) + static_cast<std::uint64_t>(c.num_experts) * 4
                      : copies * (token + 4 + 4 * static_cast<std::uint64_t>(t.num_topk)) + 4;
    }
    if (source == r) continue;
    for (std::int64_t i = 0; i < t.num_tokens[source]; ++i) {  // Home.
      sent.combine[static_cast<std::size_t>(source)] +=
          network_combine_bytes(c, entries_by_host(t, hosts, source, i)[own]);
    }
  }
  for (int source = 0; source < ranks; ++source) {  // Inside the host, back.
    for (const std::int32_t e : t.topk_idx[source]) {
      if (e >= 0 && e / num_local == r) {
        sent.combine[static_cast<std::size_t>(hosts.relay(source, own))] += row;
      }
    }
  }
  return sent;
}

void expect_bytes(const Traffic& t, const ExchangeConfig& c) {
  run_ranks(t.num_ranks(), [&](Transport& transport) {
    const int r = transport.rank();
    ScalarBackend backend;
    Exchange exchange = Exchange::create(c, transport, backend);
    const TransportCounters before = transport.counters();
    (void)round_trip(exchange, t, r);
    const TransportCounters after = transport.counters();
    const ExchangeCounters counters = exchange.counters();
    const Sent sent = sent_by_formula(t, c, r);
    EXPECT_EQ(counters.dispatch_bytes, sent.dispatch);
    EXPECT_EQ(counters.combine_bytes, sent.combine);
    for (std::size_t p = 0; p < sent.dispatch.size(); ++p) {
      EXPECT_EQ(after.bytes_put[p] - before.bytes_put[p], sent.dispatch[p] + sent.combine[p]);
    }
    EXPECT_EQ(exchange.held_bytes(), Exchange::workspace_bytes(c, t.num_ranks()));
  });
}

TEST(TwoLevelBytes, BytesOnTheNetworkFollowTheFormula) {
  for (const auto& [hosts, ranks] : {std::pair{2, 2}, {2, 4}, {4, 4}, {4, 8}}) {
    const Traffic t = make_traffic(tokens_of(ranks), 24, 5, 256, 13);
    for (const Mode mode : kModes) {
      for (const int sum_parts : {0, 1}) {
        for (const WireFormat wire : {WireFormat::kE4m3Group, WireFormat::kBf16}) {
          expect_bytes(t, config_for(t, mode, Hosts::even(hosts, ranks), sum_parts, wire));
        }
      }
    }
  }
  const Traffic t = make_traffic({3, 4, 2}, 24, 5, 128, 14);
  expect_bytes(t, config_for(t, Mode::kNormal, Hosts::create({0, 1, 1})));
}

// What a piece of fixed size has room for is what goes where every token wants every host.
TEST(TwoLevelBytes, APieceIsFullWhereEveryTokenWantsEveryHost) {
  Traffic t = make_traffic({6, 6, 6, 6}, 8, 4, 128, 15);
  for (auto& idx : t.topk_idx) {
    for (std::size_t i = 0; i < idx.size(); ++i) idx[i] = static_cast<int>(2 * (i % 4) + i / 4 % 2);
  }
  const Hosts hosts = Hosts::even(2, 4);
  const ExchangeConfig c = config_for(t, Mode::kLowLatency, hosts);
  run_ranks(4, [&](Transport& transport) {
    ScalarBackend backend;
    Exchange exchange = Exchange::create(c, transport, backend);
    (void)round_trip(exchange, t, transport.rank());
    const int relay = hosts.relay(transport.rank(), 1 - hosts.host_of(transport.rank()));
    const ExchangeCounters counters = exchange.counters();
    EXPECT_EQ(counters.dispatch_bytes[static_cast<std::size_t>(relay)],
              network_dispatch_piece_bytes(c));
    EXPECT_EQ(counters.combine_bytes[static_cast<std::size_t>(relay)],
              network_combine_piece_bytes(c) - kNetworkHomeHeaderBytes);
  });
}

}  // namespace
}  // namespace sluice::testing
