// two_level_model.h - the sum by parts once more, and what several hosts send: the definition that
// an exchange in two levels is compared with.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <optional>
#include <vector>

#include "exchange_model.h"
#include "sluice/hosts.h"
#include "sluice/network_bytes.h"
#include "support/modes_and_wires.h"

namespace sluice::testing {

/// Which part a row of (source rank, token, entry) that chose `expert` is added in.
using PartOf = std::function<int(int expert, int rank, std::int64_t token, int k)>;

/// The parts of an exchange without slots.
inline PartOf parts_of(const ExchangeConfig& c) {
  const int parts = c.total_parts();
  if (parts == c.hosts.num_hosts() && parts > 1) {
    const Hosts hosts = c.hosts;
    const int num_local = c.num_experts / hosts.num_ranks();
    return [=](int e, int, std::int64_t, int) { return hosts.host_of(e / num_local); };
  }
  const int each = c.num_experts / parts;
  return [=](int e, int, std::int64_t, int) { return e / each; };
}

/// The sum of parts [first, first + n): of the two halves, where the first half is the largest
/// power of two below n; what has no entry is left out.
inline std::optional<float> sum_of_parts(const std::vector<std::optional<float>>& parts,
                                         std::size_t first, std::size_t n) {
  if (n == 1) return parts[first];
  std::size_t half = 1;
  while (half * 2 < n) half *= 2;
  const auto a = sum_of_parts(parts, first, half);
  const auto b = sum_of_parts(parts, first + half, n - half);
  if (!a || !b) return a ? a : b;
  return *a + *b;
}

/// y of one token, added up by `num_parts` parts.
inline std::vector<std::uint16_t> combined_by_parts(const Traffic& t, const ExchangeConfig& c,
                                                    int r, std::int64_t token,
                                                    const PartOf& part_of) {
  const auto row = wire_bytes(&t.x[r][token * t.hidden], t.hidden, c.wire, t.s1);
  struct Entry {
    std::int32_t expert;
    std::size_t part;
    float weight;
  };
  std::vector<Entry> entries;
  for (int k = 0; k < t.num_topk; ++k) {
    const std::int64_t at = token * t.num_topk + k;
    const std::int32_t e = t.topk_idx[r][at];
    if (e < 0) continue;
    entries.push_back(
        {e, static_cast<std::size_t>(part_of(e, r, token, k)), t.topk_weights[r][at]});
  }
  std::vector<std::uint16_t> y(static_cast<std::size_t>(t.hidden));
  std::vector<std::optional<float>> parts(static_cast<std::size_t>(c.total_parts()));
  for (int i = 0; i < t.hidden; ++i) {
    std::ranges::fill(parts, std::nullopt);
    for (const Entry& entry : entries) {
      auto& part = parts[entry.part];
      const float product =
          entry.weight * bf16_to_float(expert_output(entry.expert, row.data(), row.size(), i));
      part = part.value_or(0.0f) + product;
    }
    const float sum = sum_of_parts(parts, 0, parts.size()).value_or(0.0f);
    y[static_cast<std::size_t>(i)] = bf16_from_float(sum * c.routed_scaling_factor);
  }
  return y;
}

/// The same with sums whose order shows in bf16: the first entry of each token comes with a large
/// weight, and its expert once more as the last entry, which takes all but a part of it away again.
/// What is added in between loses bits that it keeps in a part of its own.
inline Traffic loud(Traffic t) {
  const auto last = static_cast<std::size_t>(t.num_topk - 1);
  for (std::size_t r = 0; r < t.topk_idx.size() && last > 1; ++r) {
    for (std::size_t i = 0; i < t.topk_idx[r].size(); i += last + 1) {
      t.topk_idx[r][i + last] = t.topk_idx[r][i];
      t.topk_weights[r][i] = 0x1p20f;
      t.topk_weights[r][i + last] = -0x1p20f * (1 + 0x1p-18f);
    }
  }
  return t;
}

/// Entries of a token of rank `r` on each host, of an exchange without slots.
inline std::vector<int> entries_by_host(const Traffic& t, const Hosts& hosts, int r,
                                        std::int64_t token) {
  std::vector<int> entries(static_cast<std::size_t>(hosts.num_hosts()));
  const int num_local = t.num_experts / t.num_ranks();
  for (int k = 0; k < t.num_topk; ++k) {
    const std::int32_t e = t.topk_idx[r][token * t.num_topk + k];
    if (e >= 0) ++entries[static_cast<std::size_t>(hosts.host_of(e / num_local))];
  }
  return entries;
}

inline ExchangeConfig config_for(const Traffic& t, Mode mode, const Hosts& hosts, int sum_parts = 0,
                                 WireFormat wire = WireFormat::kE4m3Group) {
  const std::int64_t largest = *std::max_element(t.num_tokens.begin(), t.num_tokens.end());
  return {.mode = mode,
          .wire = wire,
          .num_experts = t.num_experts,
          .num_topk = t.num_topk,
          .hidden = t.hidden,
          .max_tokens_per_rank = static_cast<int>(std::max<std::int64_t>(1, largest)),
          // A token may name an expert in every entry.
          .max_m = mode == Mode::kLowLatency
                       ? static_cast<int>(std::max<std::int64_t>(1, largest)) * t.num_ranks() *
                             t.num_topk
                       : 0,
          .hosts = hosts,
          .sum_parts = sum_parts,
          .routed_scaling_factor = 2.5f,
          .peer_timeout = std::chrono::milliseconds(20'000)};
}

/// Calls expect_exact(traffic, config) for each mode, wire format and order of the sum, up to the
/// first that fails.
template <class ExpectExact>
void for_every_way(const Traffic& t, const Hosts& hosts, const ExpectExact& expect_exact) {
  for (const Mode mode : kModes) {
    for (const WireFormat wire : kWires) {
      for (const int sum_parts : {0, 1}) {
        SCOPED_TRACE(::testing::Message() << hosts.to_string() << ", " << to_string(mode) << ", "
                                          << to_string(wire) << ", parts " << sum_parts);
        expect_exact(t, config_for(t, mode, hosts, sum_parts, wire));
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

/// One dispatch and combine of rank r for a Routing::layer: its batch checked row by row, its y
/// returned.
inline std::vector<std::uint16_t> round_trip(Exchange& exchange, const Traffic& t, int r,
                                             int layer = 0) {
  Routing routing = t.routing(r);
  routing.layer = layer;
  Dispatched d =
      exchange.dispatch(t.x_view(r), routing, {}, t.static_scale(exchange.config().wire));
  std::vector<std::uint16_t> expert_y;
  check_batch(t, exchange.config(), r, d.batch(), expert_y);
  std::vector<std::uint16_t> y(static_cast<std::size_t>(t.num_tokens[r] * t.hidden), 0x7fc1);
  MutableTensorView view;
  view.data = y.data(), view.dtype = DType::kBFloat16;
  view.shape = Shape{t.num_tokens[r], t.hidden};
  const TensorView rows(expert_y.data(), DType::kBFloat16, d.batch().x.shape);
  exchange.combine(std::move(d), rows, view, {});
  return y;
}

/// y of rank r against the model.
inline void expect_model(const Traffic& t, const ExchangeConfig& c, int r,
                         const std::vector<std::uint16_t>& y) {
  const PartOf parts = parts_of(c);
  for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
    const std::vector<std::uint16_t> actual(y.begin() + i * t.hidden,
                                            y.begin() + (i + 1) * t.hidden);
    ASSERT_EQ(actual, combined_by_parts(t, c, r, i, parts)) << "rank " << r << " token " << i;
  }
}

inline std::vector<std::int64_t> tokens_of(int num_ranks) {
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(num_ranks), 4);
  tokens.back() = 2;
  return tokens;
}

}  // namespace sluice::testing
