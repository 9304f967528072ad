// command.h - what the sub-commands of `sluice` share: registration, tables, JSON, progress.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "sluice/error.h"

namespace sluice::cli {

/// Everything a command reports: printed as it goes, and written to --json FILE at the end.
struct Output {
  std::string json_path;  ///< --json FILE; empty = none.
  nlohmann::ordered_json json;
  int exit_status = 0;     ///< Set to non-zero by a command whose verification failed.
  bool is_silent = false;  ///< The error has been printed, if need be by another process.
};

/// "sluice: peer timeout: ..." on standard error.
void print_error(const Error& error);

/// Each adds one sub-command to `app`; its callback does the work and fills `output`.
void add_make_checkpoint(CLI::App& app, Output& output);
void add_inspect(CLI::App& app, Output& output);
void add_convert(CLI::App& app, Output& output);
void add_run(CLI::App& app, Output& output);
void add_bench(CLI::App& app, Output& output);
void add_bench_exchange(CLI::App& bench, Output& output);  ///< Under `bench`.
void add_accuracy(CLI::App& app, Output& output);
void add_plan(CLI::App& app, Output& output);

/// A table for people: first column left-aligned, the others right-aligned, two spaces between.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  void add(std::vector<std::string> row);
  /// Lines with a rule under the header, each ending in a newline.
  [[nodiscard]] std::string to_string() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// A line on standard error that is rewritten in place; silent unless standard error is a terminal.
class ProgressLine {
 public:
  explicit ProgressLine(std::string label);
  ~ProgressLine();
  void update(double fraction);  ///< 0 .. 1

 private:
  std::string label_;
  bool is_terminal_;
  int last_percent_ = -1;
};

/// 748.2 MB, 1.5 GB: decimal units, as link and memory rates are quoted.
[[nodiscard]] std::string human_bytes(double bytes);

}  // namespace sluice::cli
