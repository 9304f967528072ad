// digits.h - e4m3 activations as signed integer digits, so that a group's dot product is exact.
//
// An e4m3 value times 2^9 is an integer q, |q| <= 448 * 512 < 2^18. It is written in three digits
//
//   q = low + 8 * mid + 2048 * high      low in [-4, 3], mid in [-128, 127], high in [-112, 112]
//
// each of which meets a weight in a byte dot product: int4 + 8, or 2 * e2m1 + 12. sum_k w * q over
// a scale group of such integers stays below 2^31 and is computed without any rounding, so neither
// the order of the additions, nor the instruction set, nor the rows computed together can change a
// bit of it. `low` is zero unless a value below 2^-3 occurs in the group (in units of its scale),
// and is then skipped.
#pragma once

#include <cstdint>

#include "sluice/quant.h"

namespace sluice::cpu {

inline constexpr int kMidShift = 3;    ///< Weight of `mid`: 8.
inline constexpr int kHighShift = 11;  ///< Weight of `high`: 2048.

inline constexpr int kGroup = kActivationGroup;
/// [line][mid of even k (4 bytes), high of even k, mid of odd k, high of odd k], 16 lines of 8 k.
inline constexpr int kMainDigitBytes = 2 * kGroup;
/// [line][low of even k, low of odd k]
inline constexpr int kLowDigitBytes = kGroup;

/// What a GEMM needs to know about 128 channels of one row besides their digits.
struct DigitGroup {
  float scale = 0;           ///< Activation scale * 2^-9; NaN if the group holds a NaN.
  std::int32_t has_low = 0;  ///< Any low digit not zero.
  std::int32_t sum[4]{};     ///< Of q over each 32 channels: weights are stored with an offset.
};

/// Splits 128 codes. main: kMainDigitBytes, low: kLowDigitBytes, both written in full.
DigitGroup split_digits(const std::uint8_t* codes, float scale, std::uint8_t* main,
                        std::uint8_t* low);

}  // namespace sluice::cpu
