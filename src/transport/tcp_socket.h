// tcp_socket.h - listening and connecting at "host:port", each within a deadline.
#pragma once

#include <sys/socket.h>

#include <span>
#include <string>
#include <vector>

#include "core/file_descriptor.h"
#include "transport/socket_io.h"

namespace sluice {

struct TcpAddress {
  std::string host;  ///< A name, or an address of IPv4 or IPv6.
  std::string port;  ///< Decimal.
};

/// Of "host:port" or "[host]:port". Throws: kInvalidArgument with `text`.
[[nodiscard]] TcpAddress parse_address(const std::string& text);

/// Listens at an address of this host, or, for a name other than localhost, at every address of it:
/// the own name often stands for a loopback address on the host itself, where others do not come.
/// Port 0 takes one that is free.
/// Throws: kTransport with address and reason, for example that the port is taken.
[[nodiscard]] FileDescriptor listen_over_tcp(const std::string& address, Deadline deadline);

/// Listens at every address of this host, over IPv6 too where it has that. Throws: as above.
[[nodiscard]] FileDescriptor listen_everywhere(int port);

/// The port that `socket` listens at. Throws: kInvalidArgument if it does not listen over TCP.
[[nodiscard]] int port_of_listener(int socket);
/// Where that is, for messages: "10.1.2.3:29501, 127.0.0.1:29501" of one at every address.
/// Throws: as above.
[[nodiscard]] std::string reachable_at(int listener);

/// This host's, as they stand before a port: those that other hosts can reach, and then loopback
/// ones. Of interfaces that are up; none, with errno, if the system does not say.
[[nodiscard]] std::vector<std::string> own_addresses();

/// Words that leave `socket` do not wait for an answer to earlier ones.
void send_at_once(int socket);

/// One of the addresses that a name stands for.
struct TcpEndpoint {
  sockaddr_storage address{};
  socklen_t size = 0;
};

struct Connected {
  FileDescriptor socket;  ///< Empty if nobody listens there.
  std::string reason;     ///< Then; of each address, where there are several.
};
/// Tries one after the other. None keeps the others waiting for longer than its share of the time
/// that is left, and one whose kind the system does not have is passed over.
[[nodiscard]] Connected connect_to_any(std::span<const TcpEndpoint> endpoints, Deadline deadline);

/// The same, of the addresses that the host stands for. Nobody there is no error: the listener may
/// be about to come.
/// Throws: kInvalidArgument if `address` is none.
[[nodiscard]] Connected connect_over_tcp(const std::string& address, Deadline deadline);

}  // namespace sluice
