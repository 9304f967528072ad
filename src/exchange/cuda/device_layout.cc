#include "exchange/cuda/device_layout.h"

#include "core/fail.h"
#include "exchange/cuda/rail_layout.h"
#include "exchange/impl.h"

namespace sluice {
namespace {

constexpr std::size_t kAlignment = 256;

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

DeviceLayout::DeviceLayout(const ExchangeConfig& config, int num_ranks)
    : num_slots(config.num_in_flight), placement(config.total_slots(), num_ranks) {
  const auto ranks = static_cast<std::size_t>(num_ranks);
  const auto hidden = static_cast<std::size_t>(config.hidden);
  const bool masked = config.mode == Mode::kLowLatency;
  payload_bytes = wire_payload_bytes(config.wire, config.hidden);
  scale_bytes = wire_scale_bytes(config.wire, config.hidden);
  const std::int64_t tokens_slots = std::int64_t{config.max_tokens_per_rank} * config.num_topk;
  max_rows = masked ? std::int64_t{placement.num_local()} * config.max_m : num_ranks * tokens_slots;
  slot_row_bytes = aligned(static_cast<std::size_t>(tokens_slots) * sizeof(std::int64_t));
  rows_bytes = aligned(static_cast<std::size_t>(placement.num_local()) *
                       (sizeof(std::int64_t) + sizeof(std::int32_t)));
  home_bytes = aligned(ranks * sizeof(void*));
  fits_home_rows = tokens_slots <= max_rows;

  std::size_t at = 0;
  const auto place = [&](std::size_t& offset, std::size_t bytes) {
    offset = at;
    at += aligned(bytes);
  };
  const auto rows = static_cast<std::size_t>(max_rows);
  place(dispatched, ranks * sizeof(std::uint64_t));
  place(returned, ranks * sizeof(std::uint64_t));
  place(counts, ranks * static_cast<std::size_t>(config.total_slots()) * sizeof(std::uint64_t));
  place(copies,
        masked ? 0 : ranks * static_cast<std::size_t>(tokens_slots) * sizeof(std::uint64_t));
  flags_and_counts_bytes = at;
  place(x, rows * payload_bytes);
  place(scale, rows * scale_bytes);
  place(origin, rows * sizeof(std::uint64_t));
  place(expert_y, rows * 2 * hidden);
  slot_bytes = at;
}

std::size_t device_workspace_bytes(const ExchangeConfig& config, int num_ranks) {
  if (config.hosts.num_hosts() > 1) {
    const RailLayout layout(config, num_ranks);
    layout.check(config, num_ranks);
    return layout.total_bytes();
  }
  return DeviceLayout(config, num_ranks).total_bytes();
}

void DeviceLayout::check(const ExchangeConfig& config, int num_ranks) const {
  check_argument(num_ranks <= kMaxDeviceRanks, "{} ranks over CUDA memory; at most {}", num_ranks,
                 int{kMaxDeviceRanks});
  check_argument(config.total_slots() <= cuda::kMaxExchangeExperts,
                 "{} {} over CUDA memory; at most {}",
                 config.num_slots != 0 ? "num_slots" : "num_experts", config.total_slots(),
                 int{cuda::kMaxExchangeExperts});
  check_argument(payload_bytes <= cuda::kMaxPayloadBytes,
                 "hidden {} makes rows of {} bytes; at most {} over CUDA memory", config.hidden,
                 payload_bytes, int{cuda::kMaxPayloadBytes});
  check_argument(max_rows < (std::int64_t{1} << 31), "{} rows on a rank; at most 2^31 - 1",
                 max_rows);
}

}  // namespace sluice
