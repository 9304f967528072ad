// forwarding_transport.h - a window and a transport that hand every call on, to be derived from by
// those that change some.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "sluice/transport.h"

namespace sluice::testing {

class ForwardingWindow : public Window {
 public:
  explicit ForwardingWindow(std::unique_ptr<Window> inner) : inner_(std::move(inner)) {}
  std::byte* local() noexcept override { return inner_->local(); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return inner_->bytes(); }
  [[nodiscard]] int num_flags() const noexcept override { return inner_->num_flags(); }
  void put(int peer, std::size_t offset, std::span<const std::byte> data) override {
    inner_->put(peer, offset, data);
  }
  void signal(int peer, int flag, std::uint64_t epoch) override {
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
};

/// Borrows the transport behind it.
class ForwardingTransport : public Transport {
 public:
  explicit ForwardingTransport(Transport& inner) : inner_(inner) {}
  [[nodiscard]] int rank() const noexcept override { return inner_.rank(); }
  [[nodiscard]] int num_ranks() const noexcept override { return inner_.num_ranks(); }
  [[nodiscard]] std::string name() const override { return inner_.name(); }
  [[nodiscard]] std::unique_ptr<Window> make_window(std::size_t bytes, int num_flags,
                                                    std::chrono::milliseconds timeout) override {
    return inner_.make_window(bytes, num_flags, timeout);
  }
  [[nodiscard]] std::vector<std::vector<std::byte>> all_gather(
      std::span<const std::byte> mine, std::chrono::milliseconds timeout) override {
    return inner_.all_gather(mine, timeout);
  }
  [[nodiscard]] std::vector<std::shared_ptr<std::byte>> share_device_memory(
      std::shared_ptr<std::byte> mine, std::size_t bytes,
      std::chrono::milliseconds timeout) override {
    return inner_.share_device_memory(std::move(mine), bytes, timeout);
  }
  [[nodiscard]] TransportCounters counters() const override { return inner_.counters(); }
  [[nodiscard]] Hosts hosts() const override { return inner_.hosts(); }

 private:
  Transport& inner_;
};

}  // namespace sluice::testing
