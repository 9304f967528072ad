// counter_rng.h - random numbers addressed by (seed, stream, index): no state, any order, any
// thread.
#pragma once

#include <cmath>
#include <cstdint>

namespace sluice {

/// SplitMix64's finalizer (Steele, Lea, Flood 2014): a bijection of 64-bit words that mixes well.
[[nodiscard]] constexpr std::uint64_t mix64(std::uint64_t z) noexcept {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

class CounterRng {
 public:
  constexpr CounterRng(std::uint64_t seed, std::uint64_t stream) noexcept
      : key_(mix64(mix64(seed + 0x9e3779b97f4a7c15u) ^ (stream * 0xd1342543de82ef95u + 1))) {}

  [[nodiscard]] constexpr std::uint64_t bits(std::uint64_t index) const noexcept {
    return mix64(key_ + index * 0x9e3779b97f4a7c15u);
  }
  /// [0, 1)
  [[nodiscard]] constexpr double uniform(std::uint64_t index) const noexcept {
    return static_cast<double>(bits(index) >> 11) * 0x1p-53;
  }
  /// Standard normal, by Box and Muller from two halves of one word.
  [[nodiscard]] double normal(std::uint64_t index) const noexcept {
    const std::uint64_t word = bits(index);
    const double u = (static_cast<double>(word >> 32) + 0.5) * 0x1p-32;
    const double v = static_cast<double>(word & 0xffffffffu) * 0x1p-32;
    return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
  }

 private:
  std::uint64_t key_;
};

}  // namespace sluice
