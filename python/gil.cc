#include "gil.h"

#include <chrono>
#include <thread>
#include <utility>

namespace sluice::python {
namespace {

/// The exception, or null. Plain, since it may be left when the interpreter is gone.
thread_local PyObject* interruption = nullptr;

/// `take` asks for the interpreter's lock.
template <class Take>
auto or_rest(const Take& take) {
  try {
    return take();
  } catch (...) {
    // The interpreter ends, and has this thread's stack unwound. There is nowhere to go.
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

/// Python calls the handlers of signals in one thread.
bool is_main_thread() {
  const nb::module_ threading = nb::module_::import_("threading");
  return threading.attr("main_thread")().attr("ident").equal(threading.attr("get_ident")());
}

/// For the call that ended as if nothing had come: Python raises it in the next moment.
void raise_later() {
  const auto raise = [](void*) {
    const nb::object error = take_interruption();
    if (!error.is_valid()) return 0;
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    return -1;
  };
  (void)Py_AddPendingCall(raise, nullptr);
}

}  // namespace

nb::object take_interruption() {
  return nb::steal(std::exchange(interruption, nullptr));
}

Released::Released() : state_(PyEval_SaveThread()), waits_([this] { return wants_out(); }) {}

Released::~Released() {
  or_rest([this] { PyEval_RestoreThread(state_); });
  if (interruption != nullptr && std::uncaught_exceptions() <= num_exceptions_) raise_later();
}

bool Released::wants_out() {
  if (interruption != nullptr) return true;
  if (!handles_signals_) return false;
  or_rest([this] { PyEval_RestoreThread(state_); });
  try {
    if (!std::exchange(has_asked_, true)) handles_signals_ = is_main_thread();
    if (PyErr_CheckSignals() != 0) nb::raise_python_error();
  } catch (nb::python_error& error) {  // Of a handler, which any line of Python may call.
    interruption = nb::borrow(error.value()).release().ptr();
  }
  state_ = PyEval_SaveThread();
  return interruption != nullptr;
}

Acquired::Acquired() : state_(or_rest([] { return PyGILState_Ensure(); })) {}

Acquired::~Acquired() {
  PyGILState_Release(state_);
}

}  // namespace sluice::python
