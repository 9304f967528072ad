// rounds.h - what each round of a test sends: tokens of every rank and their routing, drawn from
// (seed, round).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/counter_rng.h"

namespace sluice::testing {

/// Tokens of all ranks; the routing of a round is drawn from (seed, round).
struct Rounds {
  std::vector<std::int64_t> num_tokens;  // [rank], of each round, unless fresh_counts
  int num_experts = 8, num_topk = 2, hidden = 128;
  std::uint64_t seed = 1;
  bool fresh_counts = false;  // Draw each round's counts from [0, num_tokens[rank]].
  int empty_in = 8;           // One slot in so many is empty.
  float s1 = 0.01f;           // Of the static wire.
  [[nodiscard]] int num_ranks() const { return static_cast<int>(num_tokens.size()); }
  [[nodiscard]] std::int64_t max_tokens() const {
    std::int64_t most = 1;
    for (const std::int64_t n : num_tokens) most = std::max(most, n);
    return most;
  }
  [[nodiscard]] std::int64_t first_token(int rank) const { return rank * max_tokens(); }
};

/// One round's routing of every rank.
struct Round {
  std::vector<std::int64_t> num_tokens;
  std::vector<std::vector<std::int32_t>> topk_idx;
  std::vector<std::vector<float>> weights;
};

inline Round make_round(const Rounds& rounds, int index) {
  Round round;
  for (int r = 0; r < rounds.num_ranks(); ++r) {
    const CounterRng rng(rounds.seed * 1'000'003 + static_cast<std::uint64_t>(index),
                         static_cast<std::uint64_t>(r));
    std::int64_t n = rounds.num_tokens[static_cast<std::size_t>(r)];
    if (rounds.fresh_counts)
      n = static_cast<std::int64_t>(rng.bits(~0ull) % static_cast<std::uint64_t>(n + 1));
    round.num_tokens.push_back(n);
    auto& idx = round.topk_idx.emplace_back(static_cast<std::size_t>(n * rounds.num_topk));
    auto& weights = round.weights.emplace_back(idx.size());
    const auto experts = static_cast<std::uint64_t>(rounds.num_experts);
    for (std::size_t i = 0; i < idx.size(); ++i) {
      const auto t = i / static_cast<std::size_t>(rounds.num_topk);
      const auto k = i % static_cast<std::size_t>(rounds.num_topk);
      // Distinct experts of one token: a random start and an odd, random step modulo 2^m would need
      // a power of two; steps of 1 or -1 do for any number.
      const std::uint64_t draw = rng.bits(3 * t), word = rng.bits(3 * i + 1);
      const std::uint64_t step = draw >> 40 & 1 ? 1 : experts - 1;
      const bool empty = k >= experts || (rounds.empty_in > 0 &&
                                          word % static_cast<std::uint64_t>(rounds.empty_in) == 0);
      idx[i] = empty ? -1 : static_cast<std::int32_t>((draw % experts + step * k) % experts);
      weights[i] = static_cast<float>(word >> 40) * 0x1p-24f;
    }
  }
  return round;
}

}  // namespace sluice::testing
