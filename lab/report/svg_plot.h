// svg_plot.h - three kinds of plots as inline SVG: grouped bars, lines, a histogram.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace sluice::report {

struct PlotSeries {
  std::string name;
  std::string color;  ///< "#rrggbb"
  std::vector<std::optional<double>> values;
};

struct PlotSize {
  int width = 980, height = 300;
};

/// Bars on a logarithmic axis of per cent: one group per label, one bar per series in each.
[[nodiscard]] std::string bar_plot(const std::vector<std::string>& labels,
                                   const std::vector<PlotSeries>& series, PlotSize size);
/// Lines over 0 .. n - 1 on a logarithmic axis of per cent.
[[nodiscard]] std::string line_plot(const std::string& x_label,
                                    const std::vector<PlotSeries>& series, PlotSize size);
/// How many of each series' values fall into each power of two from 2^-4 to 2^8; left of 1 is red.
[[nodiscard]] std::string headroom_plot(const std::vector<PlotSeries>& series, PlotSize size);

/// Text that may stand between tags.
[[nodiscard]] std::string escape_html(const std::string& text);

}  // namespace sluice::report
