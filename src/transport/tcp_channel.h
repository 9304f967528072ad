// tcp_channel.h - one connection between two processes that have met: whole messages in, and a
// queue of messages out. Nothing here waits.
//
// Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/file_descriptor.h"

namespace sluice {

/// The end of a meeting over TCP speaks these; `number` means something else in each.
enum class TcpMessage : std::uint32_t {
  kPart = 1,  ///< r -> 0: what this rank gives to collective `number`.
  kAll,       ///< 0 -> r: what all ranks gave to collective `number`.
  kBeat,      ///< r -> 0: alive; `number` is its progress, the payload its stop word.
  kWho,       ///< r -> 0: question `number`: who has come how far?
  kTable,     ///< 0 -> r: its answer.
  kGaveUp,    ///< r -> 0: failed in a collective, and blames others.
  kBye,       ///< r -> 0: leaves in order.
  kGone,      ///< 0 -> r: rank `number` takes part no more.
  kRefusal,   ///< 0 -> r: the meeting is off; the payload says why.
};

class TcpChannel {
 public:
  /// Longest payload. A longer one is taken for noise, and ends the connection.
  static constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 28;

  using Hear = std::function<void(TcpMessage, std::uint64_t number, std::vector<std::byte>)>;

  TcpChannel() = default;
  explicit TcpChannel(FileDescriptor socket) : socket_(std::move(socket)) {}

  [[nodiscard]] int socket() const noexcept { return socket_.get(); }
  [[nodiscard]] bool is_open() const noexcept { return static_cast<bool>(socket_); }
  [[nodiscard]] bool has_output() const noexcept { return !out_.empty(); }
  void close();
  /// These were the last words: the other end reads them, then the end of the connection. It can
  /// still be heard. Whoever closes with bytes that it has not read may take its own last words
  /// back: the system then resets the connection, and drops what it had not sent yet.
  void finish();

  /// Queues a message; nothing if the connection is closed or finished.
  void post(TcpMessage kind, std::uint64_t number, std::span<const std::byte> payload = {});
  /// The same of one that several channels send: what a collective gives to thousands of ranks is
  /// in memory once.
  using Message = std::shared_ptr<const std::vector<std::byte>>;
  [[nodiscard]] static Message make_message(TcpMessage kind, std::uint64_t number,
                                            std::span<const std::byte> payload);
  void post(Message message);
  /// Sends what the system takes. False if the other end has closed.
  [[nodiscard]] bool send_some();
  /// Gives every message that is complete to `hear`: of the bytes that had come when this began, so
  /// that a peer who never stops talking keeps nobody from the other connections. What comes
  /// meanwhile is for the next call. False if the other end has closed or talks nonsense.
  [[nodiscard]] bool receive_some(const Hear& hear);

 private:
  struct Header {
    TcpMessage kind;
    std::uint32_t reserved;
    std::uint64_t number, bytes;
  };
  FileDescriptor socket_;
  bool is_finished_ = false;
  std::deque<Message> out_;
  std::size_t num_sent_ = 0;  // Of the first message.
  Header header_{};
  std::vector<std::byte> bytes_;
  std::size_t num_received_ = 0;  // Of header and payload.
};

}  // namespace sluice
