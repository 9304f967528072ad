// command.h - the sub-commands of `sluice`, and what each one reports.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "options.h"

namespace sluice::cli {

/// Everything a command reports: printed as it goes, and written to --json FILE at the end.
struct Output {
  std::string json_path;  ///< --json FILE; empty = none.
  nlohmann::ordered_json json;
  int exit_status = 0;     ///< Set to non-zero by a command whose verification failed.
  bool is_silent = false;  ///< The error has been printed, if need be by another process.
};

/// Each adds one sub-command to `program`; its callback does the work and fills `output`.
void add_make_checkpoint(Command& program, Output& output);
void add_inspect(Command& program, Output& output);
void add_convert(Command& program, Output& output);
void add_run(Command& program, Output& output);
void add_bench(Command& program, Output& output);
void add_bench_exchange(Command& bench, Output& output);  ///< Under `bench`.
void add_bench_layer(Command& bench, Output& output);     ///< Under `bench`.
void add_bench_model(Command& bench, Output& output);     ///< Under `bench`.
void add_bench_load(Command& bench, Output& output);      ///< Under `bench`.
void add_accuracy(Command& program, Output& output);
void add_plan(Command& program, Output& output);
void add_balance(Command& program, Output& output);

}  // namespace sluice::cli
