// interruption.h - what a wait for other ranks has to do so that its caller can end it.
//
// A wait sleeps until next_look() of its deadline at most, and then calls look(). It holds no lock
// then: the caller may need one of its own, the interpreter's for example, whose holder may wait
// for ours.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "sluice/interrupt.h"

namespace sluice {

class Interruption {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  /// `deadline`, or an earlier time if this thread's caller has to be asked before that.
  [[nodiscard]] static Deadline next_look(Deadline deadline);
  /// Asks the caller if it is time to. Throws: kInterrupted.
  static void look();

  /// As changed.wait_until(lock, deadline, done), but `lock` is free while the caller is asked.
  /// Throws: kInterrupted, with `lock` free.
  template <class Done>
  [[nodiscard]] static bool wait_until(std::condition_variable& changed,
                                       std::unique_lock<std::mutex>& lock, Deadline deadline,
                                       const Done& done) {
    for (;;) {
      const Deadline until = next_look(deadline);
      if (changed.wait_until(lock, until, done)) return true;
      if (until == deadline) return false;
      lock.unlock();
      look();
      lock.lock();
    }
  }

 private:
  friend class Interruptible;
  static thread_local Interruptible* innermost;
};

}  // namespace sluice
