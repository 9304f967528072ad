// processor_wait.h - for how long this process stood ready to run and had no processor.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <stop_token>
#include <string>
#include <system_error>
#include <thread>

namespace sluice::testing {

/// Time that a busy machine kept from the threads of this process, since this was made. A test
/// takes it off what an operation took, so that its limit is as strict as the machine is idle.
/// A thread of its own looks on, so that threads which end meanwhile are counted, too.
class ProcessorWait {
 public:
  ProcessorWait() : at_begin_(of_threads()), last_(at_begin_) {}

  /// Of all threads together; nothing where Linux does not say.
  [[nodiscard]] std::chrono::milliseconds so_far() {
    look();
    const std::lock_guard lock(mutex_);
    std::uint64_t ns = 0;
    for (const auto& [thread, waited] : last_) {
      const auto found = at_begin_.find(thread);
      ns += waited - (found == at_begin_.end() ? 0 : found->second);
    }
    return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::nanoseconds(ns));
  }

 private:
  using Waits = std::map<std::string, std::uint64_t>;

  /// Nanoseconds by thread: the second number of its schedstat.
  static Waits of_threads() {
    Waits waits;
    std::error_code none;
    for (std::filesystem::directory_iterator at("/proc/self/task", none), end; !none && at != end;
         at.increment(none)) {
      std::ifstream file(at->path() / "schedstat");
      std::uint64_t ran = 0, waited = 0;
      if (file >> ran >> waited) waits[at->path().filename()] = waited;
    }
    return waits;
  }

  void look() {
    const Waits now = of_threads();
    const std::lock_guard lock(mutex_);
    for (const auto& [thread, waited] : now) last_[thread] = waited;
  }
  void look_on(const std::stop_token& stop) {
    for (std::unique_lock lock(sleep_); !stop.stop_requested();) {
      ending_.wait_for(lock, stop, std::chrono::milliseconds(50), [] { return false; });
      look();
    }
  }

  Waits at_begin_;
  std::mutex mutex_, sleep_;
  std::condition_variable_any ending_;
  Waits last_;
  std::jthread thread_{[this](const std::stop_token& stop) { look_on(stop); }};  // The last member.
};

}  // namespace sluice::testing
