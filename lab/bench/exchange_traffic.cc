#include "bench/exchange_traffic.h"

#include <cstring>
#include <span>
#include <utility>

#include "core/counter_rng.h"
#include "sluice/lab/parallel.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Tokens [first, end) of x and wire. Values only have to tell tokens and channels apart.
void fill_tokens(Traffic& t, std::size_t first, std::size_t end, std::uint64_t seed) {
  const auto hidden = static_cast<std::size_t>(t.config.hidden);
  std::vector<float> values(hidden);
  std::vector<std::uint8_t> codes(hidden);
  for (std::size_t i = first; i < end; ++i) {
    for (std::size_t c = 0; c < hidden; ++c) {
      const std::uint64_t bits = mix64(seed ^ ((i * hidden + c) * 0x9e3779b97f4a7c15u));
      const float unit = static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f;
      t.x[i * hidden + c] = bf16_from_float(unit * static_cast<float>(1 << (bits & 3)));
      values[c] = bf16_to_float(t.x[i * hidden + c]);
    }
    std::byte* const row = &t.wire[i * t.row_bytes];
    if (t.config.wire == WireFormat::kBf16) {
      std::memcpy(row, &t.x[i * hidden], t.row_bytes);
      continue;
    }
    if (t.config.wire == WireFormat::kE4m3Static) {
      quantize_static(values, t.static_scale, codes);
    }
    const auto scales =
        static_cast<std::size_t>(scales_per_row(sent_cast(t.config.wire), t.config.hidden));
    for (std::size_t g = 0; g < scales; ++g) {
      const std::size_t group = hidden / scales;
      const std::span in(values.data() + g * group, group);
      const std::span out(codes.data() + g * group, group);
      const float scale = t.config.wire == WireFormat::kE4m3Pow2 ? quantize_group_pow2(in, out)
                                                                 : quantize_group(in, out);
      std::memcpy(row + t.payload_bytes + g * sizeof(float), &scale, sizeof(scale));
    }
    std::memcpy(row, codes.data(), codes.size());
  }
}

}  // namespace

Traffic make_traffic(const ExchangeBenchConfig& bench, const ExchangeConfig& config, int tokens,
                     bool all_gather) {
  Traffic t{.config = config,
            .static_scale = bench.static_scale,
            .num_ranks = bench.num_ranks,
            .tokens = tokens};
  t.row_bytes = wire_bytes_per_token(config.wire, config.hidden);
  t.payload_bytes =
      static_cast<std::size_t>(config.hidden) * (config.wire == WireFormat::kBf16 ? 2u : 1u);
  const auto all = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(bench.num_ranks);
  t.x.resize(all * static_cast<std::size_t>(config.hidden));
  t.wire.resize(all * t.row_bytes);
  for_pieces_in_parallel(all, kTokensAtATime, [&](std::size_t first, std::size_t end) {
    fill_tokens(t, first, end, bench.seed);
  });
  if (all_gather) {
    for (std::size_t i = 0; i < all * static_cast<std::size_t>(config.num_topk); ++i) {
      t.topk_idx.push_back(
          static_cast<std::int32_t>(i % static_cast<std::size_t>(bench.num_ranks)));
      t.weights.push_back(1.0f);
    }
    return t;
  }
  // Routing of the ordinary workload, without its values.
  Workload load = make_workload({.num_experts = config.num_experts,
                                 .num_topk = config.num_topk,
                                 .hidden = kActivationGroup,
                                 .routing = bench.routing,
                                 .seed = bench.seed},
                                0, static_cast<std::int64_t>(all));
  t.topk_idx = std::move(load.topk_idx);
  t.weights = std::move(load.topk_weights);
  return t;
}

}  // namespace sluice
