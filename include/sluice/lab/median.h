// median.h - the middle of a few times, which one disturbed run does not move.
#pragma once

#include <algorithm>
#include <vector>

namespace sluice {

/// The upper of the two middle values of an even number; 0 of none.
[[nodiscard]] inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

}  // namespace sluice
