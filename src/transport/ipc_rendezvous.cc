#include "transport/ipc_rendezvous.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "core/fail.h"
#include "core/interruption.h"
#include "core/sha256.h"
#include "transport/handshake.h"
#include "transport/reception.h"
#include "transport/socket_io.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// Its number counts the layouts of the handshake's messages and of IpcBoard.
constexpr Greeting kGreeting{"sluice ipc 2"};
/// How much longer the others wait for rank 0, which knows who is missing.
constexpr milliseconds kGrace{500};
/// The longest time between two looks of rank 0 for ranks that want to join.
constexpr milliseconds kLookOut{100};

template <class T>
std::span<std::byte> bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

std::vector<int> ranks_not_joined(const IpcBoard& board, int num_ranks) {
  std::vector<int> missing;
  for (int r = 0; r < num_ranks; ++r) {
    if (board.members[r].joined == 0) missing.push_back(r);
  }
  return missing;
}

/// True if rank 0 has looked for ranks that want to join within the last kGrace.
bool rank_0_looks(const IpcBoard& board) {
  return Clock::now().time_since_epoch() - std::chrono::nanoseconds(board.last_look_ns) < kGrace;
}

std::pair<FileDescriptor, FileDescriptor> make_lifeline() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) fail(ErrorCode::kTransport, "pipe: {}", std::strerror(errno));
  return {FileDescriptor(ends[0]), FileDescriptor(ends[1])};
}

/// Where rank 0 waits for the others.
FileDescriptor open_door(const IpcConfig& config) {
  const std::string name = ipc_meeting_name(config.job);
  FileDescriptor door = listen_at(name);
  if (!door) {
    fail(ErrorCode::kTransport,
         "start of the ipc transport on rank 0: another process waits as rank 0 of a job of this "
         "name on this host (@{}): another job needs another name, with torchrun another "
         "MASTER_PORT, and a job has one rank 0",
         name);
  }
  return door;
}

/// Rank 0's side of the meeting.
class Host {
 public:
  Host(const IpcConfig& config, milliseconds timeout)
      : config_(config),
        timeout_(timeout),
        reception_(open_door(config), {.greeting = kGreeting,
                                       .secret = config.secret,
                                       .guest = "guest",
                                       .num_files = 1,
                                       .is_same_user = true}) {
    const auto ranks = static_cast<std::size_t>(config.num_ranks);
    membership_.memory = SharedMemory::create(sizeof(IpcBoard));
    membership_.board().members[0].joined = 1;
    membership_.sockets.resize(ranks), membership_.lifelines.resize(ranks);
    auto [reading, writing] = make_lifeline();
    membership_.lifelines[0] = std::move(reading), membership_.own_lifeline = std::move(writing);
  }

  IpcMembership meet() {
    const Deadline deadline = Clock::now() + timeout_;
    while (num_joined_ < config_.num_ranks) {
      // The clock first: who came while this process had no CPU has come in time.
      const auto now = Clock::now();
      const bool any = look(std::min(deadline, now + kLookOut));
      if (now >= deadline && (!any || now >= deadline + kGrace)) give_up();
    }
    welcome(deadline + kGrace);
    membership_.lifelines[0].reset();  // One's own end is no news.
    return std::move(membership_);
  }

 private:
  /// Hears who is there, until `deadline` if nobody is. False if nobody was.
  bool look(Deadline deadline) {
    membership_.board().last_look_ns =
        std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
    std::vector<pollfd> entries;
    deadline = reception_.add_to(entries, Interruption::next_look(deadline));
    const int num_ready = poll(entries.data(), entries.size(), ms_until(deadline));
    if (num_ready < 0 && errno != EINTR) {
      fail(ErrorCode::kTransport, "poll: {}", std::strerror(errno));
    }
    reception_.hear_all([this](Reception::Guest& guest) { take_in(guest); });
    Interruption::look();
    return num_ready > 0;
  }

  void take_in(Reception::Guest& guest) {
    const Join& join = guest.join;
    const auto r = static_cast<std::size_t>(join.rank);
    const bool is_taken = r < membership_.sockets.size() && membership_.sockets[r];
    const std::string difference = difference_of(join, config_.num_ranks, is_taken);
    Answer answer{};
    answer.kind = AnswerKind::kAccept;
    answer.proof =
        prove(config_.secret, "host", guest.nonce, join.nonce, join.rank, join.num_ranks);
    const int board = membership_.memory.file();
    if (send_all(guest.socket.get(), bytes_of(answer), Clock::now() + kGrace, {&board, 1}) !=
        Io::kDone) {
      return;  // Gone again; it will be missed.
    }
    if (!difference.empty()) {
      others_to_tell_.push_back(std::move(guest.socket));
      refuse({ErrorCode::kTransport, difference});
    }
    membership_.sockets[r] = std::move(guest.socket);
    membership_.lifelines[r] = std::move(guest.files[0]);
    membership_.board().members[r].joined = 1;
    ++num_joined_;
  }

  [[noreturn]] void give_up() {
    IpcBoard& board = membership_.board();
    std::vector<int> missing = ranks_not_joined(board, config_.num_ranks);
    for (const int r : ranks_ended(membership_)) {
      // One that gave up before rank 0 did has named the same ranks; it is missing for no other.
      if (board.members[r].blamed == 0) missing.push_back(r);
    }
    std::ranges::sort(missing);
    board.members[0].blamed = mask_of(missing);
    const std::string strangers =
        reception_.num_strangers() == 0
            ? ""
            : fmt::format("; {} connections of other programs were refused",
                          reception_.num_strangers());
    refuse({ErrorCode::kPeerTimeout,
            fmt::format("after {} ms still missing rank(s){}{}", timeout_.count(), list_of(missing),
                        strangers),
            missing});
  }

  void welcome(Deadline deadline) {
    std::vector<int> lifelines;
    for (const FileDescriptor& end : membership_.lifelines) lifelines.push_back(end.get());
    Answer answer{};
    answer.kind = AnswerKind::kWelcome;
    for (std::size_t r = 1; r < membership_.sockets.size(); ++r) {
      // A rank that ended since it joined is found by the first collective.
      (void)send_all(membership_.sockets[r].get(), bytes_of(answer), deadline, lifelines);
    }
  }

  [[noreturn]] void refuse(const Error& why) {
    Answer answer{};
    answer.kind = AnswerKind::kRefusal;
    std::strncpy(answer.text, why.what(), sizeof(answer.text) - 1);
    for (FileDescriptor& socket : membership_.sockets) others_to_tell_.push_back(std::move(socket));
    for (const FileDescriptor& socket : others_to_tell_) {
      if (socket) (void)send_all(socket.get(), bytes_of(answer), Clock::now() + kGrace);
    }
    fail_of_ranks(why.code(), why.ranks(), "start of the ipc transport on rank 0: {}", why.what());
  }

  const IpcConfig& config_;
  milliseconds timeout_;
  Reception reception_;
  IpcMembership membership_;
  std::vector<FileDescriptor> others_to_tell_;
  int num_joined_ = 1;
};

/// The other ranks' side.
class Visitor {
 public:
  Visitor(const IpcConfig& config, milliseconds timeout)
      : config_(config), timeout_(timeout), deadline_(Clock::now() + timeout) {}

  IpcMembership meet() {
    IpcMembership membership;
    auto [reading, writing] = make_lifeline();
    membership.own_lifeline = std::move(writing);
    FileDescriptor socket;
    do {
      if (Clock::now() >= deadline_) {
        fail_of_ranks(ErrorCode::kPeerTimeout, {0}, "{}: after {} ms still missing rank(s) 0{}",
                      place(), timeout_.count(),
                      was_closed_ ? ", which broke off: it ended or gave up" : "");
      }
      socket = try_to_join(reading.get(), membership);
      if (!socket) std::this_thread::sleep_for(milliseconds(5));
      Interruption::look();
    } while (!socket);
    reading.reset();
    Answer answer{};
    const Io io =
        receive_all(socket.get(), bytes_of(answer), deadline_ + kGrace, &membership.lifelines);
    if (io == Io::kLate) {
      // Whoever has not joined may well stand at the door of a rank 0 that has stopped.
      std::vector<int> missing = ranks_not_joined(membership.board(), config_.num_ranks);
      if (missing.empty() || !rank_0_looks(membership.board())) missing = {0};
      membership.board().members[config_.rank].blamed = mask_of(missing);
      fail_of_ranks(ErrorCode::kPeerTimeout, missing, "{}: after {} ms still missing rank(s){}",
                    place(), timeout_.count(), list_of(missing));
    }
    if (io == Io::kClosed) {
      fail_of_ranks(ErrorCode::kTransport, {0}, "{}: missing rank(s) 0, which broke off", place());
    }
    if (answer.kind == AnswerKind::kRefusal) throw_refusal(answer, membership);
    if (answer.kind != AnswerKind::kWelcome ||
        membership.lifelines.size() != static_cast<std::size_t>(config_.num_ranks)) {
      fail(ErrorCode::kTransport, "{}: rank 0 answered with {} and {} lifelines", place(),
           static_cast<unsigned>(answer.kind), membership.lifelines.size());
    }
    membership.lifelines[static_cast<std::size_t>(config_.rank)].reset();
    membership.sockets.push_back(std::move(socket));
    return membership;
  }

 private:
  /// An empty one if rank 0 does not listen yet, or left its door between two transports of the
  /// job.
  FileDescriptor try_to_join(int lifeline, IpcMembership& membership) {
    FileDescriptor socket = connect_to(ipc_meeting_name(config_.job));
    if (!socket) return {};
    if (!is_same_user(socket.get())) {
      fail(ErrorCode::kTransport, "{}: another user's process listens where rank 0 should",
           place());
    }
    Hello hello{};
    if (receive_all(socket.get(), bytes_of(hello), deadline_) != Io::kDone) return {};
    if (hello.greeting != kGreeting) {
      fail(ErrorCode::kTransport, "{}: another program listens where rank 0 should", place());
    }
    Join join = answer_to(hello, config_.secret, "guest", config_.rank, config_.num_ranks);
    if (send_all(socket.get(), bytes_of(join), deadline_, {&lifeline, 1}) != Io::kDone) return {};
    Answer answer{};
    std::vector<FileDescriptor> files;
    const Io io = receive_all(socket.get(), bytes_of(answer), deadline_, &files);
    if (io == Io::kClosed) {
      // Whom rank 0 does not want it sends away twice. One that ended is not there any more.
      if (!std::exchange(was_closed_, true)) return {};
      fail(ErrorCode::kTransport, "{}: rank 0 does not take this process for one of its job",
           place());
    }
    if (io == Io::kLate) return {};
    if (answer.kind != AnswerKind::kAccept || files.size() != 1 ||
        !same(answer.proof,
              prove(config_.secret, "host", hello.nonce, join.nonce, join.rank, join.num_ranks))) {
      fail(ErrorCode::kTransport, "{}: who listens as rank 0 does not know the job's secret",
           place());
    }
    membership.memory = SharedMemory(std::move(files[0]), sizeof(IpcBoard));
    return socket;
  }

  [[noreturn]] void throw_refusal(const Answer& answer, const IpcMembership& membership) const {
    const std::string why(answer.text, strnlen(answer.text, sizeof(answer.text)));
    if (!why.starts_with("after")) fail(ErrorCode::kTransport, "{}: {}", place(), why);
    fail_of_ranks(ErrorCode::kPeerTimeout, ranks_of(membership.board().members[0].blamed), "{}: {}",
                  place(), why);
  }

  std::string place() const {
    return fmt::format("start of the ipc transport on rank {}", config_.rank);
  }

  const IpcConfig& config_;
  milliseconds timeout_;
  Deadline deadline_;
  bool was_closed_ = false;  // In the middle of a handshake.
};

}  // namespace

std::uint64_t mask_of(const std::vector<int>& ranks) {
  std::uint64_t mask = 0;
  for (const int r : ranks) mask |= std::uint64_t{1} << r;
  return mask;
}

std::vector<int> ranks_of(std::uint64_t mask) {
  std::vector<int> ranks;
  for (; mask != 0; mask &= mask - 1) ranks.push_back(std::countr_zero(mask));
  return ranks;
}

std::vector<int> ranks_ended(const IpcMembership& membership) {
  std::vector<pollfd> entries;
  // An empty descriptor, one's own, is -1: poll() passes over it.
  for (const FileDescriptor& end : membership.lifelines) entries.push_back({end.get(), 0, 0});
  if (poll(entries.data(), entries.size(), 0) <= 0) return {};
  std::vector<int> ended;
  for (std::size_t r = 0; r < entries.size(); ++r) {
    const bool has_ended = (entries[r].revents & POLLHUP) != 0;
    if (has_ended && membership.board().members[r].left == 0) ended.push_back(static_cast<int>(r));
  }
  return ended;
}

std::string ipc_meeting_name(const std::string& job) {
  Sha256 hash;
  const std::string text = fmt::format("{}/{}", geteuid(), job);
  hash.update(std::as_bytes(std::span(text)));
  return "sluice-" + to_hex(hash.finish()).substr(0, 32);
}

IpcMembership meet_processes(const IpcConfig& config, milliseconds timeout) {
  check_argument(config.num_ranks >= 1 && config.num_ranks <= kMaxIpcRanks,
                 "num_ranks {} over ipc is not in [1, {}]", config.num_ranks, kMaxIpcRanks);
  check_argument(config.rank >= 0 && config.rank < config.num_ranks, "rank {} is not in [0, {})",
                 config.rank, config.num_ranks);
  check_argument(!config.job.empty(), "job '' names no meeting place");
  // The job's name proves no more than the user does, whom the system names: a launcher's default.
  if (config.secret != config.job) check_secret(config.secret, "secret");
  return config.rank == 0 ? Host(config, timeout).meet() : Visitor(config, timeout).meet();
}

}  // namespace sluice
