// staged_tokens.h - the tokens of one dispatch as they are sent, and the slots of their entries.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/ops.h"
#include "sluice/exchange.h"

namespace sluice {

/// A rank's own tokens in the wire format, each brought to it once.
class StagedTokens {
 public:
  /// Room for max_tokens_per_rank tokens.   Throws: kOutOfMemory.
  StagedTokens(const ExchangeConfig& config, BackendOps& backend);

  /// x: [num_tokens, hidden] bf16. static_scale: for WireFormat::kE4m3Static, else 0.
  /// Returns: the values that were clipped to +-448.
  [[nodiscard]] std::uint64_t stage(TensorView x, float static_scale, Stream stream);

  [[nodiscard]] std::span<const std::byte> payload(std::int64_t token) const;
  [[nodiscard]] std::span<const std::byte> scales(std::int64_t token) const;
  [[nodiscard]] std::size_t bytes() const noexcept { return memory_->bytes(); }
  /// What bytes() will be.
  [[nodiscard]] static std::size_t planned_bytes(const ExchangeConfig& config);

 private:
  WireFormat wire_;
  int hidden_;
  std::size_t max_tokens_, payload_bytes_, scale_bytes_;
  BackendOps& backend_;
  std::unique_ptr<DeviceBuffer> memory_;  // payload [T], then scales [T]
};

/// The slot of every entry of rank `rank`, or -1: its expert; where the routing has slots, the
/// replica that the entry's row goes to.
/// Throws: kInvalidArgument naming the entry whose expert there is not; nothing was sent.
[[nodiscard]] std::vector<std::int32_t> slots_of_entries(const ExchangeConfig& config,
                                                         const Routing& routing, int rank);

/// Rows per expert to expect, from host data: ExpertBatch::expected_m.
[[nodiscard]] int expected_rows_per_slot(const ExchangeConfig& config, std::int64_t num_tokens,
                                         int num_ranks);

}  // namespace sluice
