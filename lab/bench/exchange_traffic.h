// exchange_traffic.h - what `bench exchange` sends: tokens and routing of all ranks, and what must
// arrive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sluice/exchange.h"
#include "sluice/lab/exchange_bench.h"

namespace sluice {

/// That one thread makes or checks at a time.
inline constexpr std::size_t kTokensAtATime = 16;

/// Tokens and routing of every rank, and the bytes that each token is on the wire.
struct Traffic {
  ExchangeConfig config;
  float static_scale = 0;
  int num_ranks = 1;
  std::int64_t tokens = 0;  // Of each rank.
  std::size_t row_bytes = 0, payload_bytes = 0;
  std::vector<std::uint16_t> x = {};        // [num_ranks * tokens, hidden]
  std::vector<std::int32_t> topk_idx = {};  // [num_ranks * tokens, num_topk]
  std::vector<float> weights = {};
  std::vector<std::byte> wire = {};  // [num_ranks * tokens, row_bytes]: payload, then scales

  [[nodiscard]] std::size_t slots_of_rank() const {
    return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(config.num_topk);
  }
};

/// `tokens` tokens of each rank. `all_gather`: to one expert of each rank, with weight 1; otherwise
/// the ordinary workload's routing.
[[nodiscard]] Traffic make_traffic(const ExchangeBenchConfig& bench, const ExchangeConfig& config,
                                   int tokens, bool all_gather);

/// What expert `e` makes of channel `c` of a token: cheap, and different for all three.
[[nodiscard]] inline float expert_value(std::int32_t e, std::size_t token, std::size_t c) {
  const auto mixed = static_cast<std::uint32_t>(e) * 0x9e3779b9u +
                     static_cast<std::uint32_t>(token) * 0x85ebca6bu +
                     static_cast<std::uint32_t>(c) * 0xc2b2ae35u;
  return static_cast<float>(static_cast<std::int32_t>(mixed ^ (mixed >> 15))) * 0x1p-31f;
}

}  // namespace sluice
