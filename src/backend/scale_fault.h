// scale_fault.h - a scale that is no number, as one number: for host and device code.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "quant/scale_limit.h"

namespace sluice {

/// Where and what the first bad scale is, in a number that is smaller the earlier it is:
/// expert 10 bits, matrix 2, row 20, group 16, the upper half of its float32 16.
inline constexpr std::uint64_t kNoFault = ~std::uint64_t{0};
enum class PackedMatrix : std::uint8_t { kGate, kUp, kDown };
SLUICE_HOST_DEVICE constexpr std::uint64_t scale_fault(int expert, PackedMatrix matrix,
                                                       std::int64_t row, std::int64_t group,
                                                       std::uint32_t float_bits) {
  return static_cast<std::uint64_t>(expert) << 54 | static_cast<std::uint64_t>(matrix) << 52 |
         static_cast<std::uint64_t>(row) << 32 | static_cast<std::uint64_t>(group) << 16 |
         float_bits >> 16;
}

}  // namespace sluice
