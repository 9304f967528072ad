#include "transport/tcp_socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <charconv>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/fail.h"
#include "core/interruption.h"

namespace sluice {
namespace {

struct Endpoint {
  sockaddr_storage address{};
  socklen_t size = 0;
};

struct Resolved {
  std::vector<Endpoint> endpoints;
  std::string reason;  // Of none.
};

Resolved ask_system(const TcpAddress& where, int flags) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int status = getaddrinfo(where.host.c_str(), where.port.c_str(), &hints, &list);
  if (status != 0) {
    return {{}, status == EAI_SYSTEM ? std::strerror(errno) : gai_strerror(status)};
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(list, freeaddrinfo);
  Resolved resolved;
  for (const addrinfo* a = list; a != nullptr; a = a->ai_next) {
    Endpoint& endpoint = resolved.endpoints.emplace_back();
    std::memcpy(&endpoint.address, a->ai_addr, a->ai_addrlen);
    endpoint.size = a->ai_addrlen;
  }
  return resolved;
}

/// A name server may take long to answer, and getaddrinfo() has no deadline. So a thread asks for
/// names, and is left to itself if it takes too long; it owns all that it touches.
Resolved resolve(const TcpAddress& where, Deadline deadline) {
  Resolved numeric = ask_system(where, AI_NUMERICHOST);
  if (!numeric.endpoints.empty()) return numeric;
  struct Question {
    std::mutex mutex;
    std::condition_variable answered;
    bool is_answered = false;
    Resolved answer;
  };
  const auto question = std::make_shared<Question>();
  std::thread([question, where] {
    Resolved answer = ask_system(where, 0);
    const std::lock_guard lock(question->mutex);
    question->answer = std::move(answer), question->is_answered = true;
    question->answered.notify_all();
  }).detach();
  std::unique_lock lock(question->mutex);
  if (!Interruption::wait_until(question->answered, lock, deadline,
                                [&] { return question->is_answered; })) {
    return {{}, "no name server has answered in time"};
  }
  return std::move(question->answer);
}

FileDescriptor new_socket(const Endpoint& endpoint) {
  FileDescriptor socket(::socket(endpoint.address.ss_family,
                                 SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP));
  if (!socket) fail(ErrorCode::kTransport, "socket: {}", std::strerror(errno));
  return socket;
}

/// A connection within this host may be made with itself, where nobody listens at a port that the
/// system happens to choose for this end.
bool is_with_itself(int socket) {
  sockaddr_storage here{}, there{};
  socklen_t here_size = sizeof(here), there_size = sizeof(there);
  return getsockname(socket, reinterpret_cast<sockaddr*>(&here), &here_size) == 0 &&
         getpeername(socket, reinterpret_cast<sockaddr*>(&there), &there_size) == 0 &&
         here_size == there_size && std::memcmp(&here, &there, here_size) == 0;
}

/// 0, or what kept the connection from being made.
int try_to_connect(int socket, const Endpoint& endpoint, Deadline deadline) {
  if (connect(socket, reinterpret_cast<const sockaddr*>(&endpoint.address), endpoint.size) != 0) {
    if (errno != EINPROGRESS && errno != EINTR) return errno;
    pollfd entry{socket, POLLOUT, 0};
    for (int ready = 0; ready <= 0;) {
      const Deadline until = Interruption::next_look(deadline);
      ready = poll(&entry, 1, ms_until(until));
      if (ready < 0 && errno != EINTR) return errno;
      if (ready == 0 && until == deadline) return ETIMEDOUT;
      if (ready <= 0) Interruption::look();
    }
    int error = 0;
    socklen_t size = sizeof(error);
    if (getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &size) != 0) return errno;
    if (error != 0) return error;
  }
  return is_with_itself(socket) ? ECONNREFUSED : 0;
}

}  // namespace

TcpAddress parse_address(const std::string& text) {
  const std::size_t colon = text.rfind(':');
  const bool has_brackets = text.starts_with('[');
  const std::size_t end = has_brackets ? text.find(']') : colon;
  const bool is_whole = colon != std::string::npos && end != std::string::npos &&
                        (has_brackets ? end + 1 == colon : text.find(':') == colon);
  TcpAddress address;
  int port = -1;
  if (is_whole) {
    address.host = has_brackets ? text.substr(1, end - 1) : text.substr(0, colon);
    address.port = text.substr(colon + 1);
    const char* const last = address.port.data() + address.port.size();
    const auto [stop, error] = std::from_chars(address.port.data(), last, port);
    if (error != std::errc{} || stop != last) port = -1;
  }
  check_argument(!address.host.empty() && port >= 0 && port <= 65'535,
                 "address '{}' is not host:port or [host]:port with a port in [0, 65535]", text);
  return address;
}

FileDescriptor listen_over_tcp(const std::string& address, Deadline deadline) {
  const Resolved resolved = resolve(parse_address(address), deadline);
  std::string reason = resolved.reason;
  for (const Endpoint& endpoint : resolved.endpoints) {
    FileDescriptor socket = new_socket(endpoint);
    // So that a port can be used again at once after its last owner has ended.
    const int yes = 1;
    (void)setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    if (bind(socket.get(), reinterpret_cast<const sockaddr*>(&endpoint.address), endpoint.size) ==
            0 &&
        listen(socket.get(), 1024) == 0) {
      return socket;
    }
    reason = std::strerror(errno);
  }
  fail(ErrorCode::kTransport, "listening at {}: {}", address, reason);
}

int port_of_listener(int socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  int listens = 0;
  socklen_t listens_size = sizeof(listens);
  const bool is_listener =
      getsockopt(socket, SOL_SOCKET, SO_ACCEPTCONN, &listens, &listens_size) == 0 && listens != 0 &&
      getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  check_argument(is_listener && (address.ss_family == AF_INET || address.ss_family == AF_INET6),
                 "listener {} is no socket that listens over TCP", socket);
  return ntohs(address.ss_family == AF_INET
                   ? reinterpret_cast<const sockaddr_in&>(address).sin_port
                   : reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
}

void send_at_once(int socket) {
  const int yes = 1;
  (void)setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
}

Connected connect_over_tcp(const std::string& address, Deadline deadline) {
  const Resolved resolved = resolve(parse_address(address), deadline);
  Connected result{{}, resolved.reason};
  for (const Endpoint& endpoint : resolved.endpoints) {
    FileDescriptor socket = new_socket(endpoint);
    const int error = try_to_connect(socket.get(), endpoint, deadline);
    if (error != 0) {
      result.reason = std::strerror(error);
      continue;
    }
    send_at_once(socket.get());
    return {std::move(socket), ""};
  }
  return result;
}

}  // namespace sluice
