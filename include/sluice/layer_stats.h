// layer_stats.h - what layers say of themselves: times, rows and memory.
//
// Layer::stats() fills a ForwardStats, LayerGroup::memory() and plan_memory() a LayerGroupMemory.
// What moves between ranks is counted in ExchangeCounters (exchange.h) and RebalanceCounters
// (rebalance.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sluice {

/// Wall time of the stages of one forward(), microseconds. Where GEMM1 and activation are one fused
/// kernel, the time is split by what each of its threads measured (CPU) or reported as GEMM1
/// (CUDA).
struct StageTimes {
  double dispatch_us = 0, quantize_us = 0, gemm1_us = 0, activation_us = 0, gemm2_us = 0,
         combine_us = 0, total_us = 0;
};

/// What one forward() did on this rank.
struct ForwardStats {
  StageTimes times;
  std::vector<std::int64_t> rows_per_expert;  ///< [num_local_experts], or of this rank's slots
  std::uint64_t weight_bytes_read = 0;        ///< Codes and scales of experts that had rows.
  std::uint64_t flops = 0;                    ///< 2 * rows * 3 * hidden * intermediate.
};

/// Bytes that a group and its layers hold on one rank. The first three are sums over the layers.
struct LayerGroupMemory {
  int num_layers = 0;
  std::size_t codes_bytes = 0;     ///< INT4 codes of the rank's experts, as the maker had them.
  std::size_t scales_bytes = 0;    ///< Their group scales.
  std::size_t prepared_bytes = 0;  ///< Both, in the backend's own order: what stays resident.
  std::size_t exchange_bytes = 0;  ///< Buffers of the exchanges, one per mode and wire format.
  std::size_t scratch_bytes = 0;   ///< Rows between the stages.
  std::size_t moving_bytes = 0;    ///< Kept by rebalance() with keep_memory.
  [[nodiscard]] std::size_t total_bytes() const noexcept {
    return prepared_bytes + exchange_bytes + scratch_bytes + moving_bytes;
  }
};

}  // namespace sluice
