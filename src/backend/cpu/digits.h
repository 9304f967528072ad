// digits.h - e4m3 activations as signed integer digits, so that a group's dot product is exact.
//
// An e4m3 value times 2^9 is an integer q, |q| <= 448 * 512 < 2^18. It is written in three digits
//
//   q = low + 8 * mid + 2048 * high      low in [-4, 3], mid in [-128, 127], high in [-112, 112]
//
// each of which meets a weight in a byte dot product: int4 + 8, or 2 * e2m1 + 12. Or mid and high
// are one digit of 16 bits, word = mid + 256 * high in [-28672, 28672], in a dot product of int16.
// Or q = low + main, where main is a multiple of 2^cut and a bf16, which is exact because it has no
// more than the 4 significant bits of e4m3; float32 then holds sums of main * w exactly while they
// are not above 2^(24 + cut). Of each group the smallest cut in [0, 3] is taken that allows that.
// sum_k w * q over a scale group of such integers stays below 2^31 and is computed without any
// rounding, so neither the order of the additions, nor the instruction set, nor the rows computed
// together, nor the choice of digits can change a bit of it. `low` is zero unless a value below
// 2^-3 (with a cut below 3, a smaller one) occurs, in units of its group's scale. A mask says
// where, and all else is skipped.
#pragma once

#include <cstdint>

#include "sluice/quant.h"

namespace sluice::cpu {

inline constexpr int kMidShift = 3;    ///< Weight of `mid`: 8.
inline constexpr int kHighShift = 11;  ///< Weight of `high`: 2048.

inline constexpr int kGroup = kActivationGroup;

/// In which order the digits of 128 channels lie, 16 lines of 8 k, as prepared_experts.h has them.
/// One dot product takes the weights and digits of one step.
enum class DigitLayout : std::uint8_t {
  /// main [line][mid of k 0 2 4 6, high of them, mid of k 1 3 5 7, high of them] int8, low [line][
  /// k 0 2 4 6, k 1 3 5 7] int8. A step is half a line.
  kBytes,
  /// main and low [line][k 0 4, 2 6, 1 5, 3 7] int16. A step is a quarter of a line.
  kWords,
  /// main and low in the order of kWords, both bf16; each 32 k of main at a place of their own.
  kTiles,
};
inline constexpr int kMainDigitBytes = 2 * kGroup;
inline constexpr int kLowDigitBytes = 2 * kGroup;  ///< Of which kBytes uses the first half.

/// What a GEMM needs to know about 128 channels of one row besides their digits.
struct DigitGroup {
  float scale = 0;  ///< Activation scale * 2^-9; NaN if the group holds a NaN.
  /// Of q over each 32 channels, but for kTiles: weights are stored with an offset.
  std::int32_t sum[4]{};
  /// kTiles: at least the sum of |main|, in units of 2^cut. Sums of main * w are exact in float32,
  /// in any order, while this times the largest |w| is not above 2^24; those of 32 k always are.
  std::int32_t magnitude = 0;
  std::uint64_t low = 0;  ///< Bit i: a low digit of step i is not zero.
};

/// Splits 128 codes, not for kTiles. main [kMainDigitBytes] is written in full, low
/// [kLowDigitBytes] if a digit of it is not zero.
DigitGroup split_digits(DigitLayout layout, const std::uint8_t* codes, float scale,
                        std::uint8_t* main, std::uint8_t* low);

/// The same for kTiles; the 64 bytes of each 32 k lie `main_stride` apart.
DigitGroup split_digits_for_tiles(const std::uint8_t* codes, float scale, std::uint8_t* main,
                                  std::int64_t main_stride, std::uint8_t* low);

}  // namespace sluice::cpu
