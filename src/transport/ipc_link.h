// ipc_link.h - collectives of the processes of one host, and word of who is still alive.
//
// Parts go to rank 0 over Unix sockets and come back from it. The board says who has begun which
// collective, so that every rank can name who is missing, and not only rank 0.
//
// A collective ends early when a rank breaks off: its process ends, it leaves, or it gives up. Then
// whoever has not come *yet* may be about to come, and is not to blame. Blamed is the rank that
// broke off; if it gave up, then those that it blamed, which it has left on the board. So all ranks
// name the same ones. Only a rank that was waited for until the timeout is missing by being late.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/home_process.h"
#include "sluice/error.h"
#include "transport/ipc_rendezvous.h"
#include "transport/socket_io.h"

namespace sluice {

class IpcLink {
 public:
  IpcLink(const IpcConfig& config, std::chrono::milliseconds timeout);
  ~IpcLink();  ///< Tells the others that this rank has left in order; in a child says nothing.
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
  /// Throws: kPeerTimeout or kTransport naming operation, number and missing ranks; kInterrupted.
  /// After that the ranks may be out of step, and every later call throws. kInvalidArgument in a
  /// child of the process that made it.
  [[nodiscard]] Gathered gather(std::span<const std::byte> mine, const char* operation,
                                std::chrono::milliseconds timeout, int file = -1);

  /// Ranks whose process has ended without leaving, in ascending order.
  [[nodiscard]] std::vector<int> lost_ranks() const { return ranks_ended(membership_); }
  /// True if `rank`'s process has ended, or has left.
  [[nodiscard]] bool is_gone(int rank) const;
  /// The process that is this rank.
  [[nodiscard]] const HomeProcess& home() const noexcept { return home_; }

 private:
  void send(int peer, std::span<const std::byte> bytes, Deadline deadline, int file);
  [[nodiscard]] std::vector<std::byte> receive(Deadline deadline,
                                               std::vector<FileDescriptor>* files);
  [[nodiscard]] std::vector<std::vector<std::byte>> receive_parts(Deadline deadline);
  [[nodiscard]] std::vector<std::byte> collect(std::span<const std::byte> mine, Deadline deadline,
                                               int file);

  /// A failed step of a collective, and the ranks that it waited for or that broke off.
  struct Failed {
    Io io;
    std::vector<int> ranks;
  };
  /// Whom to blame for it, why, and in what words.
  struct Blame {
    Absence why;
    std::vector<int> ranks;
    std::string text;
  };
  [[nodiscard]] Blame blame_for_delay(const Failed& failed,
                                      std::chrono::milliseconds timeout) const;
  [[nodiscard]] Blame blame_for_break(int rank) const;
  [[noreturn]] void give_up(const Failed& failed, std::chrono::milliseconds timeout);
  [[nodiscard]] std::vector<int> sockets() const;
  [[noreturn]] void break_off(const Blame& blame, ErrorCode code);

  int rank_, num_ranks_;
  HomeProcess home_;
  IpcMembership membership_;
  NotInChildren lifeline_, sockets_;
  std::uint64_t number_ = 0;  // Of the collective under way.
  const char* operation_ = "";
  std::optional<Error> failure_;  // The first one; all later collectives are refused.
};

}  // namespace sluice
