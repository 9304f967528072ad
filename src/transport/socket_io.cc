#include "transport/socket_io.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/fail.h"
#include "core/interruption.h"

namespace sluice {
namespace {

/// Room for the descriptors of one message, aligned as the system wants it.
struct Control {
  alignas(cmsghdr) char bytes[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
};

bool wait_for(int socket, short events, Deadline deadline) {
  for (;;) {
    const Deadline until = Interruption::next_look(deadline);
    pollfd entry{socket, events, 0};
    const int ready = poll(&entry, 1, ms_until(until));
    if (ready > 0) return true;
    if (ready == 0 && until == deadline) return false;
    if (ready < 0 && errno != EINTR) fail(ErrorCode::kTransport, "poll: {}", std::strerror(errno));
    Interruption::look();
  }
}

std::pair<sockaddr_un, socklen_t> address_of(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  SLUICE_ASSERT(name.size() + 1 <= sizeof(address.sun_path));
  // A leading zero: Linux's abstract names, which are in no file system.
  std::ranges::copy(name, address.sun_path + 1);
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

FileDescriptor new_socket() {
  FileDescriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) fail(ErrorCode::kTransport, "socket: {}", std::strerror(errno));
  return socket;
}

}  // namespace

int ms_until(Deadline deadline) {
  const auto left =
      std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  return static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, 1 << 30));
}

Io send_all(int socket, std::span<const std::byte> bytes, Deadline deadline,
            std::span<const int> files) {
  SLUICE_ASSERT(files.size() <= kMaxDescriptors);
  Control control;
  while (!bytes.empty()) {
    iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
    msghdr message{};
    message.msg_iov = &part, message.msg_iovlen = 1;
    if (!files.empty()) {
      message.msg_control = control.bytes;
      message.msg_controllen = CMSG_SPACE(files.size_bytes());
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(files.size_bytes());
      std::memcpy(CMSG_DATA(header), files.data(), files.size_bytes());
    }
    const ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      files = {};
      bytes = bytes.subspan(static_cast<std::size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!wait_for(socket, POLLOUT, deadline)) return Io::kLate;
    } else if (errno != EINTR) {
      return Io::kClosed;
    }
  }
  return Io::kDone;
}

std::ptrdiff_t receive_some(int socket, std::span<std::byte> bytes,
                            std::vector<FileDescriptor>* files) {
  Control control;
  iovec part{bytes.data(), bytes.size()};
  msghdr message{};
  message.msg_iov = &part, message.msg_iovlen = 1;
  message.msg_control = control.bytes, message.msg_controllen = sizeof(control.bytes);
  const ssize_t received = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (received < 0) {
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -1;
  }
  for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    for (std::size_t at = 0; CMSG_LEN(at) < h->cmsg_len; at += sizeof(int)) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(h) + at, sizeof(fd));
      FileDescriptor file(fd);  // Closed at once where nobody asked for it.
      if (files != nullptr) files->push_back(std::move(file));
    }
  }
  return received == 0 ? -1 : received;
}

Io receive_all(int socket, std::span<std::byte> bytes, Deadline deadline,
               std::vector<FileDescriptor>* files) {
  while (!bytes.empty()) {
    const std::ptrdiff_t received = receive_some(socket, bytes, files);
    if (received < 0) return Io::kClosed;
    bytes = bytes.subspan(static_cast<std::size_t>(received));
    if (received == 0 && !wait_for(socket, POLLIN, deadline)) return Io::kLate;
  }
  return Io::kDone;
}

FileDescriptor listen_at(const std::string& name) {
  FileDescriptor socket = new_socket();
  const auto [address, size] = address_of(name);
  const bool is_bound = bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0;
  if (!is_bound && errno == EADDRINUSE) return {};
  if (!is_bound || listen(socket.get(), 128) != 0) {
    fail(ErrorCode::kTransport, "listening at @{}: {}", name, std::strerror(errno));
  }
  return socket;
}

FileDescriptor connect_to(const std::string& name) {
  FileDescriptor socket = new_socket();
  const auto [address, size] = address_of(name);
  if (connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0) return socket;
  // Nobody there yet, or too many at its door.
  if (errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR) return {};
  fail(ErrorCode::kTransport, "connecting to @{}: {}", name, std::strerror(errno));
}

bool is_same_user(int socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

}  // namespace sluice
