// report.h - what the sub-commands print for people: errors, tables, progress, sizes.
#pragma once

#include <chrono>
#include <exception>
#include <string>

#include "report/text_table.h"
#include "sluice/error.h"

namespace sluice::cli {

using report::counted;
using report::Table;

/// "sluice: peer timeout: ..." on standard error.
void print_error(const Error& error);

/// What to say of something that is no Error: kIo if it came of printing.
[[nodiscard]] Error error_of(const std::exception& error);

/// Holds the place of standard files that are closed, so that no file which a command opens gets
/// what is printed; printing there goes on failing. Before anything is opened.
void hold_standard_files();

/// Throws: kIo if anything that was printed on standard output is lost.
void flush_output();

/// A line on standard error that is rewritten in place, once a second at most; silent unless
/// standard error is a terminal.
class ProgressLine {
 public:
  explicit ProgressLine(std::string label);
  ~ProgressLine();
  void update(double fraction);  ///< 0 .. 1

 private:
  std::string label_;
  bool is_terminal_;
  int last_percent_ = -1;
  std::chrono::steady_clock::time_point next_update_ = {};  ///< In the past at first.
};

/// Throws: kOutOfMemory with `what`, which names the options, if `bytes` are more than the memory
/// of this machine.
void require_memory(double bytes, const std::string& what);

/// 748.2 MB, 1.5 GB: decimal units, as link and memory rates are quoted.
[[nodiscard]] std::string human_bytes(double bytes);

}  // namespace sluice::cli
