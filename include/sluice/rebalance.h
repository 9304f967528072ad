// rebalance.h - moving a layer's experts between ranks while a model is served.
//
//   forward(); forward();  rebalance(placement);  forward(); ...        on every rank alike
//
// Only experts whose slot changes travel: packed as the backend holds them, scales and all, from a
// slot that has them to the slot that wants them. They go in rounds. In each round a rank receives
// as many experts as the extra memory has room for, compares each one's checksum with that of the
// expert it should be, and only then writes it to its slot. Slots whose contents are still wanted
// elsewhere are written later; where experts change places in a ring, one of them is kept aside.
//
// Every rank makes the same plan from the two placements; nothing is negotiated. Outputs before and
// after are the same bits. Captured CUDA graphs stay valid: no memory moves. A layer with calls
// between dispatch_send() and finish() refuses (kInvalidArgument).
//
// A failure half-way leaves experts in the wrong places. So the layer refuses every later call, on
// every rank, with the first failure in the message; read the layer again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice {

struct RebalanceOptions {
  /// Experts that the extra memory of a rank holds, at least 2: one that is kept aside, the others
  /// on their way. More of them means fewer rounds.
  int max_experts_held = 2;
  /// Keep that memory for the next rebalance() of any layer of the group: on a device it takes
  /// longer to make, and to show to the other ranks, than to move an expert. So set it where
  /// experts move a few at a time. The next rebalance() without it gives the memory back.
  bool keep_memory = false;
};

/// What one rebalance() did. Bytes and experts are of this rank; rounds are the same on every rank.
struct RebalanceStats {
  int num_received = 0, num_sent = 0;  ///< Experts that came from, went to other ranks.
  int num_copied = 0;                  ///< Between slots of this rank, set-aside ones included.
  int num_rounds = 0;
  std::uint64_t received_bytes = 0, sent_bytes = 0;
  std::size_t extra_bytes = 0;  ///< Memory held meanwhile, what was kept included.
  double seconds = 0;
};

/// What all rebalance() of a layer did on this rank since the layer was made. Counters only grow;
/// subtract two readings. A rebalance() that failed does not count, nor does one to the placement
/// that there is.
struct RebalanceCounters {
  std::uint64_t num_rebalances = 0;
  std::uint64_t num_received = 0, num_sent = 0, num_copied = 0, num_rounds = 0;
  std::uint64_t received_bytes = 0, sent_bytes = 0;
  double seconds = 0;
};

}  // namespace sluice
