#include "report/svg_plot.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ranges>

namespace sluice::report {
namespace {

constexpr double kLeft = 54, kRight = 18, kTop = 12, kBottom = 34;
constexpr double kSteps[] = {1, 2, 3, 5, 7};  // Of a decade, where grid lines may be.

/// Maps per cent to pixels, from the grid line below the data to the one above.
class LogAxis {
 public:
  LogAxis(const std::vector<PlotSeries>& series, PlotSize size) : size_(size) {
    double low = INFINITY, high = 0;
    for (const PlotSeries& s : series) {
      for (const auto& v : s.values) {
        if (!v || !(*v > 0) || !std::isfinite(*v)) continue;
        low = std::min(low, *v * 100);
        high = std::max(high, *v * 100);
      }
    }
    if (!(high > 0)) low = 0.1, high = 10;
    low_ = -INFINITY, high_ = INFINITY;
    for (int decade = static_cast<int>(std::floor(std::log10(low))) - 1;
         decade <= std::ceil(std::log10(high)); ++decade) {
      for (const double step : kSteps) {
        const double line = step * std::pow(10.0, decade);
        if (line < low * 0.95) low_ = std::log10(line);
        if (line > high * 1.05) high_ = std::min(high_, std::log10(line));
      }
    }
  }

  [[nodiscard]] double bottom() const { return size_.height - kBottom; }
  [[nodiscard]] double y(double ratio) const {
    const double level = std::log10(std::max(ratio * 100, 1e-9));
    const double share = std::clamp((level - low_) / (high_ - low_), 0.0, 1.0);
    return bottom() - share * (bottom() - kTop);
  }
  /// Grid lines at 1, 2, 3, 5, 7 of each decade, labelled, where there is room.
  [[nodiscard]] std::string grid() const {
    std::string svg;
    double last = 1e9;
    for (int decade = static_cast<int>(std::floor(low_)); decade <= high_; ++decade) {
      for (const double step : kSteps) {
        const double percent = step * std::pow(10.0, decade);
        const double level = std::log10(percent);
        if (level < low_ - 1e-9 || level > high_ + 1e-9) continue;
        const double at = y(percent / 100);
        if (last - at < 18) continue;
        last = at;
        svg += fmt::format(
            "<line class='grid' x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}'/>"
            "<text class='tick' x='{:.1f}' y='{:.1f}' text-anchor='end'>{:g} %</text>",
            kLeft, at, size_.width - kRight, at, kLeft - 6, at + 4, percent);
      }
    }
    return svg;
  }

 private:
  PlotSize size_;
  double low_ = 0, high_ = 0;
};

std::string open_svg(PlotSize size) {
  return fmt::format("<svg viewBox='0 0 {} {}' role='img'>", size.width, size.height);
}

double plot_width(PlotSize size) {
  return size.width - kLeft - kRight;
}

}  // namespace

std::string escape_html(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string bar_plot(const std::vector<std::string>& labels, const std::vector<PlotSeries>& series,
                     PlotSize size) {
  const LogAxis axis(series, size);
  std::string svg = open_svg(size) + axis.grid();
  const double group =
      plot_width(size) / static_cast<double>(std::max<std::size_t>(1, labels.size()));
  const double inner = std::min(group * 0.84, 26.0 * static_cast<double>(series.size()));
  const double bar = inner / static_cast<double>(std::max<std::size_t>(1, series.size()));
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const double begin = kLeft + group * static_cast<double>(i) + (group - inner) / 2;
    for (std::size_t s = 0; s < series.size(); ++s) {
      const auto value = series[s].values.at(i);
      if (!value) continue;
      const double top = axis.y(*value);
      svg += fmt::format(
          "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' rx='1.5' fill='{}'>"
          "<title>{}, {}: {:.3g} %</title></rect>",
          begin + bar * static_cast<double>(s) + 0.5, top, bar - 1,
          std::max(0.5, axis.bottom() - top), series[s].color, escape_html(series[s].name),
          escape_html(labels[i]), *value * 100);
    }
    svg += fmt::format("<text class='label' x='{:.1f}' y='{:.1f}' text-anchor='middle'>{}</text>",
                       begin + inner / 2, axis.bottom() + 20, escape_html(labels[i]));
  }
  return svg + "</svg>";
}

std::string line_plot(const std::string& x_label, const std::vector<PlotSeries>& series,
                      PlotSize size) {
  const LogAxis axis(series, size);
  std::string svg = open_svg(size) + axis.grid();
  for (const PlotSeries& s : std::views::reverse(series)) {  // The first lies on top.
    std::string points;
    const double last = static_cast<double>(std::max<std::size_t>(2, s.values.size()) - 1);
    for (std::size_t i = 0; i < s.values.size(); ++i) {
      if (!s.values[i]) continue;
      points +=
          fmt::format("{:.1f},{:.1f} ", kLeft + plot_width(size) * static_cast<double>(i) / last,
                      axis.y(*s.values[i]));
    }
    svg += fmt::format("<polyline points='{}' stroke='{}'><title>{}</title></polyline>", points,
                       s.color, escape_html(s.name));
  }
  svg += fmt::format("<text class='label' x='{:.1f}' y='{:.1f}' text-anchor='middle'>{}</text>",
                     kLeft + plot_width(size) / 2, axis.bottom() + 20, escape_html(x_label));
  return svg + "</svg>";
}

std::string headroom_plot(const std::vector<PlotSeries>& series, PlotSize size) {
  constexpr int kLow = -4, kHigh = 8;
  constexpr int kBins = kHigh - kLow;
  std::vector<std::vector<int>> counts(series.size(), std::vector<int>(kBins));
  int highest = 1;
  for (std::size_t s = 0; s < series.size(); ++s) {
    for (const auto& v : series[s].values) {
      if (!v || !(*v > 0)) continue;
      const int bin =
          std::clamp(static_cast<int>(std::floor(std::log2(*v))), kLow, kHigh - 1) - kLow;
      highest = std::max(highest, ++counts[s][static_cast<std::size_t>(bin)]);
    }
  }
  const double bottom = size.height - kBottom, height = bottom - kTop;
  const double group = plot_width(size) / kBins;
  std::string svg = open_svg(size);
  svg += fmt::format("<rect class='danger' x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}'/>",
                     kLeft, kTop, group * -kLow, height);
  for (const int count : {0, highest}) {
    svg += fmt::format("<text class='tick' x='{:.1f}' y='{:.1f}' text-anchor='end'>{}</text>",
                       kLeft - 6, bottom - height * count / highest + (count == 0 ? 0 : 4), count);
  }
  const double bar = group * 0.8 / static_cast<double>(std::max<std::size_t>(1, series.size()));
  for (int b = 0; b <= kBins; ++b) {
    const double x = kLeft + group * b;
    svg += fmt::format("<text class='tick' x='{:.1f}' y='{:.1f}' text-anchor='middle'>{}{}x</text>",
                       x, bottom + 16, b + kLow < 0 ? "1/" : "", 1 << std::abs(b + kLow));
    for (std::size_t s = 0; b < kBins && s < series.size(); ++s) {
      const int count = counts[s][static_cast<std::size_t>(b)];
      if (count == 0) continue;
      const double tall = height * count / highest;
      svg += fmt::format(
          "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' rx='1.5' fill='{}'>"
          "<title>{}: {} experts</title></rect>",
          x + group * 0.1 + bar * static_cast<double>(s), bottom - tall, bar - 1, tall,
          series[s].color, escape_html(series[s].name), count);
    }
  }
  svg += fmt::format("<line class='axis' x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}'/>", kLeft,
                     bottom, size.width - kRight, bottom);
  return svg + "</svg>";
}

}  // namespace sluice::report
