// ranks.h - ranks as threads of this process, or as processes of this host.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <vector>

namespace sluice {

/// Runs body(rank) for every rank in [0, num_ranks), each on a thread of its own. Waits for all and
/// returns what each threw, in order of the ranks; null where a rank threw nothing.
[[nodiscard]] std::vector<std::exception_ptr> try_on_every_rank(
    int num_ranks, const std::function<void(int)>& body);

/// Throws the first failure that is a cause. Ranks that wait for a failed one time out in turn, so
/// a kPeerTimeout is thrown only where no rank failed in another way. Returns if nothing failed.
void throw_cause(const std::vector<std::exception_ptr>& failures);

/// Both: runs body on every rank and throws the cause, if any rank failed.
void on_every_rank(int num_ranks, const std::function<void(int)>& body);

/// Starts this program `num_ranks` times with its own arguments and SLUICE_RANK, SLUICE_WORLD_SIZE,
/// SLUICE_JOB and SLUICE_SECRET, the last two fresh, and waits for all. Once one has failed the
/// others have `patience` to say so themselves; then they are killed, stopped ones too. They end
/// with this process, however it ends. Call before any thread is started. Returns the exit status
/// of rank 0, or of the first other one that failed; 4 for a killed one. `on_signal` is told of
/// each that a signal ended, other than those killed here. Throws: kIo with what the system said.
[[nodiscard]] int run_as_processes(int num_ranks, std::chrono::milliseconds patience,
                                   const std::function<void(int rank, int signal)>& on_signal = {});

}  // namespace sluice
