// The pieces of an exchange over several hosts that need no ranks: where ranks are, the record of a
// token, bytes by formula, and the order of the sum.
#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "exchange/network_record.h"
#include "exchange/protocol_peers.h"
#include "exchange/sum_parts.h"
#include "exchange/two_level_layout.h"
#include "sluice/error.h"
#include "sluice/lab/workload.h"
#include "sluice/quant.h"
#include "two_level_model.h"

namespace sluice::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <class Body>
std::string refusal(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "(not refused)";
}

TEST(Hosts, EvenOnesHaveRails) {
  const Hosts h = Hosts::even(2, 8);
  EXPECT_EQ(h.num_hosts(), 2);
  EXPECT_EQ(h.num_ranks(), 8);
  EXPECT_TRUE(h.is_even() && h.is_in_order());
  EXPECT_EQ(h.to_string(), "2 hosts of 4 ranks");
  EXPECT_THAT(h.ranks_of(1), ElementsAre(4, 5, 6, 7));
  EXPECT_EQ(h.local_of(6), 2);
  for (int s = 0; s < 8; ++s) {
    EXPECT_EQ(h.relay(s, h.host_of(s)), s);
    EXPECT_EQ(h.relay(s, 1 - h.host_of(s)), (s + 4) % 8);
    EXPECT_THAT(h.sources_of(s), ElementsAre(s % 4, s % 4 + 4));
    const ProtocolPeers peers = ProtocolPeers::of(h, s);
    EXPECT_THAT(peers.relays, ElementsAre((s + 4) % 8));
    EXPECT_THAT(peers.sources, ElementsAre((s + 4) % 8));
    EXPECT_EQ(peers.peers.size(), 5u);
  }
}

TEST(Hosts, OneHostIsTheDefault) {
  const Hosts h;
  EXPECT_EQ(h.num_hosts(), 1);
  EXPECT_EQ(h.num_ranks(), 0);
  EXPECT_EQ(h.host_of(5), 0);
  EXPECT_EQ(h.to_string(), "one host");
}

TEST(Hosts, UnevenOnesCountAround) {
  const Hosts h = Hosts::create({0, 1, 0, 0, 1});
  EXPECT_FALSE(h.is_even());
  EXPECT_EQ(h.to_string(), "ranks 0 2 3 | 1 4");
  EXPECT_EQ(h.relay(0, 1), 1);
  EXPECT_EQ(h.relay(2, 1), 4);
  EXPECT_EQ(h.relay(3, 1), 1);
  EXPECT_EQ(h.relay(1, 0), 0);
  EXPECT_THAT(h.sources_of(1), ElementsAre(0, 1, 3));
  EXPECT_THAT(h.sources_of(3), ElementsAre(3));
  EXPECT_THAT(relayed_indices(h, 1), ElementsAre(0, 1, 0, 2, 1));
  // Even, but not in order.
  EXPECT_EQ(Hosts::create({0, 1, 0, 1}).to_string(), "ranks 0 2 | 1 3");
  EXPECT_TRUE(Hosts::create({0, 1, 0, 1}).is_even());
}

TEST(Hosts, RefusedByName) {
  EXPECT_EQ(refusal([] { (void)Hosts::even(3, 8); }), "hosts: 3 hosts do not divide 8 ranks");
  EXPECT_EQ(refusal([] { (void)Hosts::even(0, 8); }), "hosts: 0 hosts do not divide 8 ranks");
  EXPECT_EQ(refusal([] { (void)Hosts::create({}); }), "hosts: there are no ranks");
  EXPECT_EQ(refusal([] { (void)Hosts::create({0, 2, 2}); }), "hosts: host 1 of 3 has no rank");
  EXPECT_EQ(refusal([] {
              (void)Hosts::create({0, -1});
            }),
            "hosts: rank 1 is on host -1, not in [0, 2)");
}

ExchangeConfig r1_config(Mode mode, int num_hosts, int sum_parts = 0) {
  return {.mode = mode,
          .num_experts = 256,
          .num_topk = 8,
          .hidden = 7168,
          .max_tokens_per_rank = 128,
          .hosts = Hosts::even(num_hosts, 64),
          .sum_parts = sum_parts};
}

TEST(NetworkBytes, OfDeepSeekR1) {
  // e4m3 with 56 scales, the token, 8 slots, 8 weights; in words of 16 bytes.
  EXPECT_EQ(network_record_bytes(r1_config(Mode::kNormal, 8)), 7168u + 224 + 4 + 32 + 32 + 12);
  EXPECT_EQ(network_record_bytes(r1_config(Mode::kNormal, 8, 1)), 7168u + 224 + 4 + 32 + 12);
  EXPECT_EQ(network_header_bytes(r1_config(Mode::kNormal, 8)), 16u);
  EXPECT_EQ(network_header_bytes(r1_config(Mode::kLowLatency, 8)), 1024u + 16);
  EXPECT_EQ(network_dispatch_bytes(r1_config(Mode::kNormal, 8), 3), 16u + 3 * 7472);
  EXPECT_EQ(network_dispatch_piece_bytes(r1_config(Mode::kLowLatency, 8)), 1040u + 128 * 7472);
  for (const int entries : {0, 1, 2, 3, 8}) {
    EXPECT_EQ(network_combine_bytes(r1_config(Mode::kNormal, 8), entries),
              14336u * static_cast<unsigned>(std::min(entries, 2)));
    EXPECT_EQ(network_combine_bytes(r1_config(Mode::kNormal, 8, 1), entries),
              14336u * static_cast<unsigned>(entries));
  }
  EXPECT_EQ(network_combine_piece_bytes(r1_config(Mode::kLowLatency, 8)), 16 + 128u * 28672);
  EXPECT_EQ(network_combine_piece_bytes(r1_config(Mode::kLowLatency, 8, 1)), 16 + 128u * 8 * 14336);
}

/// Of a token, on average: its entries on other hosts, copies that go there, rows that come home.
struct PerToken {
  double entries = 0, copies = 0, home = 0;
};

/// 256 experts, top-8, 64 ranks of 64 tokens.
PerToken measured(RoutingKind routing, int num_hosts) {
  constexpr int kTopk = 8, kRanks = 64;
  constexpr std::int64_t kTokens = 64;
  const Hosts hosts = Hosts::even(num_hosts, kRanks);
  const ExchangeConfig config = r1_config(Mode::kNormal, num_hosts);
  const std::vector<int> host_of_slot = hosts_of_slots(hosts, 256, kRanks);
  PerToken sum;
  for (int r = 0; r < kRanks; ++r) {
    const Workload load =
        make_workload({.num_experts = 256, .num_topk = kTopk, .hidden = 128, .routing = routing},
                      r * kTokens, kTokens);
    const auto tokens = tokens_by_host(load.topk_idx, kTopk, num_hosts, host_of_slot);
    for (int h = 0; h < num_hosts; ++h) {
      if (h == hosts.host_of(r)) continue;
      const auto& of_host = tokens[static_cast<std::size_t>(h)];
      EXPECT_TRUE(std::ranges::is_sorted(of_host));
      sum.copies += static_cast<double>(of_host.size());
      for (const std::int32_t t : of_host) {
        const auto idx =
            std::span(load.topk_idx).subspan(static_cast<std::size_t>(t) * kTopk, kTopk);
        const auto n = std::ranges::count_if(idx, [&](std::int32_t e) {
          return e >= 0 && host_of_slot[static_cast<std::size_t>(e)] == h;
        });
        sum.entries += static_cast<double>(n);
        sum.home += static_cast<double>(network_combine_bytes(config, static_cast<int>(n))) / 14336;
      }
    }
  }
  const double total = kRanks * static_cast<double>(kTokens);
  return {sum.entries / total, sum.copies / total, sum.home / total};
}

// Experts drawn without repetition: a host of H is needed by all but C(E - E/H, k) / C(E, k) of the
// tokens.
TEST(NetworkBytes, UniformRoutingNeedsAsManyCopiesAsCombinatoricsSay) {
  for (const int num_hosts : {2, 4, 8, 32}) {
    double none = 1;
    for (int i = 0; i < 8; ++i) none *= (256 - 256.0 / num_hosts - i) / (256 - i);
    const double expected = (num_hosts - 1) * (1 - none);
    EXPECT_NEAR(measured(RoutingKind::kUniform, num_hosts).copies, expected, 0.02 * expected);
  }
}

// The table of docs/exchange.md#several-hosts.
TEST(NetworkBytes, CopiesPerTokenAreThoseOfTheDocs) {
  struct Row {
    RoutingKind routing;
    int num_hosts;
    PerToken expected;
  };
  for (const auto& [routing, num_hosts, expected] :
       {Row{RoutingKind::kUniform, 2, {4.01, 1.00, 1.96}},
        Row{RoutingKind::kUniform, 4, {6.02, 2.70, 4.63}},
        Row{RoutingKind::kUniform, 8, {7.00, 4.64, 6.47}},
        Row{RoutingKind::kUniform, 32, {7.75, 7.04, 7.71}},
        Row{RoutingKind::kZipf, 2, {4.00, 1.00, 1.96}},
        Row{RoutingKind::kZipf, 4, {6.02, 2.76, 4.71}},
        Row{RoutingKind::kZipf, 8, {7.00, 4.73, 6.52}},
        Row{RoutingKind::kZipf, 32, {7.74, 6.95, 7.69}}}) {
    const PerToken m = measured(routing, num_hosts);
    SCOPED_TRACE(::testing::Message() << static_cast<int>(routing) << ' ' << num_hosts << ": "
                                      << m.entries << ' ' << m.copies << ' ' << m.home);
    EXPECT_NEAR(m.entries, expected.entries, 0.006);
    EXPECT_NEAR(m.copies, expected.copies, 0.006);
    EXPECT_NEAR(m.home, expected.home, 0.006);
  }
}

TEST(NetworkRecord, GivesBackWhatWasWritten) {
  ExchangeConfig config = r1_config(Mode::kLowLatency, 2);
  config.hidden = 256;
  for (const int sum_parts : {1, 2}) {
    config.sum_parts = sum_parts;
    const NetworkRecord layout(config);
    std::vector<std::byte> payload(256), scales(8), out(layout.piece_bytes(2), std::byte{0xee});
    for (std::size_t i = 0; i < payload.size(); ++i) payload[i] = static_cast<std::byte>(i);
    for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<std::byte>(99 + i);
    const std::vector<std::int32_t> slots{3, 130, -1, 255, 127, 128, 0, -1};
    const std::vector<float> weights{1, 2, 3, 4, 5, 6, 7, 8};
    const auto host_of_slot = hosts_of_slots(config.hosts, 256, 64);
    std::vector<std::int32_t> rows(256);
    std::iota(rows.begin(), rows.end(), 1000);
    write_header(layout, 2, rows, out.data());
    write_record(layout, {.idx = 41, .payload = payload, .scales = scales, .slots = slots},
                 weights.data(), 1, host_of_slot, out.data() + layout.piece_bytes(1));
    const PieceView piece(layout, out.data());
    EXPECT_EQ(piece.num_records(), 2);
    EXPECT_EQ(std::memcmp(piece.counts().data(), rows.data(), 1024), 0);
    const RecordView record = piece.record(1);
    const WireToken token = record.token();
    EXPECT_EQ(token.idx, 41);
    EXPECT_TRUE(std::ranges::equal(token.payload, payload));
    EXPECT_TRUE(std::ranges::equal(token.scales, scales));
    const int there[] = {-1, 130, -1, 255, -1, 128, -1, -1};
    EXPECT_TRUE(std::ranges::equal(token.slots, there));
    for (int k = 0; k < 8; ++k) {
      if (there[k] >= 0 && sum_parts == 2) {
        EXPECT_EQ(record.weight(k), weights[static_cast<std::size_t>(k)]);
      }
    }
    EXPECT_EQ(layout.bytes % 16, 0u);
    EXPECT_EQ(layout.header_bytes % 16, 0u);
  }
}

TEST(SumParts, WhichAreRefused) {
  const auto refused = [](int num_hosts, int sum_parts) {
    return refusal([&] { (void)SumParts(r1_config(Mode::kNormal, num_hosts, sum_parts), 64); });
  };
  for (const int parts : {0, 1, 4, 8, 64}) EXPECT_EQ(refused(4, parts), "(not refused)") << parts;
  for (const int parts : {0, 1, 2, 4, 64, 256}) {
    EXPECT_EQ(refused(1, parts), "(not refused)") << parts;
  }
  EXPECT_THAT(refused(4, 2), HasSubstr("sum_parts 2 of 4 hosts of 16 ranks: it must be 1 or 4"));
  EXPECT_THAT(refused(4, 256 * 2), HasSubstr("sum_parts 512 is not in [0, 256]"));
  EXPECT_THAT(refused(1, 3), HasSubstr("sum_parts 3 does not divide 256 expert slots"));
  EXPECT_THAT(refused(4, -1), HasSubstr("sum_parts -1"));
  ExchangeConfig uneven = r1_config(Mode::kNormal, 4, 4);
  std::vector<int> host_of_rank(64, 0);
  host_of_rank[63] = 1;
  uneven.hosts = Hosts::create(host_of_rank);
  EXPECT_THAT(refusal([&] { (void)SumParts(uneven, 64); }), HasSubstr("even hosts in order"));
  uneven.sum_parts = 0;
  const SumParts parts(uneven, 64);
  EXPECT_EQ(parts.num_parts(), 2);
  EXPECT_EQ(parts.part_of(251), 0);
  EXPECT_EQ(parts.part_of(252), 1);
}

// In rounds of neighbours, against the recursive definition: values whose sums round.
TEST(SumParts, AddsInRoundsAndLeavesOutWhatIsNotThere) {
  for (int num_parts = 1; num_parts <= 17; ++num_parts) {
    for (unsigned seed = 0; seed < 64; ++seed) {
      PartSum sum(num_parts, 1);
      std::vector<std::optional<float>> parts(static_cast<std::size_t>(num_parts));
      sum.clear();
      for (int p = 0; p < num_parts; ++p) {
        const CounterRng rng(seed, static_cast<std::uint64_t>(p));
        if (rng.bits(0) % 3 == 0) continue;
        const auto v = static_cast<float>(rng.normal(1)) * static_cast<float>(1 << p % 5);
        parts[static_cast<std::size_t>(p)] = v;
        sum.set(p, &v);
      }
      const auto expected = sum_of_parts(parts, 0, parts.size());
      const float* const total = sum.total();
      ASSERT_EQ(total != nullptr, expected.has_value());
      if (expected) {
        ASSERT_EQ(*total, *expected) << num_parts << ' ' << seed;
      }
    }
  }
}

// Hosts add up whole parts of the order: the sums of 2 or 4 hosts, then of the hosts, are those of
// all 8 parts.
TEST(SumParts, HostsAddUpPartsOfTheSameOrder) {
  for (const int num_hosts : {2, 4}) {
    for (unsigned seed = 0; seed < 200; ++seed) {
      PartSum all(8, 1), hosts(num_hosts, 1), host(8 / num_hosts, 1);
      all.clear(), hosts.clear();
      for (int h = 0; h < num_hosts; ++h) {
        host.clear();
        for (int p = 0; p < 8 / num_hosts; ++p) {
          const int part = h * (8 / num_hosts) + p;
          const CounterRng rng(seed, static_cast<std::uint64_t>(part));
          if (rng.bits(0) % 4 == 0) continue;
          const std::uint16_t row = bf16_from_float(static_cast<float>(rng.normal(1)));
          const auto weight = static_cast<float>(rng.uniform(2));
          all.add_row(part, weight, &row);
          host.add_row(p, weight, &row);
        }
        if (const float* const sum = host.total()) hosts.set(h, sum);
      }
      const float *const a = all.total(), *const b = hosts.total();
      ASSERT_EQ(a == nullptr, b == nullptr);
      if (a != nullptr) {
        ASSERT_EQ(*a, *b);
      }
    }
  }
}

}  // namespace
}  // namespace sluice::testing
