// interrupt.h - how a program ends its waits for other ranks before their time, as the Python
// package does at Ctrl-C.
//
//   const sluice::Interruptible waits([] { return was_asked_to_stop.load(); });
//   layer.forward(...);      // throws kInterrupted within about 50 ms once that is true
#pragma once

#include <chrono>
#include <functional>

namespace sluice {

/// While one lives, its thread's waits for other ranks ask whether they are still wanted. What the
/// interrupted call used, an exchange or a transport, is then as after a timeout: its ranks may be
/// out of step, and it refuses later calls. The other ranks miss this one.
///
/// Stream: waits on a device are not asked; they end by their timeout.
/// Cost: nothing for a wait of less than 50 ms.
class Interruptible {
 public:
  /// `wants_out` is asked about every 50 ms of a wait, by the waiting thread, which holds no lock
  /// of the library meanwhile. Once it returns true, waits throw kInterrupted. It must not throw.
  explicit Interruptible(std::function<bool()> wants_out);
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

 private:
  friend class Interruption;
  std::function<bool()> wants_out_;
  std::chrono::steady_clock::time_point next_look_{};  // Of the first wait: not yet known.
  Interruptible* outer_;
};

}  // namespace sluice
