// checksum.h - a sum of 64-bit words that any number of threads may add up in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "core/counter_rng.h"

namespace sluice {

/// sum over i of mix64(word[i] + (first_word + i + 1) * c), modulo 2^64: changes with any word and
/// with its position. Of two parts that follow each other it is the sum of theirs.
/// Requires: bytes.size() is a multiple of 8.
[[nodiscard]] inline std::uint64_t checksum_of(std::span<const std::byte> bytes,
                                               std::uint64_t first_word = 0) noexcept {
  std::uint64_t sum = 0, at = first_word;
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
    std::uint64_t word;
    std::memcpy(&word, bytes.data() + i, sizeof(word));
    sum += mix64(word + ++at * 0x9e3779b97f4a7c15u);
  }
  return sum;
}

}  // namespace sluice
