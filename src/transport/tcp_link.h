// tcp_link.h - collectives of processes on any hosts, over TCP, and word of who is still alive.
//
//   rank r                                    rank 0
//     handshake (handshake.h) ------------------>
//     kPart n ---------------------------------->   has all parts of n:
//     <-------------------------------- kAll n       to everybody
//     kBeat, every 500 ms ----------------------->   notes when, how far r says it is, and for
//                                                     whom it has stopped
//     kWho --------------------------------------->
//     <--------------------------------- kTable      who came how far, and was heard when
//     kGaveUp, kBye, or the connection closes --->   to everybody: kGone
//
// A collective is for set-up and reports. One connection for each rank, to rank 0, carries all of
// this. One thread of each process alone reads and writes connections, so rank 0 answers and hears
// who is gone whatever its program does at the moment.
//
// A collective ends early when a rank breaks off: its process ends, it leaves, or it gives up. It
// blames that rank, or those that it gave up for, and never a rank that has only not come yet. One
// that was waited for until the timeout is missing by being late.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/home_process.h"
#include "sluice/network.h"

namespace sluice {

inline constexpr int kMaxTcpRanks = 4096;

enum class Presence : std::uint32_t {
  kAway,    ///< It has not joined yet.
  kHere,    ///< It takes part.
  kGaveUp,  ///< It failed in a collective, and is alive.
  kLeft,    ///< It destroyed its link.
  kEnded,   ///< Its connection closed before that: its process has ended.
};

/// What rank 0 knows of a rank.
struct TcpMember {
  Presence presence = Presence::kAway;
  std::uint32_t silent_ms = 0;  ///< Since it was last heard.
  std::uint64_t arrived = 0;    ///< Collectives begun.
  std::uint64_t progress = 0;   ///< The last one that set_progress() told.
  /// 0, or 1 + the rank for which it has stopped: set_stopped_for().
  std::uint64_t stop_word = 0;
};

/// Rank of one job of processes. Threads: one at a time, but ask(), gone(), left(), set_progress()
/// and set_stopped_for() from any.
class TcpLink {
 public:
  /// Collective. Throws: kPeerTimeout naming the ranks that did not come; kTransport if ranks
  /// disagree on version or num_ranks, two claim one rank, nobody can listen at rank 0's address,
  /// or rank 0 does not take this process for one of its job; kInvalidArgument.
  TcpLink(const TcpConfig& config, std::chrono::milliseconds timeout);
  /// Tells the others that this rank has left in order. Waits until they have heard it; for one
  /// that does not answer, 500 ms. In a child of the process that made it: nothing.
  ~TcpLink();
  TcpLink(const TcpLink&) = delete;
  TcpLink& operator=(const TcpLink&) = delete;

  [[nodiscard]] int rank() const noexcept;
  [[nodiscard]] int num_ranks() const noexcept;

  /// Collective: [num_ranks] parts of any sizes, ordered by rank.
  /// Throws: kPeerTimeout or kTransport naming operation, number and missing ranks; kInterrupted.
  /// After that the ranks may be out of step, and every later call throws. kInvalidArgument in a
  /// child of the process that made it.
  [[nodiscard]] std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine,
                                                           const char* operation,
                                                           std::chrono::milliseconds timeout);

  /// How far each rank is, as rank 0 knows it; nothing if rank 0 does not answer in time. A rank
  /// that is stopped is one that has been silent for long.
  [[nodiscard]] std::optional<std::vector<TcpMember>> ask(std::chrono::milliseconds timeout);

  /// Whom to blame for what does not come, in ascending order: the ranks whose process has ended;
  /// or else those that others gave up for, or, if that is this rank alone, those that gave up.
  /// And the ranks that left in order. Asks nobody.
  [[nodiscard]] std::vector<int> gone() const;
  [[nodiscard]] std::vector<int> left() const;

  /// From now on the others learn this number when they ask. It only grows.
  void set_progress(std::uint64_t progress) noexcept;
  /// From now on the others learn, when they ask, that this rank has stopped for `lost`.
  /// Collectives go on. The first call counts.
  void set_stopped_for(int lost) noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl, DeletedAtHome<Impl>> impl_;  // It has a thread.
};

}  // namespace sluice
