#include "report/text_table.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>

namespace sluice::report {

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

}  // namespace sluice::report
