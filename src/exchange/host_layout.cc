#include "exchange/host_layout.h"

#include "exchange/impl.h"

namespace sluice {
namespace {

constexpr std::size_t kAlignment = 128;

}  // namespace

HostLayout::HostLayout(const ExchangeConfig& config, int num_ranks_in)
    : num_ranks(num_ranks_in),
      num_slots(config.num_in_flight),
      placement(config.total_slots(), num_ranks_in) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  const auto tokens = static_cast<std::size_t>(config.max_tokens_per_rank);
  const auto topk = static_cast<std::size_t>(config.num_topk);
  const auto hidden = static_cast<std::size_t>(config.hidden);
  payload_bytes = wire_payload_bytes(config.wire, config.hidden);
  scale_bytes = wire_scale_bytes(config.wire, config.hidden);
  home_bytes = 2 * hidden;
  staging_bytes = tokens * (payload_bytes + scale_bytes);

  std::size_t at = 0;
  const auto place = [&](std::size_t& offset, std::size_t bytes) {
    offset = at;
    at += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  const bool masked = config.mode == Mode::kLowLatency;
  window_rows = masked ? std::int64_t{placement.num_local()} * config.max_m
                       : static_cast<std::int64_t>(ranks * tokens);
  const auto rows = static_cast<std::size_t>(window_rows);
  place(counts, ranks * (masked ? static_cast<std::size_t>(config.total_slots()) : 1) * 4);
  place(x, rows * payload_bytes);
  place(scale, rows * scale_bytes);
  if (masked) {
    place(origin, rows * 4);
  } else {
    place(experts, rows * topk * 4);
    place(token, rows * 4);
    // A token copy becomes at most one row for each of its slots.
    expanded_rows = window_rows * config.num_topk;
    rows_x_bytes = static_cast<std::size_t>(expanded_rows) * payload_bytes;
    rows_scale_bytes = static_cast<std::size_t>(expanded_rows) * scale_bytes;
  }
  place(home, tokens * topk * home_bytes);
  slot_bytes = at;
}

std::size_t host_workspace_bytes(const ExchangeConfig& config, int num_ranks) {
  return HostLayout(config, num_ranks).total_bytes();
}

}  // namespace sluice
