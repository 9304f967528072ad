// digits.h - e4m3 activations as signed integer digits, so that a group's dot product is exact.
//
// An e4m3 value times 2^9 is an integer q, |q| <= 448 * 512 < 2^18. It is written in three digits
//
//   q = low + 8 * mid + 2048 * high      low in [-4, 3], mid in [-128, 127], high in [-112, 112]
//
// each of which meets a weight in a byte dot product: int4 + 8, or 2 * e2m1 + 12. Or mid and high
// are one digit of 16 bits, word = mid + 256 * high in [-28672, 28672], in a dot product of int16.
// sum_k w * q over a scale group of such integers stays below 2^31 and is computed without any
// rounding, so neither the order of the additions, nor the instruction set, nor the rows computed
// together, nor the choice of digits can change a bit of it. `low` is zero unless a value below
// 2^-3 occurs (in units of its group's scale). A mask says where, and all else is skipped.
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
  /// main [half of 8 lines][mid 64, high 64] int8, each [line][k 0 2 4 6, k 1 3 5 7]; low as kBytes
  /// has it, but always written. A step is half a line.
  kTiles,
};
inline constexpr int kMainDigitBytes = 2 * kGroup;
inline constexpr int kLowDigitBytes = 2 * kGroup;  ///< Of which all but kWords use the first half.

/// What a GEMM needs to know about 128 channels of one row besides their digits.
struct DigitGroup {
  float scale = 0;        ///< Activation scale * 2^-9; NaN if the group holds a NaN.
  std::int32_t sum[4]{};  ///< Of q over each 32 channels: weights are stored with an offset.
  std::uint64_t low = 0;  ///< Bit i: a low digit of step i is not zero.
};

/// Splits 128 codes. main [kMainDigitBytes] is written in full; low [kLowDigitBytes] if a digit of
/// it is not zero, and by kTiles always, because other rows of a tile may have one.
DigitGroup split_digits(DigitLayout layout, const std::uint8_t* codes, float scale,
                        std::uint8_t* main, std::uint8_t* low);

}  // namespace sluice::cpu
