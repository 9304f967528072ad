// spawn.h - one process per rank on this host: this program again, with a place in a job.
#pragma once

#include <chrono>

namespace sluice::cli {

/// Starts this program `num_ranks` times with its own arguments and SLUICE_RANK, SLUICE_WORLD_SIZE,
/// SLUICE_JOB and SLUICE_SECRET, the last two fresh, and waits for all. Once one has failed the
/// others have `patience` to say so themselves; then they are killed, stopped ones too. They end
/// with this process, however it ends. Call before any thread is started. Returns the exit status
/// of rank 0, or of the first other one that failed; 4 for a killed one. Throws: kIo with what the
/// system said.
[[nodiscard]] int run_as_processes(int num_ranks, std::chrono::milliseconds patience);

}  // namespace sluice::cli
