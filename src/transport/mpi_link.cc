#include "transport/mpi_link.h"

#include <algorithm>
#include <cstring>

#include "core/fail.h"
#include "core/interruption.h"
#include "transport/mpi_link_impl.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using Bytes = std::vector<std::byte>;

constexpr int kFrameTag = 20942;
/// Frames on their way to one peer, 4 MiB: enough to cover a receiver that computes for a while.
constexpr std::size_t kMaxInFlight = 32;

}  // namespace

/// Receives and completes sends while the rank is busy elsewhere.
void MpiLink::Impl::look_in() {
  std::unique_lock lock(mutex);
  while (!stop) {
    bool busy = false;
    try {
      busy = !failure && pump();
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
    if (!failure) failure = error;
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
      fail_of_ranks(ErrorCode::kTransport, {status.MPI_SOURCE},
                    "a message of {} bytes from rank {}; none is larger than {}", size,
                    status.MPI_SOURCE, kFrameBytes);
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
    if (status != MPI_SUCCESS && !p.farewell) {
      check_mpi(status, fmt::format("sending to rank {}", source).c_str(), {source});
    }
    if (status == MPI_SUCCESS && !done) break;
    spare.push_back(std::move(p.sending.front().bytes));
    p.sending.pop_front();
  }
  for (int done = 1; !p.receiving.empty(); any = true) {
    Receiving& first = p.receiving.front();
    check_mpi(MPI_Test(&first.request, &done, MPI_STATUS_IGNORE),
              fmt::format("receiving from rank {}", source).c_str(), {source});
    if (!done) break;
    const std::string wrong =
        read_frame(std::span(first.bytes).first(first.size), p.next_received++,
                   [&](const Record& record, std::span<const std::byte> payload) {
                     apply(source, record, payload);
                   });
    if (!wrong.empty()) {
      fail_of_ranks(ErrorCode::kTransport, {source}, "from rank {}: {}", source, wrong);
    }
    spare.push_back(std::move(first.bytes));
    p.receiving.pop_front();
  }
  return any;
}

void MpiLink::Impl::apply(int source, const Record& record, std::span<const std::byte> payload) {
  if (record.kind == RecordKind::kGoodbye) {
    Peer& p = peer(source);
    const auto farewell = static_cast<Farewell>(record.at);
    if (!p.farewell || *p.farewell < farewell) p.farewell = farewell;
    return;
  }
  if (record.kind == RecordKind::kPart) {
    Share& share = shares[{record.group, record.object, source}];
    const bool is_other = share.arrived > 0 && share.bytes.size() != record.total;
    if (is_other || record.at != share.arrived || payload.size() > record.total - record.at) {
      fail_of_ranks(ErrorCode::kTransport, {source},
                    "from rank {}: part at {} of gather {}, expected at {} of {}", source,
                    record.at, record.object, share.arrived, record.total);
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
      fail_of_ranks(ErrorCode::kTransport, {source},
                    "from rank {}: put of {} bytes at {} of a window of {}", source, payload.size(),
                    record.at, window.bytes);
    }
    std::memcpy(window.pages.data() + record.at, payload.data(), payload.size());
  } else if (record.kind == RecordKind::kSignal && record.flag < window.flags.size()) {
    // Flags only grow: a signal that comes twice does not take back a later one.
    auto& flag = window.flags[record.flag];
    if (record.at > flag.load(std::memory_order_relaxed)) {
      flag.store(record.at, std::memory_order_release);
    }
  } else {
    fail_of_ranks(ErrorCode::kTransport, {source},
                  "from rank {}: record of kind {}, flag {} for a window with {}", source,
                  static_cast<int>(record.kind), record.flag, window.flags.size());
  }
}

void MpiLink::Impl::require_healthy() const {
  if (failure) fail_of_ranks(ErrorCode::kTransport, failure->ranks(), "{}", failure->what());
}

void MpiLink::Impl::ship(std::unique_lock<std::mutex>& lock, int to, milliseconds timeout) {
  require_healthy();
  Peer& p = peer(to);
  if (p.open.empty()) return;
  Backoff backoff;
  for (const auto deadline = Clock::now() + timeout; p.sending.size() >= kMaxInFlight;) {
    const bool is_last_look = Clock::now() >= deadline;
    if (pump()) backoff.reset();
    if (p.sending.size() < kMaxInFlight) break;
    if (is_last_look) {
      fail_of_ranks(
          ErrorCode::kPeerTimeout, {to},
          "sending on rank {}: after {} ms {} messages to rank {} are still under way; missing "
          "rank(s) {}",
          rank, timeout.count(), p.sending.size(), to, to);
    }
    lock.unlock();
    backoff.pause();
    Interruption::look();
    lock.lock();
  }
  Sending& sending = p.sending.emplace_back();
  sending.bytes = p.open.seal(p.next_sent++, take_spare());
  SLUICE_MPI(MPI_Isend, sending.bytes.data(), static_cast<int>(sending.bytes.size()), MPI_BYTE, to,
             kFrameTag, comm, &sending.request);
}

bool MpiLink::Impl::all_sent() const {
  return std::ranges::all_of(peers, [](const Peer& p) { return p.sending.empty(); });
}

std::unique_ptr<MpiLink>& MpiLink::the_link() {
  static std::unique_ptr<MpiLink> link;
  return link;
}

MpiLink::MpiLink(milliseconds timeout) : impl_(std::make_unique<Impl>(start_mpi(timeout))) {}

MpiLink::~MpiLink() {
  if (!impl_->home.is_here()) {
    (void)impl_.release();
    return;
  }
  impl_->stop_thread();
  // MPI may still read and write the buffers of messages under way to or from a rank that is gone.
  if (!impl_->all_sent()) (void)impl_.release();
}

MpiLink& MpiLink::open(milliseconds timeout) {
  auto& link = the_link();
  if (!link) link.reset(new MpiLink(timeout));
  link->impl_->require_home();
  return *link;
}

int MpiLink::rank() const noexcept {
  return impl_->rank;
}
int MpiLink::num_ranks() const noexcept {
  return impl_->num_ranks;
}

std::uint16_t MpiLink::new_group() {
  impl_->require_home();
  const std::lock_guard lock(impl_->mutex);
  if (impl_->num_groups > 0xffff) {
    fail(ErrorCode::kUnsupported, "{} transports were made in this process; the limit is 65536",
         impl_->num_groups);
  }
  return static_cast<std::uint16_t>(impl_->num_groups++);
}

void MpiLink::add_window(std::uint16_t group, std::uint32_t object,
                         std::shared_ptr<WindowMemory> memory) {
  impl_->require_home();
  const std::lock_guard lock(impl_->mutex);
  impl_->windows[{group, object}] = std::move(memory);
}

void MpiLink::remove_window(std::uint16_t group, std::uint32_t object) noexcept {
  if (!impl_->home.is_here()) return;
  const std::lock_guard lock(impl_->mutex);
  impl_->windows.erase({group, object});
}

void MpiLink::send(int to, Record record, std::span<const std::byte> payload,
                   milliseconds timeout) {
  impl_->require_home();
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
  impl_->require_home();
  std::unique_lock lock(impl_->mutex);
  if (to != impl_->rank) impl_->ship(lock, to, timeout);
}

bool MpiLink::wait_until(Deadline deadline, const std::function<bool()>& arrived) {
  impl_->require_home();
  Backoff backoff;
  for (std::unique_lock lock(impl_->mutex);;) {
    // The clock first: what came while this process had no CPU has come in time.
    const bool is_last_look = Clock::now() >= deadline;
    if (arrived()) return true;
    impl_->require_healthy();
    if (impl_->pump()) {
      backoff.reset();
      continue;
    }
    if (is_last_look) return false;
    lock.unlock();
    backoff.pause();
    Interruption::look();
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
