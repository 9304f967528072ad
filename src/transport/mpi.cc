// Ranks as processes of one MPI job. A put is a record in a frame on its way to the peer, whose
// process applies it to the window; docs/transports.md says why these are messages and not MPI's
// own windows.
#include <algorithm>
#include <cstring>

#include "core/fail.h"
#include "sluice/transport.h"
#include "transport/mpi_link.h"
#include "transport/parts.h"

namespace sluice {
namespace {

using Deadline = std::chrono::steady_clock::time_point;
using std::chrono::milliseconds;

class MpiWindow final : public Window {
 public:
  MpiWindow(MpiLink& link, std::uint16_t group, std::uint32_t object, int num_ranks,
            std::size_t bytes, int num_flags, milliseconds timeout,
            std::shared_ptr<TransportCounters> counters)
      : link_(link),
        group_(group),
        object_(object),
        num_ranks_(num_ranks),
        timeout_(timeout),
        memory_(std::make_shared<WindowMemory>(bytes, num_flags)),
        counters_(std::move(counters)) {
    link_.add_window(group_, object_, memory_);
  }
  ~MpiWindow() override { link_.remove_window(group_, object_); }

  std::byte* local() noexcept override { return memory_->pages.data(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return memory_->bytes; }
  [[nodiscard]] int num_flags() const noexcept override {
    return static_cast<int>(memory_->flags.size());
  }

  void put(int peer, std::size_t offset, std::span<const std::byte> data) override {
    check_argument(offset <= bytes() && data.size() <= bytes() - offset,
                   "put of {} bytes at {} of rank {}'s window of {}", data.size(), offset, peer,
                   bytes());
    check_peer(peer);
    if (!data.empty()) {
      link_.send(peer, {.kind = RecordKind::kPut, .group = group_, .object = object_, .at = offset},
                 data, timeout_);
    }
    counters_->bytes_put[static_cast<std::size_t>(peer)] += data.size();
    counters_->puts[static_cast<std::size_t>(peer)] += 1;
  }

  void signal(int peer, int flag, std::uint64_t epoch) override {
    check_peer(peer);
    link_.send(peer,
               {.kind = RecordKind::kSignal,
                .group = group_,
                .object = object_,
                .flag = static_cast<std::uint32_t>(flag),
                .at = epoch},
               {}, timeout_);
    link_.ship(peer, timeout_);
  }

  [[nodiscard]] std::uint64_t flag(int flag) const override {
    return memory_->flags[static_cast<std::size_t>(flag)].load(std::memory_order_acquire);
  }

  [[nodiscard]] std::vector<int> wait_flags(std::span<const int> flags, std::uint64_t epoch,
                                            Deadline deadline) override {
    std::vector<int> below(flags.begin(), flags.end());
    (void)link_.wait_until(deadline, [&] {
      std::erase_if(below, [&](int f) { return flag(f) >= epoch; });
      return below.empty();
    });
    return below;
  }

 private:
  void check_peer(int peer) const {
    check_argument(peer >= 0 && peer < num_ranks_, "rank {} is not in [0, {})", peer, num_ranks_);
  }
  MpiLink& link_;
  std::uint16_t group_;
  std::uint32_t object_;
  int num_ranks_;
  milliseconds timeout_;
  std::shared_ptr<WindowMemory> memory_;
  std::shared_ptr<TransportCounters> counters_;
};

class MpiTransport final : public Transport {
 public:
  MpiTransport(MpiLink& link, int num_ranks, std::uint16_t group)
      : link_(link), num_ranks_(num_ranks), group_(group) {
    counters_->bytes_put.resize(static_cast<std::size_t>(num_ranks));
    counters_->puts.resize(static_cast<std::size_t>(num_ranks));
  }
  [[nodiscard]] int rank() const noexcept override { return link_.rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return num_ranks_; }
  [[nodiscard]] std::string name() const override { return "mpi"; }

  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    milliseconds timeout) override {
    // Before anybody is told: whoever returns from here may put into every other window.
    auto window = std::make_unique<MpiWindow>(link_, group_, next_window_++, num_ranks_, bytes,
                                              num_flags, timeout, counters_);
    const std::uint64_t mine[] = {bytes, static_cast<std::uint64_t>(num_flags)};
    const auto all = gather(std::as_bytes(std::span(mine)), "make_window", timeout);
    const auto other =
        std::ranges::find_if(all, [&](const auto& sizes) { return sizes != all[0]; });
    if (other == all.end()) return window;
    const auto size = [](const std::vector<std::byte>& part) {
      std::uint64_t v[2] = {0, 0};
      std::memcpy(v, part.data(), std::min(sizeof(v), part.size()));
      return fmt::format("{} bytes and {} flags", v[0], v[1]);
    };
    fail(ErrorCode::kTransport, "make_window: rank 0 asks for {}, rank {} for {}", size(all[0]),
         other - all.begin(), size(*other));
  }

  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine,
                                                               milliseconds timeout) override {
    auto all = gather(mine, "all_gather", timeout);
    check_all_gather(all, rank());
    return all;
  }

  [[nodiscard]] TransportCounters counters() const override { return *counters_; }

 private:
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine, const char* operation,
                                             milliseconds timeout) {
    const Deadline deadline = std::chrono::steady_clock::now() + timeout;
    const std::uint32_t number = next_gather_++;
    for (int peer = 0; peer < num_ranks_; ++peer) {
      link_.send(
          peer,
          {.kind = RecordKind::kPart, .group = group_, .object = number, .total = mine.size()},
          mine, timeout);
      link_.ship(peer, timeout);
    }
    std::vector<std::unique_ptr<std::vector<std::byte>>> parts(
        static_cast<std::size_t>(num_ranks_));
    const bool complete = link_.wait_until(deadline, [&] {
      bool all = true;
      for (int r = 0; r < num_ranks_; ++r) {
        auto& part = parts[static_cast<std::size_t>(r)];
        if (!part) part = link_.take_share(group_, number, r);
        all &= part != nullptr;
      }
      return all;
    });
    std::vector<int> missing;
    std::vector<std::vector<std::byte>> result(parts.size());
    for (std::size_t r = 0; r < parts.size(); ++r) {
      if (parts[r]) {
        result[r] = std::move(*parts[r]);
      } else {
        missing.push_back(static_cast<int>(r));
      }
    }
    if (complete) return result;
    fail_of_ranks(ErrorCode::kPeerTimeout, missing,
                  "{} number {} on rank {}: after {} ms still missing rank(s){}", operation, number,
                  rank(), timeout.count(), list_of(missing));
  }

  MpiLink& link_;
  int num_ranks_;
  std::uint16_t group_;
  std::uint32_t next_window_ = 0, next_gather_ = 0;
  std::shared_ptr<TransportCounters> counters_ = std::make_shared<TransportCounters>();
};

}  // namespace

std::unique_ptr<Transport> make_mpi_transport(milliseconds timeout, int num_ranks) {
  MpiLink& link = MpiLink::open(timeout);
  if (num_ranks == 0) num_ranks = link.num_ranks();
  check_argument(num_ranks >= 1 && num_ranks <= link.num_ranks(),
                 "{} ranks over MPI; the job has {} processes", num_ranks, link.num_ranks());
  const std::uint16_t group = link.new_group();
  if (link.rank() >= num_ranks) return nullptr;
  return std::make_unique<MpiTransport>(link, num_ranks, group);
}

bool end_mpi(milliseconds timeout) {
  return MpiLink::end(timeout);
}

}  // namespace sluice
