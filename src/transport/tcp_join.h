// tcp_join.h - how a rank that is not 0 finds rank 0 over TCP and proves that it belongs.
#pragma once

#include "core/file_descriptor.h"
#include "sluice/network.h"
#include "transport/handshake.h"
#include "transport/socket_io.h"

namespace sluice {

/// Its number counts the layouts of the handshake's and of TcpChannel's messages.
inline constexpr Greeting kTcpGreeting{"sluice tcp 1"};
/// What the two sides call themselves in their proofs.
inline constexpr const char* kTcpHost = "tcp host";
inline constexpr const char* kTcpGuest = "tcp guest";

/// Tries the addresses in turn until rank 0 has accepted this rank; its connection.
/// Throws: kPeerTimeout naming rank 0, with what was found at each address; kTransport at once if
/// every address has refused this process, or is another program's.
[[nodiscard]] FileDescriptor join_over_tcp(const TcpConfig& config,
                                           std::chrono::milliseconds timeout);

/// "start of the tcp group on rank 1"
[[nodiscard]] std::string tcp_start_of(int rank);

}  // namespace sluice
