// sluice - runs, measures and inspects expert-parallel W4A8 layers.
#include <fmt/core.h>

#include <cstdlib>
#include <fstream>

#include "command.h"
#include "sluice/config.h"
#include "sluice/error.h"

int main(int argc, char** argv) {
  // Ranks that share a GPU wait for each other inside kernels: each needs a hardware queue, and no
  // launch may stop to load a kernel. The CUDA runtime reads these before its first call.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", /*overwrite=*/0);
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/0);
  CLI::App app{"Mixture-of-experts layers with INT4 weights and FP8 activations, expert-parallel."};
  app.set_version_flag("--version", sluice::version());
  app.require_subcommand(1);

  sluice::cli::Output output;
  app.add_option("--json", output.json_path, "Write everything printed to FILE as JSON")
      ->type_name("FILE");
  app.fallthrough();
  sluice::cli::add_make_checkpoint(app, output);
  sluice::cli::add_inspect(app, output);
  sluice::cli::add_convert(app, output);
  sluice::cli::add_run(app, output);
  sluice::cli::add_bench(app, output);
  sluice::cli::add_accuracy(app, output);
  sluice::cli::add_plan(app, output);

  try {
    app.parse(argc, argv);
    if (!output.json_path.empty()) {
      std::ofstream file(output.json_path);
      file << output.json.dump(2) << '\n';
      if (!file.flush()) {
        throw sluice::Error(sluice::ErrorCode::kIo, "cannot write --json " + output.json_path);
      }
    }
    return output.exit_status;
  } catch (const CLI::ParseError& error) {
    const int status = app.exit(error);
    return status == 0 ? 0 : 2;
  } catch (const sluice::Error& error) {
    if (!output.is_silent) sluice::cli::print_error(error);
    return exit_status(error.code());
  } catch (const std::exception& error) {
    fmt::print(stderr, "sluice: {}\n", error.what());
    return exit_status(sluice::ErrorCode::kInternal);
  }
}
