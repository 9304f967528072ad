// row_digest.h - a hash of one row of GEMM input; sums of it do not depend on where rows lie.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "core/counter_rng.h"

namespace sluice {

/// `expert` is global, `row` counts within it. The number of codes is a multiple of 8.
[[nodiscard]] inline std::uint64_t row_digest(std::uint64_t expert, std::uint64_t row,
                                              std::span<const std::uint8_t> codes,
                                              std::span<const float> scales) noexcept {
  std::uint64_t hash = mix64(expert << 32 | row);
  for (const std::span<const std::byte> bytes : {std::as_bytes(codes), std::as_bytes(scales)}) {
    for (std::size_t i = 0; i < bytes.size(); i += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, bytes.data() + i, std::min<std::size_t>(8, bytes.size() - i));
      hash = mix64(hash ^ word);
    }
  }
  return hash;
}

}  // namespace sluice
