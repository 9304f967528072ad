// tcp_hub.h - the thread behind a TcpLink: it reads and writes this process's connections, and
// keeps what they said.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/file_descriptor.h"
#include "sluice/error.h"
#include "sluice/network.h"
#include "transport/reception.h"
#include "transport/socket_io.h"
#include "transport/tcp_channel.h"
#include "transport/tcp_departure.h"
#include "transport/tcp_link.h"

namespace sluice {

class TcpHub {
 public:
  /// Rank 0 listens; the others have joined already.
  TcpHub(const TcpConfig& config, FileDescriptor listener_or_socket);
  ~TcpHub();
  TcpHub(const TcpHub&) = delete;
  TcpHub& operator=(const TcpHub&) = delete;

  /// Gives this rank's part of the next collective.
  void give(std::span<const std::byte> mine);
  /// Waits for everybody's parts, as one message (parts.h), until `deadline`. Nothing if they are
  /// not here, and somebody is gone, or the time is over.
  [[nodiscard]] std::optional<std::vector<std::byte>> take_all(Deadline deadline);
  /// This rank takes part no more, for what it says.
  void give_up(const TcpDeparture& why);

  [[nodiscard]] std::optional<std::vector<TcpMember>> ask(Deadline deadline);
  [[nodiscard]] std::map<int, TcpDeparture> gone() const;
  /// What ended the meeting, if it is not somebody's absence.
  [[nodiscard]] std::optional<Error> refusal() const;
  [[nodiscard]] int num_strangers() const;
  void set_progress(std::uint64_t progress) noexcept;
  void set_stop_word(std::uint64_t word) noexcept;  ///< The first one counts.
  [[nodiscard]] std::uint64_t number() const noexcept { return number_; }

 private:
  struct Peer {
    TcpChannel channel;
    TcpMember member;
    Deadline last_heard{};
    std::optional<std::vector<std::byte>> part;  // Rank 0: of the collective under way.
  };
  using Lock = std::unique_lock<std::mutex>;

  // Of the thread, which holds the lock but while it sleeps.
  void run();
  [[nodiscard]] bool finish();
  void turn(Lock& lock);
  void serve(int rank);
  void hear(int rank, TcpMessage kind, std::uint64_t number, std::vector<std::byte> bytes);
  void hear_rank_0(TcpMessage kind, std::uint64_t number, std::vector<std::byte> bytes);
  void take_in(Reception::Guest& guest);
  void complete();
  void beat();

  // With the lock held.
  void wake() const;
  void depart(int rank, TcpDeparture why);
  void refuse(const Error& why);
  void tell_all(TcpMessage kind, std::uint64_t number, std::span<const std::byte> payload);
  void wait_a_turn(Lock& lock);
  [[nodiscard]] bool is_over() const { return all_ || refusal_ || !gone_.empty(); }
  [[nodiscard]] std::vector<TcpMember> table() const;
  void send_some();

  const TcpConfig config_;
  std::mutex asking_;  // Held by the one who asks; taken before mutex_.
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  FileDescriptor bell_;                   // Wakes the thread.
  std::unique_ptr<Reception> reception_;  // Rank 0, until all have come.
  std::vector<Peer> peers_;          // Rank 0: [num_ranks], own without a channel; others: [1].
  std::vector<TcpChannel> refused_;  // Rank 0: of the job, but not wanted; they are told why.
  std::vector<std::pair<int, std::uint64_t>> questions_;  // Rank 0: who asked what, this turn.
  std::uint64_t number_ = 0;                              // Of the collective under way.
  std::optional<std::vector<std::byte>> all_;             // Its result.
  std::map<int, TcpDeparture> gone_;
  std::optional<Error> refusal_;
  std::uint64_t question_ = 0, turns_ = 0, turns_wanted_ = 0;
  std::optional<std::vector<TcpMember>> answer_;  // To the last question.
  Deadline next_beat_{};
  std::uint64_t progress_ = 0, stop_word_ = 0;
  bool has_news_ = false;  // One of them that the last beat did not tell.
  bool is_ending_ = false;
  std::thread thread_;  // The last member: it uses all others.
};

}  // namespace sluice
