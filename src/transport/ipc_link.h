// ipc_link.h - collectives of the processes of one host, and word of who is still alive.
//
// Parts go to rank 0 over Unix sockets and come back from it. The board says who has begun which
// collective, so that every rank can name who is missing, and not only rank 0.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "sluice/error.h"
#include "transport/ipc_rendezvous.h"
#include "transport/socket_io.h"

namespace sluice {

class IpcLink {
 public:
  IpcLink(const IpcConfig& config, std::chrono::milliseconds timeout);
  ~IpcLink();  ///< Tells the others that this rank has left in order.
  IpcLink(const IpcLink&) = delete;
  IpcLink& operator=(const IpcLink&) = delete;

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int num_ranks() const noexcept { return num_ranks_; }
  [[nodiscard]] IpcBoard& board() const noexcept { return membership_.board(); }

  struct Gathered {
    std::vector<std::vector<std::byte>> parts;  ///< [num_ranks] of any sizes.
    FileDescriptor file;                        ///< Rank 0's, on the others.
  };
  /// Collective. Rank 0 may give a file to all others, or -1.
  /// Throws: kPeerTimeout or kTransport naming operation, number and missing ranks. After that the
  /// ranks may be out of step, and every later call throws.
  [[nodiscard]] Gathered gather(std::span<const std::byte> mine, const char* operation,
                                std::chrono::milliseconds timeout, int file = -1);

  /// " 1 3": ranks whose process has ended without leaving; empty if there is none.
  [[nodiscard]] std::vector<int> lost_ranks() const;
  /// True if `rank`'s process has ended, or has left.
  [[nodiscard]] bool is_gone(int rank) const;

 private:
  struct Header {
    std::uint64_t number, bytes;
  };
  void send(int socket, std::span<const std::byte> bytes, Deadline deadline, int file);
  [[nodiscard]] std::vector<std::byte> receive(int socket, Deadline deadline,
                                               std::vector<FileDescriptor>* files);
  [[nodiscard]] std::vector<std::byte> collect(std::span<const std::byte> mine, Deadline deadline,
                                               int file);
  [[noreturn]] void give_up(Io io, std::chrono::milliseconds timeout);

  int rank_, num_ranks_;
  IpcMembership membership_;
  std::uint64_t number_ = 0;  // Of the collective under way.
  const char* operation_ = "";
  std::optional<Error> failure_;  // The first one; all later collectives are refused.
};

}  // namespace sluice
