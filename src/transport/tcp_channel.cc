#include "transport/tcp_channel.h"

#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "core/fail.h"
#include "transport/socket_io.h"

namespace sluice {

namespace {

/// Bytes that have come and nobody has read.
std::size_t num_waiting(int socket) {
  int bytes = 0;
  return ioctl(socket, FIONREAD, &bytes) == 0 ? static_cast<std::size_t>(bytes) : 0;
}

}  // namespace

void TcpChannel::close() {
  socket_.reset();
  out_.clear();
}

void TcpChannel::finish() {
  if (!is_open() || is_finished_) return;
  is_finished_ = true;
  out_.clear();
  (void)shutdown(socket_.get(), SHUT_WR);  // Fails where the other end has closed: no loss.
}

TcpChannel::Message TcpChannel::make_message(TcpMessage kind, std::uint64_t number,
                                             std::span<const std::byte> payload) {
  check_argument(payload.size() <= kMaxBytes, "a message of {} bytes over tcp exceeds {}",
                 payload.size(), std::uint64_t{kMaxBytes});
  const Header header{kind, 0, number, payload.size()};
  auto message = std::make_shared<std::vector<std::byte>>(sizeof(header) + payload.size());
  std::memcpy(message->data(), &header, sizeof(header));
  if (!payload.empty()) {
    std::memcpy(message->data() + sizeof(header), payload.data(), payload.size());
  }
  return message;
}

void TcpChannel::post(Message message) {
  if (is_open() && !is_finished_) out_.push_back(std::move(message));
}

void TcpChannel::post(TcpMessage kind, std::uint64_t number, std::span<const std::byte> payload) {
  if (is_open() && !is_finished_) post(make_message(kind, number, payload));
}

bool TcpChannel::send_some() {
  while (!out_.empty()) {
    const std::vector<std::byte>& message = *out_.front();
    const ssize_t sent = send(socket_.get(), message.data() + num_sent_, message.size() - num_sent_,
                              MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN || errno == EWOULDBLOCK;
    }
    num_sent_ += static_cast<std::size_t>(sent);
    if (num_sent_ < message.size()) continue;
    out_.pop_front();
    num_sent_ = 0;
  }
  return true;
}

bool TcpChannel::receive_some(const Hear& hear) {
  std::optional<std::size_t> left;  // Of what had come when this began; known after a first read.
  bool is_last = false;
  while (is_open()) {
    const bool in_header = num_received_ < sizeof(Header);
    std::span<std::byte> to =
        in_header ? std::as_writable_bytes(std::span(&header_, 1)).subspan(num_received_)
                  : std::span(bytes_).subspan(num_received_ - sizeof(Header));
    if (!to.empty()) {
      if (left == 0U) {
        // Nothing more: then the connection's end may be next, which one more read would tell.
        if (is_last || num_waiting(socket_.get()) > 0) return true;
        is_last = true;
        left = to.size();
      }
      if (left) to = to.first(std::min(to.size(), *left));
      const std::ptrdiff_t received = sluice::receive_some(socket_.get(), to, nullptr);
      if (received <= 0) return received == 0;
      num_received_ += static_cast<std::size_t>(received);
      left = left ? *left - static_cast<std::size_t>(received) : num_waiting(socket_.get());
    }
    if (in_header && num_received_ == sizeof(Header)) {
      if (header_.bytes > kMaxBytes || header_.reserved != 0) return false;
      bytes_.assign(header_.bytes, std::byte{0});
    }
    if (num_received_ < sizeof(Header) || num_received_ < sizeof(Header) + header_.bytes) continue;
    num_received_ = 0;
    hear(header_.kind, header_.number, std::exchange(bytes_, {}));
  }
  return true;
}

}  // namespace sluice
