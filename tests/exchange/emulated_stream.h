// emulated_stream.h - a stream and memory that behave as a device's: work that is queued is done
// later and in order, it may be captured and replayed, and whoever frees memory waits for it.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "support/scalar_backend.h"
#include "transport/fake_stream.h"

namespace sluice::testing {

/// A stream whose work a thread takes in order, as a device does: whoever queues it goes on. While
/// it is captured, work is kept for replays.
class EmulatedStream final : public FakeStream {
 public:
  using Graph = std::vector<std::function<void()>>;

  EmulatedStream() : thread_([this] { run(); }) {}
  ~EmulatedStream() override {
    {
      const std::lock_guard lock(mutex_);
      is_ending_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  EmulatedStream(const EmulatedStream&) = delete;
  EmulatedStream& operator=(const EmulatedStream&) = delete;

  void queue(std::function<void()> work) override {
    const std::lock_guard lock(mutex_);
    if (is_capturing_) return captured_.push_back(std::move(work));
    work_.push_back(std::move(work));
    changed_.notify_all();
  }
  /// Until all that was queued is done.
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return work_.empty(); });
  }

  [[nodiscard]] bool is_capturing() {
    const std::lock_guard lock(mutex_);
    return is_capturing_;
  }
  void begin_capture() {
    const std::lock_guard lock(mutex_);
    is_capturing_ = true;
  }
  [[nodiscard]] Graph end_capture() {
    const std::lock_guard lock(mutex_);
    is_capturing_ = false;
    return std::exchange(captured_, {});
  }
  void replay(const Graph& graph) {
    for (const auto& work : graph) queue(work);
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return is_ending_ || !work_.empty(); });
      if (work_.empty()) return;
      const std::function<void()> next = work_.front();
      lock.unlock();
      next();
      lock.lock();
      work_.pop_front();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;  // The first one is under way.
  Graph captured_;
  bool is_capturing_ = false, is_ending_ = false;
  std::thread thread_;
};

/// Memory that nobody has written holds bytes that no test expects. Whoever frees some waits for
/// the stream, as with a device.
class PoisoningBackend final : public ScalarBackend {
 public:
  explicit PoisoningBackend(std::shared_ptr<EmulatedStream> stream) : stream_(std::move(stream)) {}
  [[nodiscard]] std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes) override {
    auto buffer = std::make_unique<Buffer>(ScalarBackend::allocate(bytes), stream_);
    std::fill_n(buffer->data(), buffer->bytes(), std::byte{0xa5});
    return buffer;
  }

 private:
  struct Buffer final : DeviceBuffer {
    Buffer(std::unique_ptr<DeviceBuffer> m, std::shared_ptr<EmulatedStream> s)
        : memory(std::move(m)), stream(std::move(s)) {}
    ~Buffer() override { stream->synchronize(); }
    [[nodiscard]] std::byte* data() const noexcept override { return memory->data(); }
    [[nodiscard]] std::size_t bytes() const noexcept override { return memory->bytes(); }
    std::unique_ptr<DeviceBuffer> memory;
    std::shared_ptr<EmulatedStream> stream;  // A mate may hold memory longer than its owner.
  };
  std::shared_ptr<EmulatedStream> stream_;
};

}  // namespace sluice::testing
