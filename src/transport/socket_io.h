// socket_io.h - whole messages, with file descriptors, over a Unix socket, each within a deadline.
#pragma once

#include <chrono>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "core/file_descriptor.h"

namespace sluice {

using Deadline = std::chrono::steady_clock::time_point;

enum class Io { kDone, kLate, kClosed };  ///< kClosed: the other end has gone, or broke off.

/// Most descriptors that go with one message.
inline constexpr std::size_t kMaxDescriptors = 64;

/// Sends all of `bytes`; `files` go with the first of them.
[[nodiscard]] Io send_all(int socket, std::span<const std::byte> bytes, Deadline deadline,
                          std::span<const int> files = {});

/// Receives exactly `bytes`; appends to `files` what came with them.
[[nodiscard]] Io receive_all(int socket, std::span<std::byte> bytes, Deadline deadline,
                             std::vector<FileDescriptor>* files = nullptr);

/// What one recvmsg gives without waiting: the number of bytes, 0 if none yet, -1 at the end.
[[nodiscard]] std::ptrdiff_t receive_some(int socket, std::span<std::byte> bytes,
                                          std::vector<FileDescriptor>* files);

/// Listens at, or connects to, a name that no file has and that vanishes with its owner.
/// Throws: kTransport with what the system said. Gives an empty one if the name is taken, or nobody
/// listens.
[[nodiscard]] FileDescriptor listen_at(const std::string& name);
[[nodiscard]] FileDescriptor connect_to(const std::string& name);

/// True if the process at the other end runs as this process's user.
[[nodiscard]] bool is_same_user(int socket);

/// Milliseconds to `deadline`, for poll(): at least 0, rounded up.
[[nodiscard]] int ms_until(Deadline deadline);

}  // namespace sluice
