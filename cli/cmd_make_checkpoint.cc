#include "command.h"

namespace sluice::cli {

void add_make_checkpoint(CLI::App&, Output&) {}

}  // namespace sluice::cli
