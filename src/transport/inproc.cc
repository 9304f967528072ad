// Ranks as threads of one process: windows are shared memory, flags are atomics, waits sleep.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "core/fail.h"
#include "core/home_process.h"
#include "core/interruption.h"
#include "sluice/transport.h"
#include "transport/pages.h"
#include "transport/parts.h"

namespace sluice {
namespace {

using Deadline = std::chrono::steady_clock::time_point;

/// One rank's memory in one symmetric window.
struct Region {
  Region(std::size_t bytes, int num_flags)
      : pages(bytes), flags(static_cast<std::size_t>(num_flags)) {}
  Pages pages;
  std::vector<std::atomic<std::uint64_t>> flags;
  std::mutex
      mutex;  // Only for sleeping: a signal between a waiter's check and its sleep must wake it.
  std::condition_variable changed;
};

struct SharedWindow {
  HomeProcess home;
  std::vector<std::unique_ptr<Region>> regions;  // [num_ranks]
  std::size_t bytes = 0;
  int num_flags = 0;
};

/// What the ranks of one group share. Collectives are numbered; each rank counts its own calls, so
/// call n of every rank meets in meeting n.
class Group {
 public:
  explicit Group(int num_ranks) : num_ranks_(num_ranks) {}
  [[nodiscard]] int num_ranks() const noexcept { return num_ranks_; }

  struct Meeting {
    std::vector<std::vector<std::byte>> parts;
    std::vector<bool> present;
    int num_present = 0, num_left = 0;
    std::shared_ptr<SharedWindow> window;
    /// What `make` threw, as a value: an exception that threads share is theirs to destroy at a
    /// time that a sanitizer cannot follow.
    std::optional<std::pair<ErrorCode, std::string>> failure;
  };

  /// Brings `mine` to meeting `index` and waits for the others. The first to see all present calls
  /// `make` under the lock. Throws: kPeerTimeout naming who is missing; kInterrupted; on every rank
  /// what `make` threw.
  template <class Make>
  Meeting meet(std::uint64_t index, int rank, std::span<const std::byte> mine,
               const char* operation, std::chrono::milliseconds timeout, const Make& make) {
    const Deadline deadline = std::chrono::steady_clock::now() + timeout;
    std::unique_lock lock(mutex_);
    Meeting& meeting = meetings_[index];
    if (meeting.parts.empty()) {
      meeting.parts.resize(static_cast<std::size_t>(num_ranks_));
      meeting.present.resize(static_cast<std::size_t>(num_ranks_));
    }
    meeting.parts[static_cast<std::size_t>(rank)].assign(mine.begin(), mine.end());
    meeting.present[static_cast<std::size_t>(rank)] = true;
    if (++meeting.num_present == num_ranks_) {
      try {
        make(meeting);
      } catch (const Error& error) {
        meeting.failure.emplace(error.code(), error.what());
      } catch (const std::bad_alloc&) {
        meeting.failure.emplace(ErrorCode::kOutOfMemory,
                                std::string(operation) + ": out of memory");
      }
      changed_.notify_all();
    }
    home_.require("transport inproc");  // In a child nobody else comes.
    const bool complete = Interruption::wait_until(
        changed_, lock, deadline, [&] { return meeting.num_present == num_ranks_; });
    if (!complete) {
      std::vector<int> missing;
      for (int r = 0; r < num_ranks_; ++r) {
        if (!meeting.present[static_cast<std::size_t>(r)]) missing.push_back(r);
      }
      fail_of_ranks(ErrorCode::kPeerTimeout, missing,
                    "{} number {} on rank {}: after {} ms still missing rank(s){}", operation,
                    index, rank, timeout.count(), list_of(missing));
    }
    Meeting result = meeting;
    if (++meeting.num_left == num_ranks_) meetings_.erase(index);
    if (result.failure) throw Error(result.failure->first, result.failure->second);
    return result;
  }

 private:
  int num_ranks_;
  HomeProcess home_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::uint64_t, Meeting> meetings_;
};

class InprocWindow final : public Window {
 public:
  InprocWindow(std::shared_ptr<SharedWindow> shared, int rank,
               std::shared_ptr<TransportCounters> counters)
      : shared_(std::move(shared)), rank_(rank), counters_(std::move(counters)) {}

  std::byte* local() noexcept override { return region(rank_).pages.data(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return shared_->bytes; }
  [[nodiscard]] int num_flags() const noexcept override { return shared_->num_flags; }

  void put(int peer, std::size_t offset, std::span<const std::byte> data) override {
    check_argument(offset <= bytes() && data.size() <= bytes() - offset,
                   "put of {} bytes at {} of rank {}'s window of {}", data.size(), offset, peer,
                   bytes());
    if (!data.empty()) std::memcpy(region(peer).pages.data() + offset, data.data(), data.size());
    counters_->bytes_put[static_cast<std::size_t>(peer)] += data.size();
    counters_->puts[static_cast<std::size_t>(peer)] += 1;
  }

  void signal(int peer, int flag, std::uint64_t epoch) override {
    Region& to = region(peer);
    // Flags only grow; each has one writer.
    auto& value = to.flags[static_cast<std::size_t>(flag)];
    if (epoch > value.load(std::memory_order_relaxed)) {
      value.store(epoch, std::memory_order_release);
    }
    { const std::lock_guard lock(to.mutex); }
    to.changed.notify_all();
  }

  [[nodiscard]] std::uint64_t flag(int flag) const override {
    return region(rank_).flags[static_cast<std::size_t>(flag)].load(std::memory_order_acquire);
  }

  [[nodiscard]] std::vector<int> wait_flags(std::span<const int> flags, std::uint64_t epoch,
                                            Deadline deadline) override {
    Region& own = region(rank_);
    std::vector<int> below(flags.begin(), flags.end());
    const auto arrived = [&] {
      std::erase_if(below, [&](int f) { return flag(f) >= epoch; });
      return below.empty();
    };
    if (arrived()) return below;
    shared_->home.require("transport inproc");
    std::unique_lock lock(own.mutex);
    (void)Interruption::wait_until(own.changed, lock, deadline, arrived);
    return below;
  }

 private:
  [[nodiscard]] Region& region(int rank) const {
    return *shared_->regions[static_cast<std::size_t>(rank)];
  }
  std::shared_ptr<SharedWindow> shared_;
  int rank_;
  std::shared_ptr<TransportCounters> counters_;
};

class InprocTransport final : public Transport {
 public:
  InprocTransport(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {
    counters_->bytes_put.resize(static_cast<std::size_t>(group_->num_ranks()));
    counters_->puts.resize(static_cast<std::size_t>(group_->num_ranks()));
  }
  [[nodiscard]] int rank() const noexcept override { return rank_; }
  [[nodiscard]] int num_ranks() const noexcept override { return group_->num_ranks(); }
  [[nodiscard]] std::string name() const override { return "inproc"; }

  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    const std::uint64_t sizes[] = {bytes, static_cast<std::uint64_t>(num_flags)};
    const auto meeting =
        group_->meet(next_++, rank_, std::as_bytes(std::span(sizes)), "make_window", timeout,
                     [&](Group::Meeting& m) {
                       if (std::ranges::count(m.parts, m.parts[0]) != group_->num_ranks()) return;
                       const std::shared_ptr<SharedWindow> window(new SharedWindow,
                                                                  DeletedAtHome<SharedWindow>());
                       window->bytes = bytes, window->num_flags = num_flags;
                       for (int r = 0; r < group_->num_ranks(); ++r) {
                         window->regions.push_back(std::make_unique<Region>(bytes, num_flags));
                       }
                       m.window = window;  // Whole, or not at all.
                     });
    if (!meeting.window) refuse_sizes(meeting);
    return std::make_unique<InprocWindow>(meeting.window, rank_, counters_);
  }

  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    auto meeting =
        group_->meet(next_++, rank_, mine, "all_gather", timeout, [](Group::Meeting&) {});
    check_all_gather(meeting.parts, rank_);
    return std::move(meeting.parts);
  }

  /// One address space: the pointers themselves travel. The second meeting keeps every `mine` alive
  /// until all ranks hold it.
  [[nodiscard]] std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes,
      std::chrono::milliseconds timeout) override {
    const Offer offer{&mine, bytes};
    const auto offers = all_gather(std::as_bytes(std::span(&offer, 1)), timeout);
    std::vector<std::shared_ptr<std::byte>> all;
    std::uint64_t other_bytes = bytes;
    for (const auto& raw : offers) {
      Offer theirs{};
      std::memcpy(&theirs, raw.data(), sizeof(theirs));
      if (theirs.bytes != bytes) other_bytes = theirs.bytes;
      all.push_back(*theirs.memory);
    }
    (void)all_gather({}, timeout);
    if (other_bytes != bytes) {
      fail(ErrorCode::kTransport, "share_device_memory: rank {} brings {} bytes, another rank {}",
           rank_, bytes, other_bytes);
    }
    return all;
  }

  [[nodiscard]] TransportCounters counters() const override { return *counters_; }

 private:
  struct Offer {
    const std::shared_ptr<std::byte>* memory;
    std::uint64_t bytes;
  };
  [[noreturn]] void refuse_sizes(const Group::Meeting& meeting) const {
    const auto size = [&](std::size_t r) {
      std::uint64_t v[2] = {0, 0};
      std::memcpy(v, meeting.parts[r].data(), std::min(sizeof(v), meeting.parts[r].size()));
      return fmt::format("{} bytes and {} flags", v[0], v[1]);
    };
    std::size_t other = 0;
    while (meeting.parts[other] == meeting.parts[0]) ++other;
    fail(ErrorCode::kTransport, "make_window: rank 0 asks for {}, rank {} for {}", size(0), other,
         size(other));
  }

  std::shared_ptr<Group> group_;
  int rank_;
  std::uint64_t next_ = 0;
  std::shared_ptr<TransportCounters> counters_ = std::make_shared<TransportCounters>();
};

}  // namespace

std::vector<std::unique_ptr<Transport>> make_inproc_transports(int num_ranks) {
  check_argument(num_ranks >= 1, "{} ranks; at least one", num_ranks);
  const std::shared_ptr<Group> group(new Group(num_ranks), DeletedAtHome<Group>());
  std::vector<std::unique_ptr<Transport>> transports;
  for (int r = 0; r < num_ranks; ++r) {
    transports.push_back(std::make_unique<InprocTransport>(group, r));
  }
  return transports;
}

}  // namespace sluice
