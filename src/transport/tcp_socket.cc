#include "transport/tcp_socket.h"

#include <fmt/ranges.h>
#include <ifaddrs.h>
#include <net/if.h>
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

struct Resolved {
  std::vector<TcpEndpoint> endpoints;
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
    TcpEndpoint& endpoint = resolved.endpoints.emplace_back();
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

/// Empty, with errno, where the system does not have such addresses.
FileDescriptor new_socket(const TcpEndpoint& endpoint) {
  return FileDescriptor(::socket(endpoint.address.ss_family,
                                 SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP));
}

/// Empty, with errno, if it cannot.
FileDescriptor listener_at(const TcpEndpoint& endpoint) {
  FileDescriptor socket = new_socket(endpoint);
  if (!socket) return {};
  // So that a port can be used again at once after its last owner has ended.
  const int yes = 1, no = 0;
  (void)setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  if (endpoint.address.ss_family == AF_INET6) {  // "[::]" takes IPv4 too, whatever the system says.
    (void)setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no));
  }
  if (bind(socket.get(), reinterpret_cast<const sockaddr*>(&endpoint.address), endpoint.size) !=
          0 ||
      listen(socket.get(), 1024) != 0) {
    const int error = errno;
    socket.reset();
    errno = error;
  }
  return socket;
}

/// "10.1.2.3" or "fd00::1", for messages.
std::string text_of(const sockaddr* address, socklen_t size) {
  char text[NI_MAXHOST] = {};
  const int status = getnameinfo(address, size, text, sizeof(text), nullptr, 0, NI_NUMERICHOST);
  return status == 0 ? text : fmt::format("family {}", int{address->sa_family});
}

/// "10.1.2.3" or "[fd00::1]", as it stands before a port.
std::string host_of(const sockaddr* address) {
  if (address->sa_family == AF_INET) return text_of(address, sizeof(sockaddr_in));
  return "[" + text_of(address, sizeof(sockaddr_in6)) + "]";
}

/// Empty, with errno, if it cannot.
FileDescriptor listener_everywhere(int port) {
  TcpEndpoint any{.size = sizeof(sockaddr_in6)};
  auto& six = reinterpret_cast<sockaddr_in6&>(any.address);
  six.sin6_family = AF_INET6, six.sin6_port = htons(static_cast<std::uint16_t>(port));
  FileDescriptor socket = listener_at(any);
  // A host without IPv6. Another reason, as a port that is taken, is one for IPv4 too.
  if (!socket && (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL)) {
    any = {.size = sizeof(sockaddr_in)};
    auto& four = reinterpret_cast<sockaddr_in&>(any.address);
    four.sin_family = AF_INET, four.sin_port = htons(static_cast<std::uint16_t>(port));
    socket = listener_at(any);
  }
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
int try_to_connect(int socket, const TcpEndpoint& endpoint, Deadline deadline) {
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

TcpEndpoint endpoint_of_listener(int socket) {
  TcpEndpoint endpoint{.size = sizeof(sockaddr_storage)};
  int listens = 0;
  socklen_t listens_size = sizeof(listens);
  const bool is_listener =
      getsockopt(socket, SOL_SOCKET, SO_ACCEPTCONN, &listens, &listens_size) == 0 && listens != 0 &&
      getsockname(socket, reinterpret_cast<sockaddr*>(&endpoint.address), &endpoint.size) == 0;
  const int family = endpoint.address.ss_family;
  check_argument(is_listener && (family == AF_INET || family == AF_INET6),
                 "listener {} is no socket that listens over TCP", socket);
  return endpoint;
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
  const TcpAddress where = parse_address(address);
  const bool is_name = ask_system(where, AI_NUMERICHOST).endpoints.empty();
  std::string reason;
  if (is_name && where.host != "localhost") {
    FileDescriptor socket = listener_everywhere(std::stoi(where.port));
    if (socket) return socket;
    reason = std::strerror(errno);
  } else {
    const Resolved resolved = resolve(where, deadline);
    reason = resolved.reason;
    for (const TcpEndpoint& endpoint : resolved.endpoints) {
      FileDescriptor socket = listener_at(endpoint);
      if (socket) return socket;
      reason = std::strerror(errno);
    }
  }
  fail(ErrorCode::kTransport, "listening at {}: {}", address, reason);
}

FileDescriptor listen_everywhere(int port) {
  FileDescriptor socket = listener_everywhere(port);
  if (socket) return socket;
  fail(ErrorCode::kTransport, "listening at port {} of every address: {}", port,
       std::strerror(errno));
}

int port_of_listener(int socket) {
  const TcpEndpoint endpoint = endpoint_of_listener(socket);
  return ntohs(endpoint.address.ss_family == AF_INET
                   ? reinterpret_cast<const sockaddr_in&>(endpoint.address).sin_port
                   : reinterpret_cast<const sockaddr_in6&>(endpoint.address).sin6_port);
}

std::vector<std::string> own_addresses() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return {};
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(list, freeifaddrs);
  std::vector<std::string> near, far;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || (i->ifa_flags & IFF_UP) == 0) continue;
    if (i->ifa_addr->sa_family != AF_INET && i->ifa_addr->sa_family != AF_INET6) continue;
    const std::string host = host_of(i->ifa_addr);
    // An address with a scope means something on its own host alone.
    if (host.find('%') != std::string::npos) continue;
    ((i->ifa_flags & IFF_LOOPBACK) != 0 ? near : far).push_back(host);
  }
  far.insert(far.end(), near.begin(), near.end());
  return far;
}

std::string reachable_at(int listener) {
  const TcpEndpoint endpoint = endpoint_of_listener(listener);
  std::vector<std::string> hosts = {host_of(reinterpret_cast<const sockaddr*>(&endpoint.address))};
  if (hosts[0] == "[::]" || hosts[0] == "0.0.0.0") hosts = own_addresses();
  const std::string port = fmt::format(":{}", port_of_listener(listener));
  return fmt::format("{}{}", fmt::join(hosts, port + ", "), port);
}

void send_at_once(int socket) {
  const int yes = 1;
  (void)setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
}

Connected connect_to_any(std::span<const TcpEndpoint> endpoints, Deadline deadline) {
  Connected result;
  for (std::size_t i = 0; i < endpoints.size(); ++i) {
    const auto now = std::chrono::steady_clock::now();
    const auto left = static_cast<std::int64_t>(endpoints.size() - i);
    FileDescriptor socket = new_socket(endpoints[i]);
    const int error =
        socket ? try_to_connect(socket.get(), endpoints[i], now + (deadline - now) / left) : errno;
    if (error == 0) {
      send_at_once(socket.get());
      return {std::move(socket), ""};
    }
    if (endpoints.size() > 1) {
      result.reason += fmt::format(
          "{}{} ", i == 0 ? "" : ", ",
          text_of(reinterpret_cast<const sockaddr*>(&endpoints[i].address), endpoints[i].size));
    }
    result.reason += std::strerror(error);
  }
  return result;
}

Connected connect_over_tcp(const std::string& address, Deadline deadline) {
  const Resolved resolved = resolve(parse_address(address), deadline);
  if (resolved.endpoints.empty()) return {{}, resolved.reason};
  return connect_to_any(resolved.endpoints, deadline);
}

}  // namespace sluice
