#include "transport/ipc_link.h"

#include <poll.h>

#include <cstring>

#include "core/fail.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// How much longer the others wait for rank 0, which sees more.
constexpr milliseconds kGrace{500};

/// A failed step, inside the link only.
struct Failed {
  Io io;
};

void append(std::vector<std::byte>& to, std::span<const std::byte> bytes) {
  to.insert(to.end(), bytes.begin(), bytes.end());
}

/// All parts as one message: a size before each.
std::vector<std::byte> pack(const std::vector<std::vector<std::byte>>& parts) {
  std::vector<std::byte> all;
  for (const auto& part : parts) {
    const std::uint64_t size = part.size();
    append(all, std::as_bytes(std::span(&size, 1)));
    append(all, part);
  }
  return all;
}

std::vector<std::vector<std::byte>> unpack(std::span<const std::byte> all, int num_parts) {
  std::vector<std::vector<std::byte>> parts;
  for (int r = 0; r < num_parts; ++r) {
    std::uint64_t size = 0;
    SLUICE_ASSERT(all.size() >= sizeof(size));
    std::memcpy(&size, all.data(), sizeof(size));
    all = all.subspan(sizeof(size));
    SLUICE_ASSERT(all.size() >= size);
    parts.emplace_back(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(size));
    all = all.subspan(size);
  }
  return parts;
}

}  // namespace

IpcLink::IpcLink(const IpcConfig& config, milliseconds timeout)
    : rank_(config.rank),
      num_ranks_(config.num_ranks),
      membership_(meet_processes(config, timeout)) {}

IpcLink::~IpcLink() {
  board().members[rank_].left = 1;
}

std::vector<int> IpcLink::lost_ranks() const {
  std::vector<pollfd> entries;
  // An empty descriptor, one's own, is -1: poll() passes over it.
  for (const FileDescriptor& end : membership_.lifelines) entries.push_back({end.get(), 0, 0});
  if (poll(entries.data(), entries.size(), 0) <= 0) return {};
  std::vector<int> lost;
  for (int r = 0; r < num_ranks_; ++r) {
    const bool has_ended = (entries[static_cast<std::size_t>(r)].revents & POLLHUP) != 0;
    if (has_ended && board().members[r].left == 0) lost.push_back(r);
  }
  return lost;
}

bool IpcLink::is_gone(int rank) const {
  if (rank == rank_) return false;
  pollfd entry{membership_.lifelines[static_cast<std::size_t>(rank)].get(), 0, 0};
  return board().members[rank].left != 0 || (poll(&entry, 1, 0) > 0 && (entry.revents & POLLHUP));
}

void IpcLink::send(int socket, std::span<const std::byte> bytes, Deadline deadline, int file) {
  const Header header{number_, bytes.size()};
  const std::span<const int> files(&file, file >= 0 ? 1 : 0);
  Io io = send_all(socket, std::as_bytes(std::span(&header, 1)), deadline, files);
  if (io == Io::kDone) io = send_all(socket, bytes, deadline);
  if (io != Io::kDone) throw Failed{io};
}

std::vector<std::byte> IpcLink::receive(int socket, Deadline deadline,
                                        std::vector<FileDescriptor>* files) {
  Header header{};
  Io io = receive_all(socket, std::as_writable_bytes(std::span(&header, 1)), deadline, files);
  if (io != Io::kDone) throw Failed{io};
  // One socket carries one rank's collectives in order, so a number can only be this one's.
  SLUICE_ASSERT(header.number == number_);
  std::vector<std::byte> bytes(header.bytes);
  io = receive_all(socket, bytes, deadline);
  if (io != Io::kDone) throw Failed{io};
  return bytes;
}

/// Rank 0's part: every rank's bytes, and then all of them to every rank.
std::vector<std::byte> IpcLink::collect(std::span<const std::byte> mine, Deadline deadline,
                                        int file) {
  std::vector<std::vector<std::byte>> parts(static_cast<std::size_t>(num_ranks_));
  parts[0].assign(mine.begin(), mine.end());
  for (std::size_t r = 1; r < parts.size(); ++r) {
    parts[r] = receive(membership_.sockets[r].get(), deadline, nullptr);
  }
  std::vector<std::byte> all = pack(parts);
  for (std::size_t r = 1; r < parts.size(); ++r) {
    send(membership_.sockets[r].get(), all, deadline + kGrace, file);
  }
  return all;
}

void IpcLink::give_up(Io io, milliseconds timeout) {
  std::vector<int> late;
  for (int r = 0; r < num_ranks_; ++r) {
    if (board().members[r].arrived.load() < number_) late.push_back(r);
  }
  const std::vector<int> lost = lost_ranks();
  const bool is_known = !late.empty();
  if (!is_known) late.push_back(0);  // Which has not passed on what all gave.
  const auto start = fmt::format("{} number {} on rank {}", operation_, number_ - 1, rank_);
  const auto text =
      !lost.empty()
          ? fmt::format("{}: missing rank(s){}, whose process has ended", start, list_of(lost))
      : io == Io::kLate
          ? fmt::format("{}: after {} ms still missing rank(s){}{}", start, timeout.count(),
                        list_of(late),
                        is_known ? "" : ", which has not passed on what all ranks gave")
          : fmt::format("{}: others left or gave up; still missing rank(s){}", start,
                        list_of(late));
  failure_ = lost.empty() ? Error(ErrorCode::kPeerTimeout, text, late)
                          : Error(ErrorCode::kTransport, text, lost);
  membership_.sockets.clear();  // So that nobody waits for this rank.
  throw *failure_;
}

IpcLink::Gathered IpcLink::gather(std::span<const std::byte> mine, const char* operation,
                                  milliseconds timeout, int file) {
  if (failure_) {
    fail_of_ranks(ErrorCode::kTransport, failure_->ranks(), "this transport failed earlier: {}",
                  failure_->what());
  }
  number_ += 1;
  operation_ = operation;
  board().members[rank_].arrived = number_;
  const Deadline deadline = Clock::now() + timeout;
  try {
    if (rank_ == 0) return {unpack(collect(mine, deadline, file), num_ranks_), {}};
    const int hub = membership_.sockets[0].get();
    send(hub, mine, deadline, -1);
    std::vector<FileDescriptor> files;
    const auto all = receive(hub, deadline + kGrace, &files);
    return {unpack(all, num_ranks_), files.empty() ? FileDescriptor() : std::move(files[0])};
  } catch (const Failed& failed) {
    give_up(failed.io, timeout);
  }
}

}  // namespace sluice
