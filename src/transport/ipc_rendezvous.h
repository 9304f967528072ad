// ipc_rendezvous.h - how the processes of one host find each other and prove that they belong.
//
//   rank r                                rank 0, listening at a name made from the job's
//     connect ---------------------------->
//     <---------------------- Hello: nonce
//     Join: rank, nonce, proof, lifeline ->   checks user, proof, version, rank
//     <----------- Accept: proof, the board
//     ... until all have joined or the timeout ...
//     <------------ Welcome: all lifelines     or Refusal: why
//
// A proof is an HMAC over both nonces, the rank and the number of ranks; the secret never travels.
// Whoever cannot give one is no rank: it is shut out, counted, and disturbs nobody.
//
// A *lifeline* is a pipe whose writing end only its rank holds: when the process ends, however it
// ends, every holder of the reading end sees it hang up.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "core/file_descriptor.h"
#include "sluice/transport.h"
#include "transport/shared_memory.h"

namespace sluice {

inline constexpr int kMaxIpcRanks = 64;

/// Why a rank is missing. Only one that is kLate may still come.
enum class Absence : std::uint32_t {
  kLate = 1,  ///< It did not come within the timeout.
  kLeft,      ///< It destroyed its transport.
  kEnded,     ///< Its process ended before that.
  kStopped,   ///< Its own call was interrupted.
};

/// Memory that all ranks map from the moment they join: who is where. Each element has one
/// writer, but `let_go`.
struct IpcBoard {
  static constexpr std::size_t kShares = 256;
  struct alignas(64) Member {
    std::atomic<std::uint32_t> joined{0}, left{0};
    std::atomic<std::uint64_t> arrived{0};  ///< Collectives begun.
    /// The ranks, a bit each, for which this rank gave up a collective or the meeting; 0 if it has
    /// not. Written before its sockets are closed: whoever sees them closed learns here whom to
    /// blame, instead of guessing from who has not come yet.
    std::atomic<std::uint64_t> blamed{0};
    std::atomic<Absence> blamed_for{};  ///< Written before `blamed`.
    /// Which peers, a bit each, have let go of this rank's device memory of share s, at
    /// s % kShares. The owner clears it when it frees that memory.
    std::atomic<std::uint64_t> let_go[kShares]{};
  };
  Member members[kMaxIpcRanks];
  /// When rank 0 last looked who wants to join, in nanoseconds of the steady clock, which all
  /// processes of a host share.
  std::atomic<std::int64_t> last_look_ns{0};
};
static_assert(kMaxIpcRanks <= 64);  // A rank is a bit of `blamed` and of `let_go`.
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

/// What a rank has after the meeting.
struct IpcMembership {
  SharedMemory memory;                    ///< Holds the board.
  std::vector<FileDescriptor> sockets;    ///< Rank 0: [num_ranks], own empty; others: one, to 0.
  std::vector<FileDescriptor> lifelines;  ///< [num_ranks] reading ends; own empty.
  FileDescriptor own_lifeline;            ///< Writing end.

  [[nodiscard]] IpcBoard& board() const noexcept {
    return *reinterpret_cast<IpcBoard*>(memory.data());
  }
};

/// Collective. Throws as make_ipc_transport() does.
[[nodiscard]] IpcMembership meet_processes(const IpcConfig& config,
                                           std::chrono::milliseconds timeout);

/// `ranks` as bits, and the other way round.
[[nodiscard]] std::uint64_t mask_of(const std::vector<int>& ranks);
[[nodiscard]] std::vector<int> ranks_of(std::uint64_t mask);

/// Ranks whose process has ended without leaving, in ascending order.
[[nodiscard]] std::vector<int> ranks_ended(const IpcMembership& membership);

/// The name that the ranks of a job meet at: the user's and the job's, and of no secret.
[[nodiscard]] std::string ipc_meeting_name(const std::string& job);

}  // namespace sluice
