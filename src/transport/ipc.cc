// Ranks as processes of one host: every rank maps every window, so a put is a copy and a signal is
// a store. Waits sleep on a futex in the window, and look up now and then for ranks that have
// ended.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <list>
#include <thread>

#include "core/fail.h"
#include "core/interruption.h"
#include "sluice/transport.h"
#include "transport/ipc_device.h"
#include "transport/ipc_link.h"
#include "transport/parts.h"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr std::size_t kPage = 4096;
/// How often a sleeper looks whether a process has ended.
constexpr milliseconds kLookUp{20};
/// How long memory on its way out waits for peers that still map it.
constexpr milliseconds kLetGo{200};

constexpr std::size_t round_up(std::size_t bytes, std::size_t to) {
  return (bytes + to - 1) / to * to;
}

/// At the start of each rank's part of a window, before its flags. `changes` is what waiters sleep
/// on: it counts signals, so one between a waiter's look and its sleep keeps it awake.
struct alignas(64) Bell {
  std::atomic<std::uint32_t> changes{0}, num_waiters{0};
};

class IpcWindow final : public Window {
 public:
  IpcWindow(std::shared_ptr<IpcLink> link, SharedMemory memory, std::size_t bytes, int num_flags,
            std::shared_ptr<TransportCounters> counters)
      : link_(std::move(link)),
        memory_(std::move(memory)),
        bytes_(bytes),
        num_flags_(num_flags),
        counters_(std::move(counters)) {}

  static std::size_t flags_bytes(int num_flags) {
    return round_up(sizeof(Bell) + static_cast<std::size_t>(num_flags) * 8, kPage);
  }
  /// Of one rank's part.
  static std::size_t part_bytes(std::size_t bytes, int num_flags) {
    return flags_bytes(num_flags) + round_up(bytes, kPage);
  }

  std::byte* local() noexcept override { return data(link_->rank()); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }
  [[nodiscard]] int num_flags() const noexcept override { return num_flags_; }

  void put(int peer, std::size_t offset, std::span<const std::byte> data_in) override {
    require_home();
    check_argument(offset <= bytes_ && data_in.size() <= bytes_ - offset,
                   "put of {} bytes at {} of rank {}'s window of {}", data_in.size(), offset, peer,
                   bytes_);
    check_peer(peer);
    if (!data_in.empty()) std::memcpy(data(peer) + offset, data_in.data(), data_in.size());
    counters_->bytes_put[static_cast<std::size_t>(peer)] += data_in.size();
    counters_->puts[static_cast<std::size_t>(peer)] += 1;
  }

  void signal(int peer, int flag, std::uint64_t epoch) override {
    require_home();
    check_peer(peer);
    std::atomic<std::uint64_t>& value = flag_of(peer, flag);
    // Flags only grow; each has one writer.
    if (epoch > value.load(std::memory_order_relaxed)) {
      value.store(epoch, std::memory_order_release);
    }
    // In one order with the waiter's own steps: either it sees the flag or this sees the waiter.
    Bell& bell = bell_of(peer);
    bell.changes.fetch_add(1, std::memory_order_seq_cst);
    if (bell.num_waiters.load(std::memory_order_seq_cst) > 0) {
      syscall(SYS_futex, &bell.changes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  [[nodiscard]] std::uint64_t flag(int flag) const override {
    return flag_of(link_->rank(), flag).load(std::memory_order_acquire);
  }

  [[nodiscard]] std::vector<int> wait_flags(std::span<const int> flags, std::uint64_t epoch,
                                            Deadline deadline) override {
    require_home();
    std::vector<int> below(flags.begin(), flags.end());
    const auto arrived = [&] {
      std::erase_if(below, [&](int f) { return flag(f) >= epoch; });
      return below.empty();
    };
    Bell& bell = bell_of(link_->rank());
    while (!arrived()) {
      const auto now = Clock::now();
      if (now >= deadline) break;
      const std::vector<int> lost = link_->lost_ranks();
      if (!lost.empty()) {
        if (arrived()) break;  // Its last words.
        fail_of_ranks(ErrorCode::kTransport, lost, "still missing rank(s){}: process has ended",
                      list_of(lost));
      }
      bell.num_waiters.fetch_add(1, std::memory_order_seq_cst);
      const std::uint32_t seen = bell.changes.load(std::memory_order_seq_cst);
      if (!arrived()) {
        const auto left = std::min<Clock::duration>(deadline - now, kLookUp);
        const timespec time{0, std::chrono::nanoseconds(left).count()};
        syscall(SYS_futex, &bell.changes, FUTEX_WAIT, seen, &time, nullptr, 0);
      }
      bell.num_waiters.fetch_sub(1, std::memory_order_seq_cst);
      Interruption::look();
    }
    (void)arrived();  // Flags may have come between the last look and a deadline that passed since.
    return below;
  }

 private:
  /// A child maps the same memory, and would take part in its parent's place.
  void require_home() const { link_->home().require("transport ipc"); }
  void check_peer(int peer) const {
    check_argument(peer >= 0 && peer < link_->num_ranks(), "rank {} is not in [0, {})", peer,
                   link_->num_ranks());
  }
  [[nodiscard]] std::byte* part(int rank) const noexcept {
    return memory_.data() + static_cast<std::size_t>(rank) * part_bytes(bytes_, num_flags_);
  }
  [[nodiscard]] Bell& bell_of(int rank) const noexcept {
    return *reinterpret_cast<Bell*>(part(rank));
  }
  [[nodiscard]] std::atomic<std::uint64_t>& flag_of(int rank, int flag) const noexcept {
    return reinterpret_cast<std::atomic<std::uint64_t>*>(part(rank) + sizeof(Bell))[flag];
  }
  [[nodiscard]] std::byte* data(int rank) const noexcept {
    return part(rank) + flags_bytes(num_flags_);
  }

  std::shared_ptr<IpcLink> link_;
  SharedMemory memory_;
  std::size_t bytes_;
  int num_flags_;
  std::shared_ptr<TransportCounters> counters_;
};

/// Own device memory that its owner has let go of but peers may still map: CUDA wants them to
/// unmap it before it is freed.
class Lent {
 public:
  explicit Lent(std::shared_ptr<IpcLink> link) : link_(std::move(link)) {}
  /// Frees what nobody maps any more, and in the end the rest, too: a peer that is stopped may map
  /// it for ever. Then the driver keeps the memory for as long as that peer has it.
  ~Lent() {
    if (!link_->home().is_here()) return;  // The parent still has it.
    const Deadline deadline = Clock::now() + kLetGo;
    sweep();
    while (!entries_.empty() && Clock::now() < deadline) {
      std::this_thread::sleep_for(milliseconds(1));
      sweep();
    }
  }
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

  void add(std::uint64_t share, std::shared_ptr<std::byte> memory) {
    entries_.push_back({share, std::move(memory)});
    if (link_->home().is_here()) sweep();
  }

 private:
  struct Entry {
    std::uint64_t share;
    std::shared_ptr<std::byte> memory;
  };
  void sweep() {
    std::erase_if(entries_, [this](const Entry& entry) {
      auto& cell = link_->board().members[link_->rank()].let_go[entry.share % IpcBoard::kShares];
      const std::uint64_t let_go = cell.load();
      for (int r = 0; r < link_->num_ranks(); ++r) {
        if (r != link_->rank() && !(let_go >> r & 1) && !link_->is_gone(r)) return false;
      }
      cell = 0;
      return true;
    });
  }
  std::shared_ptr<IpcLink> link_;
  std::list<Entry> entries_;
};

class IpcTransport final : public Transport {
 public:
  IpcTransport(const IpcConfig& config, milliseconds timeout)
      : link_(std::make_shared<IpcLink>(config, timeout)), lent_(std::make_shared<Lent>(link_)) {
    counters_->bytes_put.resize(static_cast<std::size_t>(config.num_ranks));
    counters_->puts.resize(static_cast<std::size_t>(config.num_ranks));
  }
  [[nodiscard]] int rank() const noexcept override { return link_->rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return link_->num_ranks(); }
  [[nodiscard]] std::string name() const override { return "ipc"; }

  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    milliseconds timeout) override {
    const std::uint64_t mine[] = {bytes, static_cast<std::uint64_t>(num_flags)};
    const std::size_t total =
        IpcWindow::part_bytes(bytes, num_flags) * static_cast<std::size_t>(num_ranks());
    SharedMemory memory;
    if (rank() == 0) memory = SharedMemory::create(total);
    auto gathered = link_->gather(std::as_bytes(std::span(mine)), "make_window", timeout,
                                  rank() == 0 ? memory.file() : -1);
    for (std::size_t r = 0; r < gathered.parts.size(); ++r) {
      if (gathered.parts[r] == gathered.parts[0]) continue;
      const auto size = [](const std::vector<std::byte>& part) {
        std::uint64_t v[2] = {0, 0};
        std::memcpy(v, part.data(), std::min(sizeof(v), part.size()));
        return fmt::format("{} bytes and {} flags", v[0], v[1]);
      };
      fail(ErrorCode::kTransport, "make_window: rank 0 asks for {}, rank {} for {}",
           size(gathered.parts[0]), r, size(gathered.parts[r]));
    }
    if (rank() != 0) memory = SharedMemory(std::move(gathered.file), total);
    return std::make_unique<IpcWindow>(link_, std::move(memory), bytes, num_flags, counters_);
  }

  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine,
                                                               milliseconds timeout) override {
    auto all = link_->gather(mine, "all_gather", timeout).parts;
    check_all_gather(all, rank());
    return all;
  }

  [[nodiscard]] std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes, milliseconds timeout) override {
    struct Offer {
      DeviceMemoryHandle handle;
      std::uint64_t bytes;
    };
    const Offer offer{export_device_memory(mine.get()), bytes};
    const auto gathered =
        link_->gather(std::as_bytes(std::span(&offer, 1)), "share_device_memory", timeout);
    const std::uint64_t share = next_share_++;
    std::vector<std::shared_ptr<std::byte>> all;
    for (int r = 0; r < num_ranks(); ++r) {
      Offer theirs{};
      std::memcpy(&theirs, gathered.parts[static_cast<std::size_t>(r)].data(), sizeof(theirs));
      if (theirs.bytes != bytes) {
        fail(ErrorCode::kTransport, "share_device_memory: rank {} brings {} bytes, rank {} {}",
             rank(), bytes, r, theirs.bytes);
      }
      if (r == rank()) {
        // The last reference hands the memory to `lent`, which frees it when peers have let go.
        std::byte* const data = mine.get();
        all.emplace_back(data, [lent = lent_, share, mine](std::byte*) mutable {
          lent->add(share, std::move(mine));
        });
      } else {
        all.push_back(import_device_memory(theirs.handle, [link = link_, r, share] {
          if (!link->home().is_here()) return;
          link->board().members[r].let_go[share % IpcBoard::kShares] |= std::uint64_t{1}
                                                                        << link->rank();
        }));
      }
    }
    return all;
  }

  [[nodiscard]] TransportCounters counters() const override { return *counters_; }

 private:
  std::shared_ptr<IpcLink> link_;
  std::shared_ptr<Lent> lent_;
  std::uint64_t next_share_ = 0;
  std::shared_ptr<TransportCounters> counters_ = std::make_shared<TransportCounters>();
};

}  // namespace

std::unique_ptr<Transport> make_ipc_transport(const IpcConfig& config, milliseconds timeout) {
  return std::make_unique<IpcTransport>(config, timeout);
}

}  // namespace sluice
