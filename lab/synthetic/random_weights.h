// synthetic.h - numbers that look like a quantized model's, from a counter-based generator.
//
// Every matrix has a random stream of its own, keyed by (seed, layer, expert, matrix), and nothing
// here calls libm: the bytes depend neither on the order of the work nor on the machine.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/lab/synthetic.h"

namespace sluice {

/// SplitMix64: a counter, hashed.
class RandomStream {
 public:
  explicit RandomStream(std::uint64_t key) noexcept : state_(key) {}
  [[nodiscard]] std::uint64_t next() noexcept {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  /// Uniform in [0, 1).
  [[nodiscard]] float uniform() noexcept {
    return static_cast<float>(next() >> 40) * (1.0f / (1 << 24));
  }
  /// Mean 0, deviation 1, within +-3.5: the sum of four uniform values.
  [[nodiscard]] float normal() noexcept;

 private:
  std::uint64_t state_;
};

/// A key from a path of numbers; different paths give unrelated keys.
[[nodiscard]] std::uint64_t stream_key(std::initializer_list<std::uint64_t> path) noexcept;

/// 2^x for |x| < 100, to about 1e-5 relative; the same bits everywhere.
[[nodiscard]] float exp2_portable(float x) noexcept;

/// One matrix as the checkpoint stores it.
struct SyntheticMatrix {
  int n = 0, k = 0, group = 128;
  std::uint64_t key = 0;            ///< Of its random stream.
  std::vector<std::uint8_t> codes;  ///< [n, k / 2]
  std::vector<float> scales;        ///< [n, k / group]
  std::vector<float> row_gains;     ///< [n] factor of each row's scales, for finding large rows.
};

enum class SyntheticRole { kGate, kUp, kDown };

struct SyntheticExpert {
  std::array<SyntheticMatrix, 3> matrices;  ///< gate, up, down
};

/// Codes as amax/7 rounding of normal weights leaves them: -7 .. 7, every group reaching +-7.
/// Scales such that inputs of unit size give outputs of about unit size.
void fill_expert(const SyntheticCheckpoint& spec, int layer, int expert, SyntheticExpert& out);

/// Calibrates input scales by running synthetic_activations() through gate and up.
class Calibration {
 public:
  Calibration(const SyntheticCheckpoint& spec, int layer);
  [[nodiscard]] InputScales input_scales(int expert, const SyntheticExpert& weights) const;

 private:
  [[nodiscard]] std::vector<int> tokens_of(int expert) const;
  std::uint64_t seed_;
  int layer_;
  ModelGeometry geometry_;
  std::vector<float> x_;           // [num_tokens, hidden]
  std::vector<float> token_amax_;  // [num_tokens]
};

}  // namespace sluice
