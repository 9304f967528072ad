// sluice - runs, measures and inspects expert-parallel W4A8 layers.
#include <fmt/core.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>

#include "command.h"
#include "report.h"
#include "sluice/config.h"
#include "sluice/error.h"

int main(int argc, char** argv) {
  // Ranks that share a GPU wait for each other inside kernels: each needs a hardware queue, and no
  // launch may stop to load a kernel. The CUDA runtime reads these before its first call.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", /*overwrite=*/0);
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  sluice::cli::Parser parser(
      "Mixture-of-experts layers with INT4 weights and FP8 activations, expert-parallel.",
      sluice::version());
  sluice::cli::Command program = parser.program();
  program.require_subcommand();

  sluice::cli::Output output;
  program.add_option("--json", output.json_path, "Write everything printed to FILE as JSON")
      .type_name("FILE")
      .writable_file();
  sluice::cli::add_make_checkpoint(program, output);
  sluice::cli::add_inspect(program, output);
  sluice::cli::add_convert(program, output);
  sluice::cli::add_run(program, output);
  sluice::cli::add_bench(program, output);
  sluice::cli::add_accuracy(program, output);
  sluice::cli::add_plan(program, output);
  sluice::cli::add_balance(program, output);

  try {
    if (const auto status = parser.parse(argc, argv)) return *status;
    if (!output.json_path.empty()) {
      std::ofstream file(output.json_path);
      file << output.json.dump(2) << '\n';
      if (!file.flush()) {
        throw sluice::Error(sluice::ErrorCode::kIo, "cannot write --json " + output.json_path);
      }
    }
    return output.exit_status;
  } catch (const sluice::Error& error) {
    if (!output.is_silent) sluice::cli::print_error(error);
    return exit_status(error.code());
  } catch (const std::bad_alloc&) {
    if (!output.is_silent) {
      sluice::cli::print_error(sluice::Error(sluice::ErrorCode::kOutOfMemory,
                                             "these sizes ask for more memory than there is"));
    }
    return exit_status(sluice::ErrorCode::kOutOfMemory);
  } catch (const std::exception& error) {
    std::fflush(stdout);  // As print_error().
    fmt::print(stderr, "sluice: {}\n", error.what());
    return exit_status(sluice::ErrorCode::kInternal);
  }
}
