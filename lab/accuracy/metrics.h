// metrics.h - how far one [num_tokens, width] result is from another.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sluice/lab/accuracy.h"

namespace sluice::accuracy {

/// Sums of squares along both axes of `actual - reference` and of `reference`.
class ErrorSums {
 public:
  ErrorSums(std::span<const double> reference, std::span<const double> actual, std::int64_t width);

  /// ||actual - reference|| / ||reference||; 0 if they are equal, infinite if only the reference
  /// vanishes.
  [[nodiscard]] double relative_l2() const;
  [[nodiscard]] double error_norm() const;
  [[nodiscard]] double reference_norm() const;
  [[nodiscard]] std::vector<double> token_errors() const;    ///< The same of each token.
  [[nodiscard]] std::vector<double> channel_errors() const;  ///< The same of each channel.
  [[nodiscard]] ErrorNumbers numbers() const;

 private:
  struct Pair {
    double error = 0, reference = 0;
    [[nodiscard]] double ratio() const;
  };
  std::vector<Pair> tokens_, channels_;
  Pair all_;
};

/// The smallest value that at least `share` of `values` do not exceed; 0 for none.
[[nodiscard]] double percentile(std::vector<double> values, double share);

}  // namespace sluice::accuracy
