// random_program.h - program number `index` of a seed: bytes for fuzz_checkpoint_config.cc. A
// program depends on nothing but the two numbers, so that one of millions can be run again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sluice::fuzz {

/// SplitMix64 (Steele, Lea, Flood, 2014): every state has a sound successor, and any seed will do.
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t state) : state_(state) {}
  std::uint64_t operator()() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

/// Of 3 to 50 bytes: few edits, so that about every second result is accepted.
inline std::vector<std::uint8_t> random_program(std::uint64_t seed, std::uint64_t index) {
  SplitMix64 random(SplitMix64(seed)() ^ index);
  std::vector<std::uint8_t> program(3 + random() % 48);
  for (std::uint8_t& byte : program) byte = static_cast<std::uint8_t>(random() >> 56);
  program.shrink_to_fit();
  return program;
}

}  // namespace sluice::fuzz
