#include "report.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace sluice::cli {

void print_error(const Error& error) {
  fmt::print(stderr, "sluice: {}: {}\n", to_string(error.code()), error.what());
}

Table::Table(std::vector<std::string> header) {
  rows_.push_back(std::move(header));
}

void Table::add(std::vector<std::string> row) {
  rows_.push_back(std::move(row));
}

std::string Table::to_string() const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i == 0) {
        text += row.size() == 1 ? row[i] : fmt::format("{:<{}}", row[i], widths[i]);
      } else {
        text += fmt::format("  {:>{}}", row[i], widths[i]);
      }
    }
    text += '\n';
    if (&row == &rows_.front()) {
      for (std::size_t i = 0; i < widths.size(); ++i) {
        text += (i ? "  " : "") + std::string(widths[i], '-');
      }
      text += '\n';
    }
  }
  return text;
}

ProgressLine::ProgressLine(std::string label)
    : label_(std::move(label)), is_terminal_(isatty(STDERR_FILENO) != 0) {}

ProgressLine::~ProgressLine() {
  if (is_terminal_ && last_percent_ >= 0) std::fputs("\r\033[K", stderr);
}

void ProgressLine::update(double fraction) {
  const int percent = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * 100);
  if (!is_terminal_ || percent == last_percent_) return;
  last_percent_ = percent;
  fmt::print(stderr, "\r\033[K{} {}%", label_, percent);
  std::fflush(stderr);
}

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  while (bytes >= 1000 && unit < 4) bytes /= 1000, ++unit;
  if (unit == 0) return fmt::format("{:.0f} B", bytes);
  return fmt::format("{:.2f} {}", bytes, units[unit]);
}

}  // namespace sluice::cli
