// fake_stream.h - what tests without a device take for a stream.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace sluice::testing {

/// A stream, and the words that a device would write around an operation on it.
struct FakeStream {
  virtual ~FakeStream() = default;
  /// Runs `work` after what was queued before; here at once.
  virtual void queue(std::function<void()> work) { work(); }
  std::atomic<std::uint64_t> begun{0}, done{0};
};

}  // namespace sluice::testing
