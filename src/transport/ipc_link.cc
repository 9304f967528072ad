#include "transport/ipc_link.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/fail.h"
#include "core/interruption.h"
#include "transport/parts.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// How much longer the others wait for rank 0, which sees more.
constexpr milliseconds kGrace{500};

/// Before a part, over the socket.
struct Header {
  std::uint64_t number, bytes;
};

/// What has arrived of one rank's part.
class IncomingPart {
 public:
  [[nodiscard]] bool is_complete() const noexcept {
    return num_received_ == sizeof(Header) + header_.bytes;
  }
  /// Takes what is there. False if the sender has closed `socket`.
  [[nodiscard]] bool take(int socket) {
    while (!is_complete()) {
      const bool in_header = num_received_ < sizeof(Header);
      const std::span<std::byte> to =
          in_header ? std::as_writable_bytes(std::span(&header_, 1)).subspan(num_received_)
                    : std::span(bytes_).subspan(num_received_ - sizeof(Header));
      const std::ptrdiff_t received = receive_some(socket, to, nullptr);
      if (received <= 0) return received == 0;
      num_received_ += static_cast<std::size_t>(received);
      if (in_header && num_received_ == sizeof(Header)) bytes_.resize(header_.bytes);
    }
    return true;
  }
  [[nodiscard]] std::vector<std::byte> move_bytes(std::uint64_t number) {
    SLUICE_ASSERT(num_received_ == 0 || header_.number == number);
    return std::move(bytes_);
  }

 private:
  Header header_{0, 0};
  std::vector<std::byte> bytes_;
  std::size_t num_received_ = 0;
};

}  // namespace

IpcLink::IpcLink(const IpcConfig& config, milliseconds timeout)
    : rank_(config.rank),
      num_ranks_(config.num_ranks),
      membership_(meet_processes(config, timeout)),
      lifeline_({membership_.own_lifeline.get()}),
      sockets_(sockets()) {}

IpcLink::~IpcLink() {
  if (home_.is_here()) board().members[rank_].left = 1;
}

bool IpcLink::is_gone(int rank) const {
  if (rank == rank_) return false;
  pollfd entry{membership_.lifelines[static_cast<std::size_t>(rank)].get(), 0, 0};
  return board().members[rank].left != 0 || (poll(&entry, 1, 0) > 0 && (entry.revents & POLLHUP));
}

std::vector<int> IpcLink::sockets() const {
  std::vector<int> all;
  for (const FileDescriptor& socket : membership_.sockets) all.push_back(socket.get());
  return all;
}

void IpcLink::send(int peer, std::span<const std::byte> bytes, Deadline deadline, int file) {
  const Header header{number_, bytes.size()};
  const std::span<const int> files(&file, file >= 0 ? 1 : 0);
  const int socket = membership_.sockets[static_cast<std::size_t>(peer)].get();
  Io io = send_all(socket, std::as_bytes(std::span(&header, 1)), deadline, files);
  if (io == Io::kDone) io = send_all(socket, bytes, deadline);
  if (io != Io::kDone) throw Failed{io, {peer}};
}

/// What rank 0 passes on.
std::vector<std::byte> IpcLink::receive(Deadline deadline, std::vector<FileDescriptor>* files) {
  const int socket = membership_.sockets[0].get();
  Header header{};
  Io io = receive_all(socket, std::as_writable_bytes(std::span(&header, 1)), deadline, files);
  if (io != Io::kDone) throw Failed{io, {0}};
  // One socket carries one rank's collectives in order, so a number can only be this one's.
  SLUICE_ASSERT(header.number == number_);
  std::vector<std::byte> bytes(header.bytes);
  io = receive_all(socket, bytes, deadline);
  if (io != Io::kDone) throw Failed{io, {0}};
  return bytes;
}

/// Rank 0: the part of every other rank, in whatever order they come, so that one that breaks off
/// is noticed at once, whoever else is late.
std::vector<std::vector<std::byte>> IpcLink::receive_parts(Deadline deadline) {
  std::vector<IncomingPart> incoming(membership_.sockets.size());
  std::vector<pollfd> entries(incoming.size());
  for (;;) {
    std::vector<int> awaited;
    for (std::size_t r = 1; r < incoming.size(); ++r) {
      const bool is_complete = incoming[r].is_complete();
      if (!is_complete) awaited.push_back(static_cast<int>(r));
      // Of a rank whose part is here, poll() still reports that it broke off.
      entries[r] = {membership_.sockets[r].get(), static_cast<short>(is_complete ? 0 : POLLIN), 0};
    }
    if (awaited.empty()) break;
    entries[0] = {-1, 0, 0};  // Passed over.
    const Deadline until = Interruption::next_look(deadline);
    const int num_ready = poll(entries.data(), entries.size(), ms_until(until));
    if (num_ready < 0 && errno != EINTR) {
      fail(ErrorCode::kTransport, "poll: {}", std::strerror(errno));
    }
    if (num_ready == 0 && until == deadline) throw Failed{Io::kLate, awaited};
    Interruption::look();
    for (std::size_t r = 1; num_ready > 0 && r < incoming.size(); ++r) {
      if (entries[r].revents == 0) continue;
      if (incoming[r].is_complete() || !incoming[r].take(entries[r].fd)) {
        throw Failed{Io::kClosed, {static_cast<int>(r)}};
      }
    }
  }
  std::vector<std::vector<std::byte>> parts;
  for (IncomingPart& part : incoming) parts.push_back(part.move_bytes(number_));
  return parts;
}

/// Rank 0's side: every rank's bytes, and then all of them to every rank.
std::vector<std::byte> IpcLink::collect(std::span<const std::byte> mine, Deadline deadline,
                                        int file) {
  auto parts = receive_parts(deadline);
  parts[0].assign(mine.begin(), mine.end());
  std::vector<std::byte> all = pack(parts);
  for (int r = 1; r < num_ranks_; ++r) send(r, all, deadline + kGrace, file);
  return all;
}

/// The timeout has passed: missing is who has not come, and any process that has ended.
IpcLink::Blame IpcLink::blame_for_delay(const Failed& failed, milliseconds timeout) const {
  std::vector<int> late;
  const char* what = "";
  if (rank_ == 0) {
    late = failed.ranks;
    const auto came = [this](int r) { return board().members[r].arrived.load() >= number_; };
    if (std::ranges::all_of(late, came)) what = ", which came but does not answer any more";
  } else {
    for (int r = 0; r < num_ranks_; ++r) {
      if (board().members[r].arrived.load() < number_) late.push_back(r);
    }
    if (late.empty()) late = {0}, what = ", which has not passed on what all ranks gave";
  }
  const std::vector<int> ended = lost_ranks();
  const std::uint64_t all = mask_of(late) | mask_of(ended);
  std::string text = fmt::format("after {} ms still missing rank(s){}{}", timeout.count(),
                                 list_of(ranks_of(all)), what);
  if (!ended.empty()) text += fmt::format("; the process of rank(s){} has ended", list_of(ended));
  return {Absence::kLate, ranks_of(all), std::move(text)};
}

/// `rank` has closed its socket before the timeout. It may have given up because of others.
IpcLink::Blame IpcLink::blame_for_break(int rank) const {
  const IpcBoard::Member& member = board().members[rank];
  const std::uint64_t self = std::uint64_t{1} << rank_;
  const auto missing = [](Absence why, std::uint64_t mask,
                          const std::string& before = "") -> Blame {
    const char* const what = why == Absence::kEnded     ? "whose process has ended"
                             : why == Absence::kLeft    ? "which left before this collective"
                             : why == Absence::kStopped ? "whose call was interrupted"
                                                        : "which did not come in time";
    const std::vector<int> ranks = ranks_of(mask);
    return {why, ranks, fmt::format("{}missing rank(s){}, {}", before, list_of(ranks), what)};
  };
  if (const std::uint64_t blamed = member.blamed.load(); blamed != 0) {
    const auto before = fmt::format("rank {} gave up; ", rank);
    if ((blamed & ~self) != 0) return missing(member.blamed_for.load(), blamed & ~self, before);
    return {
        Absence::kLate, {rank}, fmt::format("missing rank(s) {}, which gave up this rank", rank)};
  }
  std::uint64_t ended = mask_of(lost_ranks()), left = 0;
  // Sockets are closed by leaving, by giving up, and by the end of a process. Its lifeline may
  // be closed a moment later.
  if (member.left.load() == 0) ended |= std::uint64_t{1} << rank;
  if (ended != 0) return missing(Absence::kEnded, ended);
  for (int r = 0; r < num_ranks_; ++r) {
    const bool has_left = board().members[r].left.load() != 0;
    if (has_left && board().members[r].arrived.load() < number_) left |= std::uint64_t{1} << r;
  }
  return missing(Absence::kLeft, left | std::uint64_t{1} << rank);
}

void IpcLink::give_up(const Failed& failed, milliseconds timeout) {
  const Blame blame =
      failed.io == Io::kLate ? blame_for_delay(failed, timeout) : blame_for_break(failed.ranks[0]);
  break_off(blame, blame.why == Absence::kEnded ? ErrorCode::kTransport : ErrorCode::kPeerTimeout);
}

void IpcLink::break_off(const Blame& blame, ErrorCode code) {
  board().members[rank_].blamed_for = blame.why;
  board().members[rank_].blamed = mask_of(blame.ranks);
  sockets_.clear();
  membership_.sockets.clear();  // So that nobody waits for this rank.
  // Whoever interrupted it is no peer.
  failure_.emplace(
      code, fmt::format("{} number {} on rank {}: {}", operation_, number_ - 1, rank_, blame.text),
      code == ErrorCode::kInterrupted ? std::vector<int>{} : blame.ranks);
  throw *failure_;
}

IpcLink::Gathered IpcLink::gather(std::span<const std::byte> mine, const char* operation,
                                  milliseconds timeout, int file) {
  if (failure_) {
    fail_of_ranks(ErrorCode::kTransport, failure_->ranks(), "this transport failed earlier: {}",
                  failure_->what());
  }
  home_.require("transport ipc");
  number_ += 1;
  operation_ = operation;
  board().members[rank_].arrived = number_;
  const Deadline deadline = Clock::now() + timeout;
  try {
    if (rank_ == 0) return {unpack(collect(mine, deadline, file), num_ranks_), {}};
    send(0, mine, deadline, -1);
    std::vector<FileDescriptor> files;
    const auto all = receive(deadline + kGrace, &files);
    return {unpack(all, num_ranks_), files.empty() ? FileDescriptor() : std::move(files[0])};
  } catch (const Failed& failed) {
    give_up(failed, timeout);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kInterrupted) throw;
    break_off({Absence::kStopped, {rank_}, error.what()}, error.code());
  }
}

}  // namespace sluice
