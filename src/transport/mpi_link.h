// mpi_link.h - what the processes of one MPI job share: one ordered stream of frames for each pair.
//
//   send() --> open frame of the peer --ship()--> MPI --> applied to a window, in order
//
// Frames are received by whoever holds the lock: a rank that waits, or a thread that looks in
// every now and then while the rank computes. Nothing here calls anything of MPI that may block on
// a peer, but for starting MPI itself and ending it after all ranks said goodbye.
//
// Threads: all functions may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "transport/frame.h"
#include "transport/pages.h"

namespace sluice {

/// One rank's memory in one symmetric window.
struct WindowMemory {
  WindowMemory(std::size_t bytes_in, int num_flags)
      : bytes(bytes_in), pages(bytes_in), flags(static_cast<std::size_t>(num_flags)) {}
  std::size_t bytes;
  Pages pages;
  std::vector<std::atomic<std::uint64_t>> flags;
};

class MpiLink {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  /// The link of this process; the first call starts it, on every process of the job.
  /// Throws: kPeerTimeout naming the processes that did not come; kTransport naming one of another
  /// version; kUnsupported if MPI runs with too little thread support.
  [[nodiscard]] static MpiLink& open(std::chrono::milliseconds timeout);
  /// See end_mpi().
  [[nodiscard]] static bool end(std::chrono::milliseconds timeout);

  ~MpiLink();
  MpiLink(const MpiLink&) = delete;
  MpiLink& operator=(const MpiLink&) = delete;

  [[nodiscard]] int rank() const noexcept;
  [[nodiscard]] int num_ranks() const noexcept;

  /// Numbers transports; every process makes them in the same order.
  [[nodiscard]] std::uint16_t new_group();

  /// From now on, records for window `object` of `group` go to `memory`, until remove_window().
  void add_window(std::uint16_t group, std::uint32_t object, std::shared_ptr<WindowMemory> memory);
  /// Records that arrive later are dropped: destroying a window waits for nobody.
  void remove_window(std::uint16_t group, std::uint32_t object) noexcept;

  /// Queues a record, in pieces if need be; on its way at the next ship(). Waits only for a peer
  /// that is far behind. Throws: kPeerTimeout naming it; kTransport.
  void send(int peer, Record record, std::span<const std::byte> payload,
            std::chrono::milliseconds timeout);
  void ship(int peer, std::chrono::milliseconds timeout);

  /// Receives until `arrived()`; false at the deadline. Throws: kTransport if a message was wrong.
  [[nodiscard]] bool wait_until(Deadline deadline, const std::function<bool()>& arrived);

  /// What `peer` sent to gather `object` of `group`, once complete: then it is handed over, and
  /// must be taken once. Call within wait_until().
  [[nodiscard]] std::unique_ptr<std::vector<std::byte>> take_share(std::uint16_t group,
                                                                   std::uint32_t object, int peer);

 private:
  /// The link of this process, null if there is none.
  [[nodiscard]] static std::unique_ptr<MpiLink>& the_link();
  /// Tells all ranks, and waits until all have told the same; false if not, or if one leaves.
  [[nodiscard]] bool exchange_farewells(Farewell farewell, std::chrono::milliseconds timeout);

  struct Impl;
  explicit MpiLink(std::chrono::milliseconds timeout);
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
