// Least squares: what a transport takes, as a fixed time and a rate.
#include <algorithm>
#include <cmath>

#include "core/fail.h"
#include "sluice/lab/network_model.h"

namespace sluice {

LineFit fit_line(std::span<const SizeTime> points) {
  // With weights w = 1 / us^2: minimize sum of w (a + b x - us)^2.
  double w_sum = 0, wx = 0, wxx = 0, wy = 0, wxy = 0;
  double least = HUGE_VAL, most = 0;
  for (const SizeTime& p : points) {
    check_argument(p.bytes > 0 && p.us > 0 && std::isfinite(p.bytes) && std::isfinite(p.us),
                   "{} bytes in {} us; both have to be positive", p.bytes, p.us);
    const double w = 1 / (p.us * p.us);
    w_sum += w, wx += w * p.bytes, wxx += w * p.bytes * p.bytes;
    wy += w * p.us, wxy += w * p.bytes * p.us;
    least = std::min(least, p.bytes), most = std::max(most, p.bytes);
  }
  check_argument(most > least, "a line needs two sizes; there {} of {} bytes",
                 points.size() == 1 ? "is one" : "are only some", most);
  double slope = (w_sum * wxy - wx * wy) / (w_sum * wxx - wx * wx);
  double fixed = (wy - slope * wx) / w_sum;
  if (fixed < 0) fixed = 0, slope = wxy / wxx;
  check_argument(slope > 0,
                 "the times do not grow with the bytes: {} us for {}, so there is no rate", fixed,
                 most);
  LineFit fit{.fixed_us = fixed, .gbytes_per_s = 1e-3 / slope};
  for (const SizeTime& p : points) {
    const double error = (fixed + slope * p.bytes) / p.us - 1;
    fit.rms_error += error * error / static_cast<double>(points.size());
    if (std::fabs(error) > std::fabs(fit.worst_error)) fit.worst_error = error;
  }
  fit.rms_error = std::sqrt(fit.rms_error);
  return fit;
}

}  // namespace sluice
