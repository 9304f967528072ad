// rails.h - what an exchange over GPUs of several hosts needs of its transport.
//
//   host a          host b
//   rank 0 <------> rank 2      rail 0: the ranks of local index 0
//   rank 1 <------> rank 3      rail 1
//     mates           mates     ranks of one host, which address each other's memory
//
// A rail queues pieces on a stream; it has no addresses of other hosts and no flags there.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "sluice/error.h"
#include "sluice/transport.h"

namespace sluice {

/// Words in host memory that the device counts up: before an operation, and when it is complete.
/// They never go back. The same operations are counted on every rank.
struct RailProgress {
  const std::atomic<std::uint64_t>* begun = nullptr;
  const std::atomic<std::uint64_t>* done = nullptr;
};

/// Threads: one at a time.
class Rail {
 public:
  struct Send {
    int host;
    const void* data;
    std::size_t bytes;
  };
  struct Receive {
    int host;
    void* data;
    std::size_t bytes;
  };

  virtual ~Rail() = default;
  [[nodiscard]] virtual int num_hosts() const noexcept = 0;
  [[nodiscard]] virtual int host() const noexcept = 0;
  /// Ranks of the whole job, for messages: "rank 2 of host b, rank 3 of host b".
  [[nodiscard]] virtual std::string names_of(const std::vector<int>& ranks) const = 0;

  /// Queues all of these as one operation, which is complete when all of them are. For each send of
  /// one host there is a receive of as many bytes at the other, in the same order.
  /// Stream: asynchronous. It may be captured after an operation between the same hosts has been
  ///   run: the first one connects them.
  /// Throws: kPeerTimeout, kTransport naming ranks and hosts, and from then on. Waits only while
  ///   hosts are being connected, and no longer than the timeout.
  virtual void exchange(std::span<const Send> sends, std::span<const Receive> receives,
                        void* stream) = 0;

  /// From now on an operation that has begun on the device and is not done within the timeout
  /// fails. `on_failure` is called once, on a thread of the rail or the one that found the failure,
  /// for whatever reason it fails. It does not throw, and calls nothing of the rail but
  /// stop_watching(). Returns what stop_watching() takes.
  [[nodiscard]] virtual int watch(RailProgress progress,
                                  std::function<void(const Error&)> on_failure) = 0;
  /// When it returns, `on_failure` is not running and will not be called any more, unless it is
  /// called from there.
  virtual void stop_watching(int watch) = 0;

  /// Throws what failed, if something has.
  virtual void check() const = 0;
};

/// A transport of ranks on several hosts, as many on each.
class RailTransport : public Transport {
 public:
  /// Of this rank's local index; null in a group of one host.
  [[nodiscard]] virtual Rail* rail() const noexcept = 0;
  /// The ranks of this host; rank r there is hosts().ranks_of(own host)[r].
  [[nodiscard]] virtual Transport& mates() const noexcept = 0;
};

}  // namespace sluice
