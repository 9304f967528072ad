// tensor_core_adder.h - how Hopper's FP8 tensor cores add, in plain arithmetic.
//
// As far as it can be seen from outside: 32 exact products and the running sum are aligned to the
// largest exponent among them, bits below 13 fraction bits are cut off, the rest is added exactly,
// and the new sum keeps 13 fraction bits. INT4 weights are widened to e4m3 numbers q * 2^-9, most
// of them subnormal; whether their products count with the exponent they have or with that of the
// format cannot be told from the manuals, so both can be had.
#pragma once

#include <algorithm>
#include <cmath>

namespace sluice::testing {

struct TensorCoreAdder {
  int fraction_bits = 13;
  bool normalizes = false;  ///< Subnormal weights count with their own exponent.

  /// sum a[k] * w[k] of one group on a fresh accumulator; `a` e4m3 numbers, `w` integers.
  [[nodiscard]] double sum(const double* a, const double* w, int size) const {
    constexpr int kNone = -1000;
    double sum = 0;
    for (int begin = 0; begin < size; begin += 32) {
      int largest = sum == 0 ? kNone : std::ilogb(sum);
      for (int k = begin; k < begin + 32; ++k) {
        if (a[k] == 0 || w[k] == 0) continue;
        const int of_w = normalizes ? std::ilogb(w[k]) : 3;
        largest = std::max(largest, std::max(std::ilogb(a[k]), -6) + of_w);
      }
      if (largest == kNone) continue;
      const int cut = largest - fraction_bits;
      double next = cut_below(sum, cut);
      for (int k = begin; k < begin + 32; ++k) next += cut_below(a[k] * w[k], cut);
      sum = next == 0 ? 0 : cut_below(next, std::ilogb(next) - fraction_bits);
    }
    return sum;
  }

 private:
  static double cut_below(double value, int exponent) {
    return std::ldexp(std::trunc(std::ldexp(value, -exponent)), exponent);
  }
};

}  // namespace sluice::testing
