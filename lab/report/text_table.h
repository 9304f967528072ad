// text_table.h - a table for people, as lines of text.
#pragma once

#include <concepts>
#include <string>
#include <string_view>
#include <vector>

namespace sluice::report {

/// "1 layer", "2 layers".
[[nodiscard]] std::string counted(std::integral auto number, std::string_view noun) {
  return std::to_string(number) + ' ' + std::string(noun) + (number == 1 ? "" : "s");
}

/// First column left-aligned, the others right-aligned, two spaces between.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  void add(std::vector<std::string> row);
  /// Lines with a rule under the header, each ending in a newline.
  [[nodiscard]] std::string to_string() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace sluice::report
