#include "backend/cpu/cpu_traits.h"

#include "backend/cpu/prepared_experts.h"

namespace sluice::cpu {
namespace {

std::size_t prepared_bytes(const ModelGeometry& geometry, int num_experts, DType scale_dtype) {
  const auto bytes = [&](std::int64_t n, std::int64_t k) {
    return PreparedMatrix{.scales_are_bf16 = scale_dtype == DType::kBFloat16,
                          .group_size = geometry.group_size,
                          .n = n,
                          .k = k}
        .memory_bytes();
  };
  const std::size_t gate_and_up = 2 * bytes(geometry.intermediate, geometry.hidden);
  const std::size_t down = bytes(geometry.hidden, geometry.intermediate);
  return static_cast<std::size_t>(num_experts) * (gate_and_up + down);
}

}  // namespace

const BackendTraits& traits() noexcept {
  static constexpr BackendTraits kTraits{
      .has_host_memory = true,
      .exchange_keeps_expert_y = false,
      // A second slot spares a wait for the slowest rank's release of the first.
      .engine_slots = 2,
      // Exact within a group of 128 (digits.h); groups are added in float32.
      .error = {.accumulation = 0x1p-20, .alignment = 0},
      .engine_limit = 0x1p-10,
      .prepared_bytes = prepared_bytes};
  return kTraits;
}

}  // namespace sluice::cpu
