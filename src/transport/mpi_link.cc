#include "transport/mpi_link.h"

#include <mpi.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#include "core/fail.h"
#include "sluice/config.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using Bytes = std::vector<std::byte>;

/// Every call of MPI goes through here.
void check_mpi(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(status, text, &length) != MPI_SUCCESS) length = 0;
  fail(ErrorCode::kTransport, "{}: {}", call,
       std::string_view(text, static_cast<std::size_t>(length)));
}
#define SLUICE_MPI(function, ...) check_mpi(function(__VA_ARGS__), #function)

constexpr int kHelloTag = 20941, kFrameTag = 20942;
/// Frames on their way to one peer, 4 MiB: enough to cover a receiver that computes for a while.
constexpr std::size_t kMaxInFlight = 32;

/// Polls often at first, then sleeps: a rank that waits long leaves the core to the others.
class Backoff {
 public:
  void pause() {
    if (++rounds_ < 50) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(rounds_ < 500 ? 20 : 200));
    }
  }
  void reset() noexcept { rounds_ = 0; }

 private:
  int rounds_ = 0;
};

/// True once `request` is complete; bounded.
bool complete_by(MPI_Request& request, Clock::time_point deadline) {
  Backoff backoff;
  for (int done = 0;;) {
    SLUICE_MPI(MPI_Test, &request, &done, MPI_STATUS_IGNORE);
    if (done) return true;
    if (Clock::now() >= deadline) return false;
    backoff.pause();
  }
}

struct MpiHello {
  char text[64] = {};
};

/// Each process sends its version to all and hears all. Throws: kPeerTimeout naming the missing.
void roll_call(int rank, int num_ranks, milliseconds timeout, const char* operation) {
  const auto deadline = Clock::now() + timeout;
  // Left to MPI when somebody is missing: it may still write there.
  auto heard = std::make_unique<std::vector<MpiHello>>(static_cast<std::size_t>(num_ranks));
  auto mine = std::make_unique<MpiHello>();
  fmt::format_to_n(mine->text, sizeof(mine->text) - 1, "sluice {}", version());
  std::vector<MPI_Request> in(heard->size(), MPI_REQUEST_NULL), out = in;
  for (int r = 0; r < num_ranks; ++r) {
    if (r == rank) continue;
    const auto i = static_cast<std::size_t>(r);
    SLUICE_MPI(MPI_Irecv, (*heard)[i].text, sizeof(MpiHello), MPI_BYTE, r, kHelloTag,
               MPI_COMM_WORLD, &in[i]);
    SLUICE_MPI(MPI_Isend, mine->text, sizeof(MpiHello), MPI_BYTE, r, kHelloTag, MPI_COMM_WORLD,
               &out[i]);
  }
  std::vector<int> missing;
  for (std::size_t r = 0; r < in.size(); ++r) {
    if (complete_by(in[r], deadline) && complete_by(out[r], deadline)) continue;
    missing.push_back(static_cast<int>(r));
  }
  if (!missing.empty()) {
    (void)heard.release();
    (void)mine.release();
    fail_of_ranks(ErrorCode::kPeerTimeout, missing,
                  "{} on rank {}: after {} ms still missing rank(s){}", operation, rank,
                  timeout.count(), list_of(missing));
  }
  (*heard)[static_cast<std::size_t>(rank)] = *mine;
  for (std::size_t r = 0; r < heard->size(); ++r) {
    const MpiHello& theirs = (*heard)[r];
    if (std::memcmp(&theirs, mine.get(), sizeof(MpiHello)) == 0) continue;
    fail(ErrorCode::kTransport, "ranks disagree on version: rank {} has '{}', rank {} has '{}'",
         rank, mine->text, r, std::string(theirs.text, strnlen(theirs.text, sizeof(theirs.text))));
  }
}

struct Sending {
  MPI_Request request = MPI_REQUEST_NULL;
  Bytes bytes;
};
struct Receiving {
  MPI_Request request = MPI_REQUEST_NULL;
  Bytes bytes;
  std::size_t size = 0;
};

/// Both directions of one pair of processes.
struct Peer {
  FrameWriter open;
  std::deque<Sending> sending;      // In order; MPI completes them in any.
  std::deque<Receiving> receiving;  // In order of arrival; applied in it.
  std::uint64_t next_sent = 0, next_received = 0;
  bool said_goodbye = false;
};

struct Share {
  Bytes bytes;
  std::uint64_t arrived = 0;
};

}  // namespace

struct MpiLink::Impl {
  int rank = 0, num_ranks = 0;
  bool owns_mpi = false;
  MPI_Comm comm = MPI_COMM_NULL;

  std::mutex mutex;  // Everything below, and every call of MPI.
  std::vector<Peer> peers;
  std::vector<Bytes> spare;
  std::map<std::pair<std::uint16_t, std::uint32_t>, std::shared_ptr<WindowMemory>> windows;
  std::map<std::tuple<std::uint16_t, std::uint32_t, int>, Share> shares;
  std::uint32_t num_groups = 0;
  std::string failure;  // First fatal error, empty while healthy.

  std::condition_variable stopping;
  bool stop = false;
  std::thread thread;

  void start(milliseconds timeout);
  void look_in();
  void stop_thread();
  bool pump();
  bool receive();
  bool pump_peer(int source);
  void apply(int source, const Record& record, std::span<const std::byte> payload);
  void require_healthy() const;
  void ship(std::unique_lock<std::mutex>& lock, int peer, milliseconds timeout);
  [[nodiscard]] bool all_sent() const;
  [[nodiscard]] Bytes take_spare();
  [[nodiscard]] Peer& peer(int r) { return peers[static_cast<std::size_t>(r)]; }
};

void MpiLink::Impl::start(milliseconds timeout) {
  int running = 0, ended = 0, level = 0;
  SLUICE_MPI(MPI_Finalized, &ended);
  if (ended) fail(ErrorCode::kUnsupported, "MPI has been finalized and cannot be started again");
  SLUICE_MPI(MPI_Initialized, &running);
  if (running) {
    SLUICE_MPI(MPI_Query_thread, &level);
  } else {
    SLUICE_MPI(MPI_Init_thread, nullptr, nullptr, MPI_THREAD_SERIALIZED, &level);
    owns_mpi = true;
  }
  if (level < MPI_THREAD_SERIALIZED) {
    fail(ErrorCode::kUnsupported,
         "MPI runs with thread level {}, the transport needs MPI_THREAD_SERIALIZED ({})", level,
         static_cast<int>(MPI_THREAD_SERIALIZED));
  }
  SLUICE_MPI(MPI_Comm_set_errhandler, MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  SLUICE_MPI(MPI_Comm_rank, MPI_COMM_WORLD, &rank);
  SLUICE_MPI(MPI_Comm_size, MPI_COMM_WORLD, &num_ranks);
  roll_call(rank, num_ranks, timeout, "start of the MPI transport");
  // A communicator of our own, so that the program's messages and ours cannot meet.
  MPI_Request request = MPI_REQUEST_NULL;
  SLUICE_MPI(MPI_Comm_idup, MPI_COMM_WORLD, &comm, &request);
  if (!complete_by(request, Clock::now() + timeout)) {
    roll_call(rank, num_ranks, milliseconds(500), "second roll call of the MPI transport");
    fail(ErrorCode::kPeerTimeout, "MPI_Comm_idup on rank {}: not complete after {} ms", rank,
         timeout.count());
  }
  SLUICE_MPI(MPI_Comm_set_errhandler, comm, MPI_ERRORS_RETURN);
  peers = std::vector<Peer>(static_cast<std::size_t>(num_ranks));
  thread = std::thread([this] { look_in(); });
}

/// Receives and completes sends while the rank is busy elsewhere.
void MpiLink::Impl::look_in() {
  std::unique_lock lock(mutex);
  while (!stop) {
    bool busy = false;
    try {
      busy = failure.empty() && pump();
    } catch (const Error&) {
      busy = false;  // The rank's own thread will throw it.
    }
    stopping.wait_for(lock, std::chrono::microseconds(busy ? 100 : 1000), [&] { return stop; });
  }
}

void MpiLink::Impl::stop_thread() {
  {
    const std::lock_guard lock(mutex);
    stop = true;
  }
  stopping.notify_all();
  if (thread.joinable()) thread.join();
}

Bytes MpiLink::Impl::take_spare() {
  if (spare.empty()) {
    Bytes bytes;
    bytes.reserve(kFrameBytes);
    return bytes;
  }
  Bytes bytes = std::move(spare.back());
  spare.pop_back();
  return bytes;
}

/// Does what can be done without waiting; true if anything was. What goes wrong stays wrong.
bool MpiLink::Impl::pump() {
  try {
    bool any = receive();
    for (int source = 0; source < num_ranks; ++source) any |= pump_peer(source);
    return any;
  } catch (const Error& error) {
    if (failure.empty()) failure = error.what();
    throw;
  }
}

/// Takes note of every message that has begun to arrive.
bool MpiLink::Impl::receive() {
  bool any = false;
  for (int found = 1; found != 0;) {
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    SLUICE_MPI(MPI_Improbe, MPI_ANY_SOURCE, kFrameTag, comm, &found, &message, &status);
    if (!found) break;
    int size = 0;
    SLUICE_MPI(MPI_Get_count, &status, MPI_BYTE, &size);
    if (size < 0 || static_cast<std::size_t>(size) > kFrameBytes) {
      fail(ErrorCode::kTransport, "a message of {} bytes from rank {}; none is larger than {}",
           size, status.MPI_SOURCE, kFrameBytes);
    }
    Receiving& next = peer(status.MPI_SOURCE).receiving.emplace_back();
    next.bytes = take_spare();
    next.bytes.resize(kFrameBytes);
    next.size = static_cast<std::size_t>(size);
    SLUICE_MPI(MPI_Imrecv, next.bytes.data(), size, MPI_BYTE, &message, &next.request);
    any = true;
  }
  return any;
}

bool MpiLink::Impl::pump_peer(int source) {
  Peer& p = peer(source);
  bool any = false;
  for (int done = 1; !p.sending.empty(); any = true) {
    const int status = MPI_Test(&p.sending.front().request, &done, MPI_STATUS_IGNORE);
    // One that said goodbye need not take what was still on its way.
    if (status != MPI_SUCCESS && !p.said_goodbye) {
      check_mpi(status, fmt::format("sending to rank {}", source).c_str());
    }
    if (status == MPI_SUCCESS && !done) break;
    spare.push_back(std::move(p.sending.front().bytes));
    p.sending.pop_front();
  }
  for (int done = 1; !p.receiving.empty(); any = true) {
    Receiving& first = p.receiving.front();
    check_mpi(MPI_Test(&first.request, &done, MPI_STATUS_IGNORE),
              fmt::format("receiving from rank {}", source).c_str());
    if (!done) break;
    const std::string wrong =
        read_frame(std::span(first.bytes).first(first.size), p.next_received++,
                   [&](const Record& record, std::span<const std::byte> payload) {
                     apply(source, record, payload);
                   });
    if (!wrong.empty()) fail(ErrorCode::kTransport, "from rank {}: {}", source, wrong);
    spare.push_back(std::move(first.bytes));
    p.receiving.pop_front();
  }
  return any;
}

void MpiLink::Impl::apply(int source, const Record& record, std::span<const std::byte> payload) {
  if (record.kind == RecordKind::kGoodbye) {
    peer(source).said_goodbye = true;
    return;
  }
  if (record.kind == RecordKind::kPart) {
    Share& share = shares[{record.group, record.object, source}];
    if (record.at != share.arrived || payload.size() > record.total - record.at) {
      fail(ErrorCode::kTransport, "from rank {}: part at {} of gather {}, expected at {} of {}",
           source, record.at, record.object, share.arrived, record.total);
    }
    share.bytes.resize(record.total);
    if (!payload.empty()) std::memcpy(&share.bytes[record.at], payload.data(), payload.size());
    share.arrived += payload.size();
    return;
  }
  const auto found = windows.find({record.group, record.object});
  if (found == windows.end()) return;  // Closed here already: nobody reads it any more.
  WindowMemory& window = *found->second;
  if (record.kind == RecordKind::kPut) {
    if (record.at > window.bytes || payload.size() > window.bytes - record.at) {
      fail(ErrorCode::kTransport, "from rank {}: put of {} bytes at {} of a window of {}", source,
           payload.size(), record.at, window.bytes);
    }
    std::memcpy(window.pages.data() + record.at, payload.data(), payload.size());
  } else if (record.kind == RecordKind::kSignal && record.flag < window.flags.size()) {
    // Flags only grow: a signal that comes twice does not take back a later one.
    auto& flag = window.flags[record.flag];
    if (record.at > flag.load(std::memory_order_relaxed)) {
      flag.store(record.at, std::memory_order_release);
    }
  } else {
    fail(ErrorCode::kTransport, "from rank {}: record of kind {}, flag {} for a window with {}",
         source, static_cast<int>(record.kind), record.flag, window.flags.size());
  }
}

void MpiLink::Impl::require_healthy() const {
  if (!failure.empty()) fail(ErrorCode::kTransport, "{}", failure);
}

void MpiLink::Impl::ship(std::unique_lock<std::mutex>& lock, int to, milliseconds timeout) {
  require_healthy();
  Peer& p = peer(to);
  if (p.open.empty()) return;
  Backoff backoff;
  for (const auto deadline = Clock::now() + timeout; p.sending.size() >= kMaxInFlight;) {
    if (pump()) backoff.reset();
    if (p.sending.size() < kMaxInFlight) break;
    if (Clock::now() >= deadline) {
      fail_of_ranks(
          ErrorCode::kPeerTimeout, {to},
          "sending on rank {}: after {} ms {} messages to rank {} are still under way; missing "
          "rank(s) {}",
          rank, timeout.count(), p.sending.size(), to, to);
    }
    lock.unlock();
    backoff.pause();
    lock.lock();
  }
  Sending& sending = p.sending.emplace_back();
  sending.bytes = p.open.seal(p.next_sent++, take_spare());
  SLUICE_MPI(MPI_Isend, sending.bytes.data(), static_cast<int>(sending.bytes.size()), MPI_BYTE, to,
             kFrameTag, comm, &sending.request);
}

bool MpiLink::Impl::all_sent() const {
  for (const Peer& p : peers) {
    if (!p.sending.empty()) return false;
  }
  return true;
}

namespace {
std::unique_ptr<MpiLink>& the_link() {
  static std::unique_ptr<MpiLink> link;
  return link;
}
}  // namespace

MpiLink::MpiLink(milliseconds timeout) : impl_(std::make_unique<Impl>()) {
  impl_->start(timeout);
}

MpiLink::~MpiLink() {
  impl_->stop_thread();
  // MPI may still read and write the buffers of messages under way to or from a rank that is gone.
  if (!impl_->all_sent()) (void)impl_.release();
}

MpiLink& MpiLink::open(milliseconds timeout) {
  auto& link = the_link();
  if (!link) link.reset(new MpiLink(timeout));
  return *link;
}

bool MpiLink::end(milliseconds timeout) {
  auto& link = the_link();
  if (!link) return true;
  Impl& impl = *link->impl_;
  bool all = false;
  try {
    for (int r = 0; r < impl.num_ranks; ++r) {
      link->send(r, {.kind = RecordKind::kGoodbye}, {}, timeout);
      link->ship(r, timeout);
    }
    all = link->wait_until(Clock::now() + timeout, [&] {
      for (const Peer& p : impl.peers) {
        if (!p.said_goodbye) return false;
      }
      return impl.all_sent();
    });
  } catch (const Error&) {
    all = false;  // Whoever needs to know why has been told by the operation that failed.
  }
  impl.stop_thread();
  if (all) {
    SLUICE_MPI(MPI_Comm_free, &impl.comm);
    if (impl.owns_mpi) SLUICE_MPI(MPI_Finalize);
  }
  link.reset();
  return all;
}

int MpiLink::rank() const noexcept {
  return impl_->rank;
}
int MpiLink::num_ranks() const noexcept {
  return impl_->num_ranks;
}

std::uint16_t MpiLink::new_group() {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->num_groups > 0xffff) {
    fail(ErrorCode::kUnsupported, "{} transports were made in this process; the limit is 65536",
         impl_->num_groups);
  }
  return static_cast<std::uint16_t>(impl_->num_groups++);
}

void MpiLink::add_window(std::uint16_t group, std::uint32_t object,
                         std::shared_ptr<WindowMemory> memory) {
  const std::lock_guard lock(impl_->mutex);
  impl_->windows[{group, object}] = std::move(memory);
}

void MpiLink::remove_window(std::uint16_t group, std::uint32_t object) noexcept {
  const std::lock_guard lock(impl_->mutex);
  impl_->windows.erase({group, object});
}

void MpiLink::send(int to, Record record, std::span<const std::byte> payload,
                   milliseconds timeout) {
  std::unique_lock lock(impl_->mutex);
  if (to == impl_->rank) {
    impl_->apply(to, record, payload);
    return;
  }
  FrameWriter& open = impl_->peer(to).open;
  for (;;) {
    // Small records stay whole; large ones fill the frame and go on in the next.
    if (!open.fits(std::min<std::size_t>(payload.size(), 4096))) impl_->ship(lock, to, timeout);
    const auto piece = payload.first(std::min(payload.size(), open.room()));
    open.append(record, piece);
    payload = payload.subspan(piece.size());
    if (payload.empty()) return;
    record.at += piece.size();
  }
}

void MpiLink::ship(int to, milliseconds timeout) {
  std::unique_lock lock(impl_->mutex);
  if (to != impl_->rank) impl_->ship(lock, to, timeout);
}

bool MpiLink::wait_until(Deadline deadline, const std::function<bool()>& arrived) {
  Backoff backoff;
  for (std::unique_lock lock(impl_->mutex);;) {
    if (arrived()) return true;
    impl_->require_healthy();
    if (impl_->pump()) {
      backoff.reset();
      continue;
    }
    if (Clock::now() >= deadline) return false;
    lock.unlock();
    backoff.pause();
    lock.lock();
  }
}

std::unique_ptr<std::vector<std::byte>> MpiLink::take_share(std::uint16_t group,
                                                            std::uint32_t object, int peer) {
  const auto found = impl_->shares.find({group, object, peer});
  if (found == impl_->shares.end()) return nullptr;
  if (found->second.arrived != found->second.bytes.size()) return nullptr;
  auto bytes = std::make_unique<Bytes>(std::move(found->second.bytes));
  impl_->shares.erase(found);
  return bytes;
}

}  // namespace sluice
