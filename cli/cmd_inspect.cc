#include "command.h"

namespace sluice::cli {

void add_inspect(CLI::App&, Output&) {}

}  // namespace sluice::cli
