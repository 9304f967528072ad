// device_counters.h - what the kernels of the exchange counted, as bytes.
#pragma once

#include <cstdint>

#include "exchange/cuda/device_layout.h"
#include "exchange/cuda/exchange_kernels.h"
#include "sluice/exchange.h"

namespace sluice {

/// Of rank `rank`, after `num_dispatches`.
[[nodiscard]] ExchangeCounters counters_of(const cuda::DeviceStats& stats,
                                           const DeviceLayout& layout, const ExchangeConfig& config,
                                           int rank, std::uint64_t num_dispatches);

}  // namespace sluice
