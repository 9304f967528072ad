// repack_checks.h - what both backends ask of repacked weights, and how they name a scale that is
// not a number.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/scale_fault.h"
#include "sluice/repack.h"

namespace sluice {

/// Throws: kInvalidArgument naming the field.
void check_format(const RepackFormat& format);

/// Packed memory of a layer.
struct PackedMemory {
  std::byte* gate_up = nullptr;
  std::byte* down = nullptr;
  PackedSizes sizes;
};
/// Those of expert `index`, in either part.
[[nodiscard]] inline std::array<std::span<std::byte>, 2> part_bytes(const PackedMemory& memory,
                                                                    int index) {
  const auto at = static_cast<std::size_t>(index);
  const PackedSizes& sizes = memory.sizes;
  return {std::span(memory.gate_up + at * sizes.gate_up_bytes, sizes.gate_up_bytes),
          std::span(memory.down + at * sizes.down_bytes, sizes.down_bytes)};
}
/// `memory` in its two parts.   Throws: kInvalidArgument for one that is too small, misaligned or
/// on another device.
[[nodiscard]] PackedMemory split_memory(const RepackFormat& format, const MutableTensorView& memory,
                                        const Device& device);

/// That experts [first, first + sources.size()) exist, that their sources can be read as
/// MatrixSource says, and that packing an expert overwrites no source of one that comes after it.
/// Throws: kInvalidArgument naming the expert and the matrix.
void check_sources(const RepackFormat& format, const PackedMemory& memory, int first,
                   std::span<const ExpertSource> sources);

/// Whether packing experts [first, first + sources.size()) overwrites some of their own sources.
[[nodiscard]] bool overlaps_itself(const RepackFormat& format, const PackedMemory& memory,
                                   int first, std::span<const ExpertSource> sources);

/// Whether packing gate and up of these experts, one after the other, and then their downs
/// overwrites nothing but codes of the expert itself and of those before it.
[[nodiscard]] bool overlaps_codes_alone(const RepackFormat& format, const PackedMemory& memory,
                                        int first, std::span<const ExpertSource> sources);

/// Whether packing gate and up of expert `index` overwrites nothing of its down matrix's source.
[[nodiscard]] bool leaves_down(const RepackFormat& format, const PackedMemory& memory, int index,
                               const ExpertSource& source);

/// Throws: kInvalidArgument naming expert, matrix, place and value, unless `fault` is kNoFault.
void throw_scale_fault(std::uint64_t fault, const RepackFormat& format);

}  // namespace sluice
