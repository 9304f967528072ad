#include "transport/nccl_rail.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "core/fail.h"
#include "core/interruption.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

/// How often the thread looks.
constexpr milliseconds kLook{20};
/// How long rank 0 may take to say how far everybody is.
constexpr milliseconds kAsk{900};
/// How long NCCL may take to end what is under way.
constexpr milliseconds kAbort{800};
/// How long a program that ends waits for one that takes longer.
constexpr milliseconds kAtTheEnd{3'000};
/// How long word of who has gone or stopped may take to come after NCCL's own error. The last
/// question may be asked just before, and takes kAsk where rank 0 is silent.
constexpr milliseconds kWord{500};
/// A rank that is alive is heard every 500 ms.
constexpr std::uint32_t kSilentMs = 1'500;

/// For whom other ranks than `self` have stopped, as far as they say: the first one who does.
std::vector<int> stopped_for(const std::vector<TcpMember>& members, int self) {
  for (const TcpMember& member : members) {
    const int lost = static_cast<int>(member.stop_word) - 1;
    if (lost >= 0 && lost != self) return {lost};
  }
  return {};
}

}  // namespace

NcclRail::NcclRail(const NcclApi& api, TcpLink& link, NcclRailConfig config)
    : api_(api), link_(link), config_(std::move(config)) {
  SLUICE_ASSERT(config_.host >= 0 && config_.host < num_hosts());
  SLUICE_ASSERT(config_.members[static_cast<std::size_t>(config_.host)] == link.rank());
  connect();
  thread_ = std::thread([this] { look_after(); });
}

NcclRail::~NcclRail() {
  {
    const Lock lock(mutex_);
    is_ending_ = true;
    ended_.notify_all();
  }
  thread_.join();
  break_off();
}

void NcclRail::connect() {
  num_begun_ = 1;
  link_.set_progress(num_begun_);
  NcclComm comm = nullptr;
  const int status = api_.init(&comm, num_hosts(), config_.id, config_.host, config_.device);
  comm_ = comm;
  if (const auto error = error_of(status, "ncclCommInitRankConfig")) {
    break_off();
    throw Error(*error);
  }
  try {
    settle("connecting the hosts");
  } catch (const Error&) {
    break_off();
    throw;
  }
}

void NcclRail::exchange(std::span<const Send> sends, std::span<const Receive> receives,
                        void* stream) {
  check();
  std::optional<Error> error;
  const auto call = [&](int status, const char* name) {
    if (!error) error = error_of(status, name);
  };
  {
    Lock lock(mutex_);
    if (comm_ == nullptr) throw Error(*failure_);
    call(api_.group_start(), "ncclGroupStart");
    for (const Send& s : sends) {
      if (!error) call(api_.send(s.data, s.bytes, s.host, comm_, stream), "ncclSend");
    }
    for (const Receive& r : receives) {
      if (!error) call(api_.receive(r.data, r.bytes, r.host, comm_, stream), "ncclRecv");
    }
    // A group that was opened is closed, whatever happened in it.
    call(api_.group_end(), "ncclGroupEnd");
    if (error) {
      lock.unlock();
      error = with_names(*error, "an operation between the hosts");
      lock.lock();
      fail_with(*error, lock);
    }
  }
  if (error) throw Error(*error);
  settle("an operation between the hosts");
}

/// Waits until NCCL has done what it does on the host.
void NcclRail::settle(const char* operation) {
  const auto deadline = Clock::now() + config_.timeout;
  for (int round = 0;; ++round) {
    Lock lock(mutex_);
    if (failure_) throw Error(*failure_);
    int status = kNcclSuccess;
    auto error = error_of(api_.async_error(comm_, &status), "ncclCommGetAsyncError");
    if (!error && status == kNcclSuccess) return;
    if (!error) error = error_of(status, operation);
    const bool is_late = !error && Clock::now() >= deadline;
    if (error || is_late) {
      // Asking takes a while, and the thread must not wait for it.
      lock.unlock();
      error = is_late ? late_error(operation) : with_names(*error, operation);
      lock.lock();
    } else {
      error = gone_error(operation);
    }
    if (error) {
      fail_with(*error, lock);
      throw Error(*failure_);
    }
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(round < 100 ? 50 : 1'000));
    try {
      Interruption::look();
    } catch (const Error& interruption) {
      lock.lock();
      fail_with({interruption.code(), fmt::format("{}: {}", place(operation), interruption.what())},
                lock);
      throw Error(*failure_);
    }
  }
}

int NcclRail::watch(RailProgress progress, std::function<void(const Error&)> on_failure) {
  const Lock lock(mutex_);
  watches_[next_watch_] = {progress, std::move(on_failure), 0, Clock::now()};
  return next_watch_++;
}

void NcclRail::stop_watching(int watch) {
  Lock lock(mutex_);
  // What `on_failure` uses may be gone as soon as this call has returned.
  const auto is_called_elsewhere = [this] {
    return telling_ != std::thread::id{} && telling_ != std::this_thread::get_id();
  };
  told_.wait(lock, [&] { return !is_called_elsewhere(); });
  const auto found = watches_.find(watch);
  if (found == watches_.end()) return;
  num_begun_ += found->second.progress.begun->load();
  watches_.erase(found);
}

void NcclRail::check() const {
  const Lock lock(mutex_);
  if (failure_) throw Error(*failure_);
}

/// The thread.
void NcclRail::look_after() {
  Lock lock(mutex_);
  while (!is_ending_) {
    if (!failure_) {
      if (const auto error = look(lock)) fail_with(*error, lock);
    }
    ended_.wait_for(lock, kLook, [this] { return is_ending_; });
  }
}

/// What has failed by now, if anything has.
std::optional<Error> NcclRail::look(Lock& lock) {
  int status = kNcclSuccess;
  auto error = error_of(api_.async_error(comm_, &status), "ncclCommGetAsyncError");
  if (!error) error = error_of(status, "an operation between the hosts");
  if (error) {
    lock.unlock();
    Error named = with_names(*error, "an operation between the hosts");
    lock.lock();
    return named;
  }
  const auto now = Clock::now();
  std::uint64_t begun_by_all = num_begun_;
  bool is_late = false, is_busy = false;
  for (auto& [number, watch] : watches_) {
    // `done` first: an operation may begin between the two looks.
    const std::uint64_t done = watch.progress.done->load(), begun = watch.progress.begun->load();
    begun_by_all += begun;
    if (done != watch.seen_done || begun <= done) watch.since = now, watch.seen_done = done;
    is_busy |= begun > done;
    is_late |= now - watch.since >= config_.timeout;
  }
  link_.set_progress(begun_by_all);
  if (!is_busy) return {};
  const std::string operation = fmt::format("operation {} between the hosts", begun_by_all);
  if (!is_late) return gone_error(operation);
  lock.unlock();
  Error late = late_error(operation);
  lock.lock();
  return late;
}

std::string NcclRail::place(const std::string& operation) const {
  const int rank = link_.rank();
  return fmt::format("{} on rank {} of host {}", operation, rank,
                     config_.hosts[static_cast<std::size_t>(rank)]);
}

std::string NcclRail::names_of(const std::vector<int>& ranks) const {
  std::string text;
  for (const int r : ranks) {
    text += fmt::format("{}rank {} of host {}", text.empty() ? "" : ", ", r,
                        config_.hosts[static_cast<std::size_t>(r)]);
  }
  return text;
}

/// Nothing if `status` is no error.
std::optional<Error> NcclRail::error_of(int status, const char* call) const {
  if (status == kNcclSuccess || status == kNcclInProgress) return {};
  const char* const more = comm_ != nullptr ? api_.last_error(comm_) : nullptr;
  return Error(
      ErrorCode::kTransport,
      fmt::format("{}: {}: {}{}{}", place(call), "NCCL says", api_.error_string(status),
                  more != nullptr && *more != '\0' ? "; " : "", more != nullptr ? more : ""));
}

/// Somebody whom an operation needs has gone, whoever waits for whom.
std::optional<Error> NcclRail::gone_error(const std::string& operation) const {
  const std::vector<int> gone = link_.gone();
  if (gone.empty()) return {};
  return Error(ErrorCode::kTransport,
               fmt::format("{}: missing {}, whose process has ended, or for which others gave up",
                           place(operation), names_of(gone)),
               gone);
}

/// Whom to blame for an operation that takes too long. All ranks of the job are looked at: a rank
/// of this rail may only wait for another rank of its host.
Error NcclRail::late_error(const std::string& operation) const {
  if (auto gone = gone_error(operation)) return *gone;
  const std::string start =
      fmt::format("{}: after {} ms ", place(operation), config_.timeout.count());
  // Only now: a rank may leave while its last bytes are still on their way to this one.
  if (const auto left = link_.left(); !left.empty()) {
    return {ErrorCode::kPeerTimeout, start + "missing " + names_of(left) + ", which has left",
            left};
  }
  const auto members = link_.ask(kAsk);
  if (members) {
    // That rank has waited longer, and knows whom for.
    if (auto lost = stopped_for(*members, link_.rank()); !lost.empty()) {
      return {ErrorCode::kPeerTimeout,
              start + "missing " + names_of(lost) + ", for which others have stopped", lost};
    }
  }
  std::vector<int> silent, behind;
  std::uint64_t least = 0, most = 0;
  for (std::size_t r = 0; members && r < members->size(); ++r) {
    const TcpMember& member = (*members)[r];
    if (member.silent_ms > kSilentMs) silent.push_back(static_cast<int>(r));
    if (r == 0 || member.progress < least) least = member.progress, behind.clear();
    if (member.progress == least) behind.push_back(static_cast<int>(r));
    most = std::max(most, member.progress);
  }
  if (!members) {
    if (auto gone = gone_error(operation)) return *gone;  // By now.
    return {ErrorCode::kPeerTimeout, start + "missing " + names_of({0}) + ", which does not answer",
            std::vector<int>{0}};
  }
  if (!silent.empty()) {
    return {ErrorCode::kPeerTimeout,
            start + "still missing " + names_of(silent) + ", not heard of any more", silent};
  }
  if (least < most) {
    return {ErrorCode::kPeerTimeout,
            fmt::format("{}still missing {}, at operation {} of {}", start, names_of(behind), least,
                        most),
            behind};
  }
  std::vector<int> others = config_.members;
  std::erase(others, link_.rank());
  return {ErrorCode::kTransport,
          fmt::format("{}every rank is there, but nothing moves between it and {}", start,
                      names_of(others)),
          others};
}

/// NCCL names nobody. What broke a connection, a process that has ended or a rank that stopped for
/// another one, is heard of a little later.
Error NcclRail::with_names(const Error& said, const std::string& operation) const {
  const auto until = Clock::now() + kWord;
  do {
    if (const auto gone = gone_error(operation)) {
      return {gone->code(), fmt::format("{}; {}", gone->what(), said.what()), gone->ranks()};
    }
    const auto members = link_.ask(kAsk);
    if (const auto lost = stopped_for(members.value_or(std::vector<TcpMember>{}), link_.rank());
        !lost.empty()) {
      return {ErrorCode::kTransport,
              fmt::format("{}: missing {}, for which others have stopped; {}", place(operation),
                          names_of(lost), said.what()),
              lost};
    }
    std::this_thread::sleep_for(kLook);
  } while (Clock::now() < until);
  return said;
}

/// The first failure counts. Ends what is under way, and tells whoever watches.
void NcclRail::fail_with(const Error& error, Lock& lock) {
  if (failure_) return;
  failure_ = error;
  std::vector<std::function<void(const Error&)>> listeners;
  for (const auto& [number, watch] : watches_) listeners.push_back(watch.on_failure);
  telling_ = std::this_thread::get_id();
  lock.unlock();
  // Before the kernels end: what follows them on a stream must know that they failed.
  for (const auto& on_failure : listeners) on_failure(error);
  lock.lock();
  telling_ = {};
  told_.notify_all();
  lock.unlock();
  // Before NCCL breaks connections, whose other ends then learn whom it is for.
  if (!error.ranks().empty()) link_.set_stopped_for(error.ranks().front());
  break_off();
  lock.lock();
}

namespace {

/// Aborts that were left to themselves. A program that ends waits a little for them: NCCL would go
/// on in a process whose memory goes. Made after NCCL was opened, so gone before it.
class LeftAborts {
 public:
  ~LeftAborts() {
    std::unique_lock lock(mutex_);
    ended_.wait_for(lock, kAtTheEnd, [this] { return num_running_ == 0; });
  }
  void begin() {
    const std::lock_guard lock(mutex_);
    num_running_ += 1;
  }
  void end() {
    const std::lock_guard lock(mutex_);
    num_running_ -= 1;
    ended_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  int num_running_ = 0;
};

LeftAborts& left_aborts() {
  static LeftAborts aborts;
  return aborts;
}

}  // namespace

/// Ends the communicator, on a thread of its own: it is left to itself if NCCL takes too long.
void NcclRail::break_off() {
  NcclComm comm = nullptr;
  {
    const Lock lock(mutex_);
    comm = std::exchange(comm_, nullptr);
  }
  if (comm == nullptr) return;
  struct Work {
    std::mutex mutex;
    std::condition_variable done;
    bool is_done = false;
  };
  const auto work = std::make_shared<Work>();
  LeftAborts& aborts = left_aborts();
  aborts.begin();
  std::thread([work, comm, function = api_.abort, &aborts] {
    (void)function(comm);
    {
      const std::lock_guard lock(work->mutex);
      work->is_done = true;
      work->done.notify_all();
    }
    aborts.end();
  }).detach();
  std::unique_lock lock(work->mutex);
  work->done.wait_for(lock, kAbort, [&] { return work->is_done; });
}

}  // namespace sluice
