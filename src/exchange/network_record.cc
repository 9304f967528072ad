#include "exchange/network_record.h"

#include <algorithm>
#include <cstring>

#include "core/fail.h"
#include "exchange/slot_ranks.h"
#include "sluice/network_bytes.h"

namespace sluice {
namespace {

constexpr std::size_t align16(std::size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

}  // namespace

NetworkRecord::NetworkRecord(const ExchangeConfig& config)
    : payload_bytes(wire_payload_bytes(config.wire, config.hidden)),
      scale_bytes(wire_scale_bytes(config.wire, config.hidden)),
      num_topk(config.num_topk),
      num_counts(config.mode == Mode::kLowLatency ? config.total_slots() : 0),
      has_weights(config.total_parts() > 1) {
  const auto topk = static_cast<std::size_t>(config.num_topk);
  scales = payload_bytes;
  token = scales + scale_bytes;
  slots = token + sizeof(std::int32_t);
  weights = slots + topk * sizeof(std::int32_t);
  bytes = align16(weights + (has_weights ? topk * sizeof(float) : 0));
  counts = sizeof(std::int32_t);
  layer = counts + static_cast<std::size_t>(std::max(num_counts, 1)) * sizeof(std::int32_t);
  header_bytes = align16(layer + sizeof(std::int32_t));
}

std::int32_t PieceView::num_records() const {
  std::int32_t n = 0;
  std::memcpy(&n, piece_, sizeof(n));
  return n;
}

void write_record(const NetworkRecord& layout, const WireToken& token, const float* weights,
                  int host, std::span<const int> host_of_slot, std::byte* out) {
  const auto& [idx, payload, scales, slots] = token;
  SLUICE_ASSERT(payload.size() == layout.payload_bytes && scales.size() == layout.scale_bytes);
  std::memcpy(out, payload.data(), payload.size());
  if (!scales.empty()) std::memcpy(out + layout.scales, scales.data(), scales.size());
  std::memset(out + layout.token, 0, layout.bytes - layout.token);
  std::memcpy(out + layout.token, &idx, sizeof(idx));
  for (std::size_t k = 0; k < slots.size(); ++k) {
    const std::int32_t slot = slots[k];
    const bool is_there = slot >= 0 && host_of_slot[static_cast<std::size_t>(slot)] == host;
    const std::int32_t value = is_there ? slot : -1;
    std::memcpy(out + layout.slots + k * sizeof(value), &value, sizeof(value));
    if (!is_there || !layout.has_weights) continue;
    std::memcpy(out + layout.weights + k * sizeof(float), weights + k, sizeof(float));
  }
}

void write_header(const NetworkRecord& layout, std::int32_t num_records,
                  std::span<const std::int32_t> counts, std::byte* out) {
  std::memset(out, 0, layout.header_bytes);
  std::memcpy(out, &num_records, sizeof(num_records));
  if (layout.num_counts == 0) return;
  SLUICE_ASSERT(counts.size() == static_cast<std::size_t>(layout.num_counts));
  std::memcpy(out + layout.counts, counts.data(), counts.size_bytes());
}

std::vector<std::vector<std::int32_t>> tokens_by_host(std::span<const std::int32_t> slots,
                                                      int num_topk, int num_hosts,
                                                      std::span<const int> host_of_slot) {
  std::vector<std::vector<std::int32_t>> tokens(static_cast<std::size_t>(num_hosts));
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0) continue;
    const auto token = static_cast<std::int32_t>(i / static_cast<std::size_t>(num_topk));
    auto& of_host =
        tokens[static_cast<std::size_t>(host_of_slot[static_cast<std::size_t>(slots[i])])];
    if (of_host.empty() || of_host.back() != token) of_host.push_back(token);
  }
  return tokens;
}

std::vector<int> hosts_of_slots(const Hosts& hosts, int total_slots, int num_ranks) {
  const ExpertPlacement placement(total_slots, num_ranks);
  std::vector<int> host_of_slot;
  for (int slot = 0; slot < total_slots; ++slot) {
    host_of_slot.push_back(hosts.host_of(placement.rank_of(slot)));
  }
  return host_of_slot;
}

std::size_t network_record_bytes(const ExchangeConfig& config) {
  return NetworkRecord(config).bytes;
}
std::size_t network_header_bytes(const ExchangeConfig& config) {
  return NetworkRecord(config).header_bytes;
}
std::size_t network_dispatch_bytes(const ExchangeConfig& config, std::int64_t num_tokens) {
  return NetworkRecord(config).piece_bytes(num_tokens);
}
std::size_t network_combine_bytes(const ExchangeConfig& config, int num_entries) {
  const int rows = config.total_parts() == 1 ? num_entries : std::min(num_entries, 2);
  return static_cast<std::size_t>(rows) * 2u * static_cast<std::size_t>(config.hidden);
}
std::size_t network_dispatch_piece_bytes(const ExchangeConfig& config) {
  return network_dispatch_bytes(config, config.max_tokens_per_rank);
}
std::size_t network_combine_piece_bytes(const ExchangeConfig& config) {
  return kNetworkHomeHeaderBytes + static_cast<std::size_t>(config.max_tokens_per_rank) *
                                       network_combine_bytes(config, config.num_topk);
}

}  // namespace sluice
