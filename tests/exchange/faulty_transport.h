// faulty_transport.h - a transport that goes wrong in one chosen way.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "sluice/transport.h"

namespace sluice::testing {

/// What happens to the calls of one rank. Each hook may be empty.
struct Faults {
  /// May change the bytes of a put, or return false to lose it.
  std::function<bool(int peer, std::size_t offset, std::vector<std::byte>& data)> on_put = {};
  /// May change the epoch of a signal, or return false to lose it.
  std::function<bool(int peer, int flag, std::uint64_t& epoch)> on_signal = {};
  /// May change where this rank finds the device memory of the others. [num_ranks]
  std::function<void(std::vector<std::shared_ptr<std::byte>>& of_ranks, std::size_t bytes)>
      on_share = {};
};

class FaultyWindow final : public Window {
 public:
  FaultyWindow(std::unique_ptr<Window> inner, const Faults& faults)
      : inner_(std::move(inner)), faults_(faults) {}
  std::byte* local() noexcept override { return inner_->local(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return inner_->bytes(); }
  [[nodiscard]] int num_flags() const noexcept override { return inner_->num_flags(); }
  void put(int peer, std::size_t offset, std::span<const std::byte> data) override {
    std::vector<std::byte> copy(data.begin(), data.end());
    if (!faults_.on_put || faults_.on_put(peer, offset, copy)) inner_->put(peer, offset, copy);
  }
  void signal(int peer, int flag, std::uint64_t epoch) override {
    if (!faults_.on_signal || faults_.on_signal(peer, flag, epoch))
      inner_->signal(peer, flag, epoch);
  }
  [[nodiscard]] std::uint64_t flag(int flag) const override { return inner_->flag(flag); }
  [[nodiscard]] std::vector<int> wait_flags(
      std::span<const int> flags, std::uint64_t epoch,
      std::chrono::steady_clock::time_point deadline) override {
    return inner_->wait_flags(flags, epoch, deadline);
  }

 private:
  std::unique_ptr<Window> inner_;
  const Faults& faults_;
};

class FaultyTransport final : public Transport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, Faults faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}
  [[nodiscard]] int rank() const noexcept override { return inner_->rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return inner_->num_ranks(); }
  [[nodiscard]] std::string name() const override { return "faulty " + inner_->name(); }
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    return std::make_unique<FaultyWindow>(inner_->make_window(bytes, num_flags, timeout), faults_);
  }
  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    return inner_->all_gather(mine, timeout);
  }
  [[nodiscard]] std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes,
      std::chrono::milliseconds timeout) override {
    auto of_ranks = inner_->share_device_memory(std::move(mine), bytes, timeout);
    if (faults_.on_share) faults_.on_share(of_ranks, bytes);
    return of_ranks;
  }
  [[nodiscard]] TransportCounters counters() const override { return inner_->counters(); }

 private:
  std::unique_ptr<Transport> inner_;
  Faults faults_;
};

}  // namespace sluice::testing
