// How far a row is from the reference, against the bound of each element.
#include <cmath>
#include <limits>

#include "sluice/lab/reference.h"
#include "sluice/quant.h"

namespace sluice {

void compare_row(const ReferenceRow& reference, const std::uint16_t* y, std::int64_t token,
                 VerifyReport& report) {
  // Relative L2 is kept as a running pair of sums of squares.
  double error2 = report.relative_l2 * report.relative_l2 * report.sum_squares;
  for (std::size_t i = 0; i < reference.y.size(); ++i) {
    const double actual = bf16_to_float(y[i]);
    const double expected = reference.y[i];
    const double error = std::fabs(actual - expected);
    // Written so that a NaN on one side only is wrong.
    const bool both_nan = std::isnan(actual) && std::isnan(expected);
    const double ratio = both_nan ? 0 : error / reference.bound[i];
    const bool right = both_nan || error <= reference.bound[i];
    report.num_wrong += right ? 0 : 1;
    if (!(ratio <= report.worst_ratio) || report.worst_element < 0) {
      report.worst_ratio = std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
      report.worst_token = token;
      report.worst_element = static_cast<std::int64_t>(i);
      report.worst_expected = expected;
      report.worst_actual = actual;
      report.worst_bound = reference.bound[i];
    }
    error2 += error * error;
    report.sum_squares += expected * expected;
  }
  report.relative_l2 = report.sum_squares > 0 ? std::sqrt(error2 / report.sum_squares) : 0;
  report.num_rows += 1;
  report.num_elements += static_cast<std::int64_t>(reference.y.size());
}

}  // namespace sluice
