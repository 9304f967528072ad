#include "backend/cpu/cpu_traits.h"

#include "backend/cpu/prepared_experts.h"

namespace sluice::cpu {
namespace {

PackedSizes packed_sizes(const ModelGeometry& geometry, DType scale_dtype) {
  const auto bytes = [&](std::int64_t n, std::int64_t k) {
    return PreparedMatrix{.format = geometry.weight_format,
                          .scale_dtype = scale_dtype,
                          .group_size = geometry.group_size,
                          .n = n,
                          .k = k,
                          .has_bias = geometry.has_bias}
        .memory_bytes();
  };
  return {.gate_up_bytes = 2 * bytes(geometry.intermediate, geometry.hidden),
          .down_bytes = bytes(geometry.hidden, geometry.intermediate),
          .alignment = kLineBytes};
}

}  // namespace

const BackendTraits& traits() noexcept {
  static constexpr BackendTraits kTraits{
      .has_host_memory = true,
      .adds_bias = true,
      .exchange_keeps_expert_y = false,
      // A second slot spares a wait for the slowest rank's release of the first.
      .engine_slots = 2,
      // Read into a core's second-level cache, and repacked from there.
      .load_piece_bytes = std::size_t{1} << 20,
      // Exact within a group of 128 (digits.h); groups are added in float32.
      .error = {.accumulation = 0x1p-20, .alignment = 0},
      .engine_limit = 0x1p-10,
      .packed_sizes = packed_sizes};
  return kTraits;
}

}  // namespace sluice::cpu
