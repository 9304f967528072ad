// sluice - runs, measures and inspects expert-parallel W4A8 layers.
#include <fmt/core.h>

#include <cstdlib>
#include <new>
#include <string>

#include "command.h"
#include "lost_page.h"
#include "report.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/lab/files.h"

namespace sluice::cli {
namespace {

void write_json(const Output& output) {
  if (output.json_path.empty()) return;
  // Names of files may be any bytes; JSON is UTF-8.
  constexpr auto kReplace = nlohmann::ordered_json::error_handler_t::replace;
  const std::string text = output.json.dump(2, ' ', /*ensure_ascii=*/false, kReplace);
  write_file(output.json_path, text + "\n");
}

/// The exit status of what `body` gives or throws, which is printed unless `output` is silent.
template <class Body>
int status_of(const Output& output, const Body& body) {
  const auto report = [&](const Error& error) {
    if (!output.is_silent) print_error(error);
    return exit_status(error.code());
  };
  try {
    return body();
  } catch (const Error& error) {
    return report(error);
  } catch (const std::bad_alloc&) {
    return report({ErrorCode::kOutOfMemory, "these sizes ask for more memory than there is"});
  } catch (const std::exception& error) {
    return report(error_of(error));
  }
}

}  // namespace
}  // namespace sluice::cli

int main(int argc, char** argv) {
  sluice::cli::hold_standard_files();
  sluice::cli::explain_lost_pages();
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

  const int status = sluice::cli::status_of(output, [&] {
    if (const auto parsed = parser.parse(argc, argv)) return *parsed;
    sluice::cli::write_json(output);
    return output.exit_status;
  });
  // A report that is lost is no success. One that failed for it has said so.
  if (status == exit_status(sluice::ErrorCode::kIo)) return status;
  const int printed = sluice::cli::status_of(output, [] { return sluice::cli::flush_output(), 0; });
  return status != 0 ? status : printed;
}
