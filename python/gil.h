// gil.h - without the interpreter's lock, while the library works or waits, and with it again.
//
// Two things may happen meanwhile. A signal may come: then what Python's handler raises ends the
// wait, and is raised instead of the error that the wait ends with. And the interpreter may end: it
// then takes the threads that want its lock off their stacks, through C++ that does not stand for
// that, so such a thread rests here until the process is gone.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>

#include "sluice/interrupt.h"

namespace sluice::python {

namespace nb = nanobind;

/// No Python object may be touched while one lives.
class Released {
 public:
  Released();
  ~Released();
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  [[nodiscard]] bool wants_out();

  PyThreadState* state_;
  int num_exceptions_ = std::uncaught_exceptions();
  bool has_asked_ = false, handles_signals_ = true;
  Interruptible waits_;
};

/// In a function that the library calls: with the lock, from whatever thread.
class Acquired {
 public:
  Acquired();
  ~Acquired();
  Acquired(const Acquired&) = delete;
  Acquired& operator=(const Acquired&) = delete;

 private:
  PyGILState_STATE state_;
};

/// What a signal's handler raised in a call of this thread that is on its way out; nothing
/// otherwise. Whoever takes it raises it, with the call's own error as its context.
[[nodiscard]] nb::object take_interruption();

}  // namespace sluice::python
