// tcp_socket.h - listening and connecting at "host:port", each within a deadline.
#pragma once

#include <string>

#include "core/file_descriptor.h"
#include "transport/socket_io.h"

namespace sluice {

struct TcpAddress {
  std::string host;  ///< A name, or an address of IPv4 or IPv6.
  std::string port;  ///< Decimal.
};

/// Of "host:port" or "[host]:port". Throws: kInvalidArgument with `text`.
[[nodiscard]] TcpAddress parse_address(const std::string& text);

/// Listens at an address of this host. Port 0 takes one that is free.
/// Throws: kTransport with address and reason, for example that the port is taken.
[[nodiscard]] FileDescriptor listen_over_tcp(const std::string& address, Deadline deadline);

/// The port that `socket` listens at. Throws: kInvalidArgument if it does not listen over TCP.
[[nodiscard]] int port_of_listener(int socket);

/// Words that leave `socket` do not wait for an answer to earlier ones.
void send_at_once(int socket);

struct Connected {
  FileDescriptor socket;  ///< Empty if nobody listens there.
  std::string reason;     ///< Then.
};
/// Nobody at the address is no error: the listener may be about to come.
/// Throws: kInvalidArgument if `address` is none.
[[nodiscard]] Connected connect_over_tcp(const std::string& address, Deadline deadline);

}  // namespace sluice
