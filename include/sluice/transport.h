// transport.h - moves bytes between the ranks of one expert-parallel group.
//
// One-sided: every rank owns a *window* of the same size; peers put bytes into it and then raise
// one of its flags. A flag carries an epoch, never a mere "ready", so a flag of an earlier
// operation cannot be mistaken for this one's.
//
//   rank 0                       rank 1
//     put(1, offset, bytes) ---->  window bytes
//     signal(1, flag, epoch) --->  window flag      wait_flags() ... reads the bytes
//
// Threads: a Transport belongs to one rank and is used by one thread at a time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/hosts.h"

namespace sluice {

/// Monotonic counters; the consumer subtracts. Indexed by peer rank; own rank included.
struct TransportCounters {
  std::vector<std::uint64_t> bytes_put;
  std::vector<std::uint64_t> puts;
};

/// Symmetric memory: each rank's window is written by its peers and read by itself.
class Window {
 public:
  virtual ~Window() = default;

  /// This rank's bytes, 128-byte aligned, zero at creation. [bytes]
  [[nodiscard]] virtual std::byte* local() noexcept = 0;
  [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
  [[nodiscard]] virtual int num_flags() const noexcept = 0;

  /// Copies `data` to [offset, offset + data.size()) of `peer`'s window. `data` may be reused at
  /// return. Waits only for a peer that is far behind, and no longer than make_window()'s timeout.
  /// Throws: kInvalidArgument past the end of the window, kTransport, kPeerTimeout naming the peer.
  virtual void put(int peer, std::size_t offset, std::span<const std::byte> data) = 0;

  /// Sets flag `flag` of `peer` to `epoch` if that is more than it was; seen only after every
  /// earlier put of this rank to `peer`.
  virtual void signal(int peer, int flag, std::uint64_t epoch) = 0;

  /// Value of an own flag. Acquire: bytes put before the signal are visible after this reads it.
  [[nodiscard]] virtual std::uint64_t flag(int flag) const = 0;

  /// Waits until flag() >= `epoch` for every entry of `flags`, or until `deadline`.
  /// Returns the entries still below; empty means all arrived. Sleeps rather than spins.
  /// Throws: kTransport if the transport itself failed, naming the rank it failed with.
  [[nodiscard]] virtual std::vector<int> wait_flags(
      std::span<const int> flags, std::uint64_t epoch,
      std::chrono::steady_clock::time_point deadline) = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  [[nodiscard]] virtual int rank() const noexcept = 0;
  [[nodiscard]] virtual int num_ranks() const noexcept = 0;
  [[nodiscard]] virtual std::string name() const = 0;  ///< "inproc", "mpi", ...

  /// Collective: same arguments on every rank (checked). Destroying the window is not collective:
  /// each rank destroys its own when it likes, and waits for nobody.
  /// Throws: kTransport if the ranks disagree, kPeerTimeout, kOutOfMemory.
  [[nodiscard]] virtual std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                            std::chrono::milliseconds timeout) = 0;

  /// Collective, for set-up and reports: gathers `mine` from every rank, ordered by rank. Every
  /// rank gives the same number of bytes. Throws: kTransport, kPeerTimeout naming the missing
  /// ranks.
  [[nodiscard]] virtual std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) = 0;

  /// Collective: gives `mine`, a device allocation of `bytes` bytes, to the other ranks and returns
  /// every rank's, ordered by rank, at addresses that this rank's device can use. The memory lives
  /// until the last rank has dropped its pointer to it.
  /// Throws: kUnsupported if this transport cannot reach device memory; kTransport, kPeerTimeout.
  [[nodiscard]] virtual std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes, std::chrono::milliseconds timeout);

  [[nodiscard]] virtual TransportCounters counters() const = 0;

  /// Which rank is on which host, where the transport finds that out (nccl); else one host.
  [[nodiscard]] virtual Hosts hosts() const { return {}; }
};

/// Ranks as threads of this process. Element r belongs to rank r, whose thread alone uses it.
/// A window may outlive the transport that made it.
[[nodiscard]] std::vector<std::unique_ptr<Transport>> make_inproc_transports(int num_ranks);

/// Ranks as the first `num_ranks` processes of an MPI job, 0 = all of them; null on the others. The
/// first call starts MPI if the program has not (which itself waits without bound for processes
/// that never call it). One thread of the process looks after messages while the rank computes.
/// Ranks: collective over all processes of the job, which make the same transports in the same
///   order.
/// Throws: kPeerTimeout naming the processes that did not come; kTransport naming one of another
///   version; kInvalidArgument if the job has fewer processes; kUnsupported in a build without MPI,
///   or if the program started MPI with less than MPI_THREAD_SERIALIZED.
[[nodiscard]] std::unique_ptr<Transport> make_mpi_transport(std::chrono::milliseconds timeout,
                                                            int num_ranks = 0);

/// The last call of every process, with no transport left; before the program's own MPI_Finalize,
/// if it started MPI. Says goodbye to all processes and ends MPI if the first transport started it.
/// False: some process did not say goodbye within `timeout`, or had given up waiting for this one;
/// then MPI is left as it is, since MPI_Finalize would wait for it without bound, and the program
/// should just exit.
[[nodiscard]] bool end_mpi(std::chrono::milliseconds timeout);

/// Where the processes of one host meet.
struct IpcConfig {
  std::string job;     ///< Names the meeting place; the same in all of them, in no other.
  std::string secret;  ///< What they prove to know; never sent. At least 16 bytes, or `job` again:
                       ///< then it is the user alone, whom the system names, that keeps others out.
  int rank = 0, num_ranks = 1;
};

/// Ranks as processes of one user on one host, at most 64. Windows are memory that all of them map,
/// device memory is shared through CUDA IPC. Nothing has a name in a file system, so nothing is
/// left behind. A rank whose process ends is noticed at once, one that stops by its peers'
/// timeouts.
/// Ranks: collective; the same transports in the same order.
/// Throws: kPeerTimeout naming the ranks that did not come; kTransport if ranks disagree on version
///   or num_ranks, or two claim one rank; kInvalidArgument.
[[nodiscard]] std::unique_ptr<Transport> make_ipc_transport(const IpcConfig& config,
                                                            std::chrono::milliseconds timeout);

}  // namespace sluice
