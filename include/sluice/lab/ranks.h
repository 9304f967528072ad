// ranks.h - ranks of one process: a thread for each, and which of their failures is the cause.
#pragma once

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

}  // namespace sluice
