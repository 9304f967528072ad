#include "command.h"

namespace sluice::cli {

void add_bench(CLI::App&, Output&) {}

}  // namespace sluice::cli
