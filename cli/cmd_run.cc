#include "command.h"

namespace sluice::cli {

void add_run(CLI::App&, Output&) {}

}  // namespace sluice::cli
