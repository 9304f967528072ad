// exchange_model.h - dispatch and combine once more, with no ranks at all: the definition that
// every exchange is compared with, byte by byte.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "core/counter_rng.h"
#include "sluice/exchange.h"
#include "sluice/quant.h"

namespace sluice::testing {

/// The tokens of every rank, and where the router sends them.
struct Traffic {
  int num_topk = 0, hidden = 0, num_experts = 0;
  std::vector<std::int64_t> num_tokens;                  // [rank]
  std::vector<std::vector<std::uint16_t>> x = {};        // [rank][num_tokens * hidden]
  std::vector<std::vector<std::int32_t>> topk_idx = {};  // [rank][num_tokens * num_topk]
  std::vector<std::vector<float>> topk_weights = {};     // [rank][num_tokens * num_topk]
  float s1 = 0.01f;                                      // Of the static wire.

  [[nodiscard]] int num_ranks() const { return static_cast<int>(num_tokens.size()); }
  [[nodiscard]] TensorView x_view(int r) const {
    return {x[r].data(), DType::kBFloat16, Shape{num_tokens[r], hidden}};
  }
  [[nodiscard]] Routing routing(int r) const {
    const Shape shape{num_tokens[r], num_topk};
    return {.topk_idx = {topk_idx[r].data(), DType::kInt32, shape},
            .topk_weights = {topk_weights[r].data(), DType::kFloat32, shape}};
  }
  /// What dispatch() takes for this wire.
  [[nodiscard]] float static_scale(WireFormat wire) const {
    return wire == WireFormat::kE4m3Static ? s1 : 0.0f;
  }
};

/// Random values, distinct experts per token, about one slot in eight empty.
inline Traffic make_traffic(std::vector<std::int64_t> tokens, int num_experts, int num_topk,
                            int hidden, std::uint64_t seed) {
  Traffic t{
      .num_topk = num_topk, .hidden = hidden, .num_experts = num_experts, .num_tokens = tokens};
  std::uint64_t global = 0;
  for (const std::int64_t n : tokens) {
    auto& x = t.x.emplace_back();
    auto& idx = t.topk_idx.emplace_back();
    auto& weights = t.topk_weights.emplace_back();
    for (std::int64_t i = 0; i < n; ++i, ++global) {
      const CounterRng rng(seed, global);
      for (int c = 0; c < hidden; ++c)
        x.push_back(bf16_from_float(static_cast<float>(rng.normal(c))));
      const std::uint64_t first = rng.bits(100'000) % static_cast<std::uint64_t>(num_experts);
      // Both steps are coprime to the number of experts, so a token's experts are distinct.
      const std::uint64_t step =
          rng.bits(100'001) % 2 ? 1 : static_cast<std::uint64_t>(std::max(1, num_experts - 1));
      for (int k = 0; k < num_topk; ++k) {
        const bool empty = rng.bits(100'010 + k) % 8 == 0 || k >= num_experts;
        idx.push_back(
            empty ? -1
                  : static_cast<std::int32_t>((first + step * static_cast<std::uint64_t>(k)) %
                                              static_cast<std::uint64_t>(num_experts)));
        weights.push_back(static_cast<float>(rng.uniform(100'100 + k)));
      }
    }
  }
  return t;
}

/// The same global tokens and experts, spread over `num_ranks`.
inline Traffic spread_over(const Traffic& t, int num_ranks) {
  Traffic out{
      .num_topk = t.num_topk, .hidden = t.hidden, .num_experts = t.num_experts, .num_tokens = {}};
  std::vector<std::uint16_t> x;
  std::vector<std::int32_t> idx;
  std::vector<float> weights;
  for (int r = 0; r < t.num_ranks(); ++r) {
    x.insert(x.end(), t.x[r].begin(), t.x[r].end());
    idx.insert(idx.end(), t.topk_idx[r].begin(), t.topk_idx[r].end());
    weights.insert(weights.end(), t.topk_weights[r].begin(), t.topk_weights[r].end());
  }
  const auto total = static_cast<std::int64_t>(idx.size()) / t.num_topk;
  for (int r = 0; r < num_ranks; ++r) {
    const std::int64_t begin = total * r / num_ranks, end = total * (r + 1) / num_ranks;
    out.num_tokens.push_back(end - begin);
    out.x.emplace_back(x.begin() + begin * t.hidden, x.begin() + end * t.hidden);
    out.topk_idx.emplace_back(idx.begin() + begin * t.num_topk, idx.begin() + end * t.num_topk);
    out.topk_weights.emplace_back(weights.begin() + begin * t.num_topk,
                                  weights.begin() + end * t.num_topk);
  }
  return out;
}

/// One row as it must arrive: payload bytes, then scale bytes.
inline std::vector<std::byte> wire_bytes(const std::uint16_t* x, int hidden, WireFormat wire,
                                         float static_scale) {
  std::vector<float> values(static_cast<std::size_t>(hidden));
  for (int i = 0; i < hidden; ++i) values[i] = bf16_to_float(x[i]);
  std::vector<std::byte> bytes(wire_bytes_per_token(wire, hidden));
  if (wire == WireFormat::kBf16) {
    std::memcpy(bytes.data(), x, bytes.size());
    return bytes;
  }
  std::vector<std::uint8_t> codes(values.size());
  std::vector<float> scales;
  const std::size_t group =
      wire == WireFormat::kE4m3Token ? values.size() : std::size_t{kActivationGroup};
  for (std::size_t g = 0; g < values.size(); g += group) {
    const std::span in(values.data() + g, group);
    const std::span out(codes.data() + g, group);
    if (wire == WireFormat::kE4m3Static) {
      quantize_static(in, static_scale, out);
    } else {
      scales.push_back(wire == WireFormat::kE4m3Pow2 ? quantize_group_pow2(in, out)
                                                     : quantize_group(in, out));
    }
  }
  std::memcpy(bytes.data(), codes.data(), codes.size());
  if (!scales.empty())
    std::memcpy(&bytes[codes.size()], scales.data(), scales.size() * sizeof(float));
  return bytes;
}

struct Arrival {
  int rank;
  std::int64_t token;
  int slot;
};

/// Rows of one expert in the order they must have: source rank, token, slot.
inline std::vector<Arrival> arrivals(const Traffic& t, int expert) {
  std::vector<Arrival> rows;
  for (int r = 0; r < t.num_ranks(); ++r) {
    for (std::int64_t i = 0; i < t.num_tokens[r]; ++i) {
      for (int k = 0; k < t.num_topk; ++k) {
        if (t.topk_idx[r][i * t.num_topk + k] == expert) rows.push_back({r, i, k});
      }
    }
  }
  return rows;
}

/// What expert `e` makes of the row it was sent: different for every expert, element and row.
inline std::uint16_t expert_output(int e, const std::byte* row, std::size_t row_bytes,
                                   int element) {
  std::uint64_t hash =
      mix64(static_cast<std::uint64_t>(e) * 1'000'003 + static_cast<std::uint64_t>(element));
  hash ^= static_cast<std::uint64_t>(row[static_cast<std::size_t>(element) % row_bytes]) << 20;
  hash ^= static_cast<std::uint64_t>(row[row_bytes / 2]) << 40;
  const double unit = static_cast<double>(mix64(hash) >> 11) * 0x1p-53;
  return bf16_from_float(static_cast<float>(2 * unit - 1));
}

/// y of one token: float32, in order of the slots, scaled once, rounded once.
inline std::vector<std::uint16_t> combined(const Traffic& t, int r, std::int64_t token,
                                           WireFormat wire, float factor) {
  const auto row = wire_bytes(&t.x[r][token * t.hidden], t.hidden, wire, t.s1);
  std::vector<std::uint16_t> y(static_cast<std::size_t>(t.hidden));
  for (int i = 0; i < t.hidden; ++i) {
    float sum = 0;
    for (int k = 0; k < t.num_topk; ++k) {
      const std::int32_t e = t.topk_idx[r][token * t.num_topk + k];
      if (e < 0) continue;
      const float product = t.topk_weights[r][token * t.num_topk + k] *
                            bf16_to_float(expert_output(e, row.data(), row.size(), i));
      sum = sum + product;
    }
    y[static_cast<std::size_t>(i)] = bf16_from_float(sum * factor);
  }
  return y;
}

/// Compares rank r's batch with the model, element by element, and fills `expert_y` for combine.
inline void check_batch(const Traffic& t, const ExchangeConfig& config, int r,
                        const ExpertBatch& batch, std::vector<std::uint16_t>& expert_y) {
  const int num_local = config.num_experts / t.num_ranks();
  const std::size_t payload = config.wire == WireFormat::kBf16 ? 2u * t.hidden : 1u * t.hidden;
  const std::size_t scales = wire_bytes_per_token(config.wire, t.hidden) - payload;
  expert_y.assign(static_cast<std::size_t>(batch.x.shape.num_elements()), 0x7fc1);
  for (int e = 0; e < num_local; ++e) {
    const int expert = r * num_local + e;
    const std::vector<Arrival> rows = arrivals(t, expert);
    ASSERT_EQ(batch.num_rows.as<std::int32_t>()[e], static_cast<int>(rows.size()))
        << "expert " << expert;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto row = static_cast<std::size_t>(batch.row_begin.as<std::int64_t>()[e]) + i;
      const auto expected =
          wire_bytes(&t.x[rows[i].rank][rows[i].token * t.hidden], t.hidden, config.wire, t.s1);
      std::vector<std::byte> actual(payload + scales);
      std::memcpy(actual.data(), batch.x.as<std::byte>() + row * payload, payload);
      if (scales > 0) {
        std::memcpy(&actual[payload], batch.x_scale.as<std::byte>() + row * scales, scales);
      }
      ASSERT_EQ(actual, expected) << "expert " << expert << " row " << i << " from rank "
                                  << rows[i].rank << " token " << rows[i].token;
      for (int c = 0; c < t.hidden; ++c) {
        expert_y[row * static_cast<std::size_t>(t.hidden) + static_cast<std::size_t>(c)] =
            expert_output(expert, actual.data(), actual.size(), c);
      }
    }
  }
}

}  // namespace sluice::testing
