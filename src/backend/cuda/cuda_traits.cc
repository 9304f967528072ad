#include "backend/cuda/cuda_traits.h"

#include "backend/cuda/w4a8.h"
#include "sluice/checkpoint.h"

namespace sluice::cuda {
namespace {

PackedSizes packed_sizes(const ModelGeometry& geometry, DType scale_dtype) {
  const auto bytes = [&](int n, int k) {
    return packed_expert_bytes({.n = n,
                                .k = k,
                                .group = geometry.group_size,
                                .scale_type = scale_type(scale_dtype),
                                .format = geometry.weight_format});
  };
  return {.gate_up_bytes = bytes(2 * geometry.intermediate, geometry.hidden),
          .down_bytes = bytes(geometry.hidden, geometry.intermediate),
          .alignment = 128};
}

}  // namespace

const BackendTraits& traits() noexcept {
  static constexpr BackendTraits kTraits{
      .has_host_memory = false,
      // It is in the window, where the tokens' home ranks read it.
      .exchange_keeps_expert_y = true,
      // Reuse of a slot waits for nothing, and a slot takes as much memory as all its rows.
      .engine_slots = 1,
      // Each copy costs the copy engine 4 us beside its bytes: pieces of 1 MB leave it at 45 of
      // 55 GB/s, and of 8 MB have left the core's cache before they are copied.
      .load_piece_bytes = std::size_t{2} << 20,
      // Hopper's FP8 tensor cores keep 13 fraction bits within each group of 128.
      .error = {.accumulation = 0x1p-20, .alignment = 0x1p-13},
      .engine_limit = 0x1p-6,
      .packed_sizes = packed_sizes};
  return kTraits;
}

}  // namespace sluice::cuda
