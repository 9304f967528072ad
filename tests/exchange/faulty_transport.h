// faulty_transport.h - a transport that goes wrong in one chosen way.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "support/forwarding_transport.h"

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

class FaultyWindow final : public ForwardingWindow {
 public:
  FaultyWindow(std::unique_ptr<Window> inner, const Faults& faults)
      : ForwardingWindow(std::move(inner)), faults_(faults) {}
  void put(int peer, std::size_t offset, std::span<const std::byte> data) override {
    std::vector<std::byte> copy(data.begin(), data.end());
    if (!faults_.on_put || faults_.on_put(peer, offset, copy)) {
      ForwardingWindow::put(peer, offset, copy);
    }
  }
  void signal(int peer, int flag, std::uint64_t epoch) override {
    if (!faults_.on_signal || faults_.on_signal(peer, flag, epoch)) {
      ForwardingWindow::signal(peer, flag, epoch);
    }
  }

 private:
  const Faults& faults_;
};

class FaultyTransport final : public ForwardingTransport {
 public:
  FaultyTransport(std::unique_ptr<Transport> inner, Faults faults)
      : ForwardingTransport(*inner), owned_(std::move(inner)), faults_(std::move(faults)) {}
  [[nodiscard]] std::string name() const override {
    return "faulty " + ForwardingTransport::name();
  }
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    return std::make_unique<FaultyWindow>(
        ForwardingTransport::make_window(bytes, num_flags, timeout), faults_);
  }
  [[nodiscard]] std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes,
      std::chrono::milliseconds timeout) override {
    auto of_ranks = ForwardingTransport::share_device_memory(std::move(mine), bytes, timeout);
    if (faults_.on_share) faults_.on_share(of_ranks, bytes);
    return of_ranks;
  }

 private:
  std::unique_ptr<Transport> owned_;
  Faults faults_;
};

}  // namespace sluice::testing
