// mover_memory.h - memory of each rank for experts on their way, which all ranks can reach.
//
// On the host it is a window, on a device an allocation that ranks share, with a window for flags.
// A group may keep it between two moves: to make and to share it takes longer than to move an
// expert.
#pragma once

#include <chrono>
#include <memory>
#include <vector>

#include "backend/ops.h"
#include "sluice/transport.h"

namespace sluice {

class MoverMemory {
 public:
  /// Allocates what a device has to hold.   Throws: kOutOfMemory.
  MoverMemory(BackendOps& backend, std::size_t bytes);

  /// Collective: shows the memory to the other ranks, and gives each two flags of every rank.
  /// Throws: kTransport, kPeerTimeout naming ranks.
  void connect(Transport& transport, std::chrono::milliseconds timeout);

  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] std::byte* local() const;
  /// Where this rank's device finds the memory of `rank`; null on the host, where window().put()
  /// reaches it.
  [[nodiscard]] std::byte* of_rank(int rank) const;
  [[nodiscard]] Window& window() const { return *window_; }

  /// Of all moves that used it: flags only grow. The same on every rank.
  std::uint64_t num_rounds = 0;

 private:
  std::size_t bytes_;
  int rank_ = 0;
  std::shared_ptr<DeviceBuffer> unshared_;          // On a device, until connect().
  std::vector<std::shared_ptr<std::byte>> shared_;  // [num_ranks], on a device.
  std::unique_ptr<Window> window_;                  // Flags; on the host the memory, too.
};

}  // namespace sluice
