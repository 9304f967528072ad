// device_batch.h - what dispatches on one host and over several share: which slot is free, and
// where the rows lie in this rank's window.
#pragma once

#include <algorithm>
#include <vector>

#include "backend/ops.h"
#include "core/fail.h"
#include "exchange/impl.h"
#include "sluice/quant.h"

namespace sluice {

/// The lowest free slot. Its last use may have been on another stream.
template <class Slot>
[[nodiscard]] Slot& take_free(std::vector<Slot>& slots, Stream stream) {
  const auto found = std::ranges::find(slots, false, &Slot::busy);
  check_argument(found != slots.end(),
                 "{} dispatches are in flight, num_in_flight is {}: combine or destroy one first",
                 slots.size(), slots.size());
  found->order->before(stream);
  return *found;
}

/// Fills the route's batch and expert_y. `p` (cuda::SlotParams, cuda::RailSlot) has the offsets in
/// `window` and the arrays beside it.
template <class Params>
void fill_route(const Exchange::Impl& exchange, const Params& p, std::byte* window,
                std::int64_t num_tokens, Dispatched::Route& route) {
  const ExchangeConfig& config = exchange.config;
  const bool masked = config.mode == Mode::kLowLatency;
  const std::int64_t num_local = exchange.placement.num_local();
  const auto shape = [&](std::int64_t width) {
    return masked ? Shape{num_local, config.max_m, width} : Shape{exchange.max_rows, width};
  };
  ExpertBatch& batch = route.batch;
  batch.layout = config.mode;
  batch.x = {window + p.x, config.wire == WireFormat::kBf16 ? DType::kBFloat16 : DType::kFloat8E4M3,
             shape(config.hidden), exchange.device};
  const std::int64_t num_scales = scales_per_row(sent_cast(config.wire), config.hidden);
  if (num_scales > 0) {
    batch.x_scale = {window + p.scale, DType::kFloat32, shape(num_scales), exchange.device};
  }
  batch.num_rows = {p.num_rows, DType::kInt32, Shape{num_local}, exchange.device};
  batch.row_begin = {p.row_begin, DType::kInt64, Shape{num_local}, exchange.device};
  const std::int64_t entries = num_tokens * config.num_topk * exchange.num_ranks,
                     num_experts = exchange.placement.num_experts();
  batch.expected_m = static_cast<int>((entries + num_experts - 1) / num_experts);
  route.expert_y.data = window + p.expert_y;
  route.expert_y.dtype = DType::kBFloat16;
  route.expert_y.shape = shape(config.hidden);
  route.expert_y.device = exchange.device;
}

}  // namespace sluice
