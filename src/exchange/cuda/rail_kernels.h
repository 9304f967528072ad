// rail_kernels.h - host side of the kernels of the CUDA exchange over hosts.
//
// Plain C++. Every launcher is asynchronous on the stream, allocates nothing, waits for nothing on
// the host and may be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "exchange/cuda/rail_params.h"
#include "sluice/recipe.h"

namespace sluice::cuda {

/// Sets what the launches rely on; once per process and device.
void prepare_rail_kernels();

void launch_route(const RailSlot& p, const RailTokens& d, void* stream);
/// Quantizes own tokens, too. Counts clipped values in p.state->stats.
void launch_pack(const RailSlot& p, const RailTokens& d, WireFormat wire, int num_ctas,
                 void* stream);
void launch_sizes(const RailSlot& p, void* stream);
void launch_place(const RailSlot& p, const RailTokens& d, void* stream);
void launch_spread(const RailSlot& p, int num_ctas, void* stream);
void launch_give(const RailSlot& p, bool dropped, void* stream);
void launch_relay(const RailSlot& p, bool sends, int num_ctas, void* stream);
void launch_sum(const RailSlot& p, const RailTokens& d, int num_ctas, void* stream);
void launch_keep_rows(const RailSlot& p, const std::uint16_t* expert_y, int num_ctas, void* stream);

}  // namespace sluice::cuda
