// errors.cc - sluice.Error for every Error of the library, or what a signal's handler raised.
#include <nanobind/stl/vector.h>

#include <filesystem>
#include <new>
#include <optional>

#include "bindings.h"

namespace sluice::python {
namespace {

const char* code_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
      return "invalid_argument";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kOutOfMemory:
      return "out_of_memory";
    case ErrorCode::kCorruptFile:
      return "corrupt_file";
    case ErrorCode::kIo:
      return "io";
    case ErrorCode::kCuda:
      return "cuda";
    case ErrorCode::kTransport:
      return "transport";
    case ErrorCode::kPeerTimeout:
      return "peer_timeout";
    case ErrorCode::kInterrupted:
      return "interrupted";
    case ErrorCode::kInternal:
      break;
  }
  return "internal";
}

/// An instance of `type`, which is Python's own class. Nothing if its constructor raised: a signal
/// may have come, whose handler the interpreter calls at the next line of Python.
std::optional<nb::object> make_instance(nb::handle type, const Error& error, nb::object& raised) {
  try {
    return type(code_name(error.code()), text_of(error.what()), nb::cast(error.ranks()));
  } catch (nb::python_error& other) {
    if (!raised.is_valid()) raised = nb::borrow(other.value());
    return {};
  }
}

void raise(nb::handle type, const Error& error) {
  nb::object raised = take_interruption();
  std::optional<nb::object> instance = make_instance(type, error, raised);
  if (!instance) instance = make_instance(type, error, raised);
  if (instance && raised.is_valid()) {
    PyException_SetContext(raised.ptr(), nb::object(*instance).release().ptr());
  }
  const nb::object& shown = raised.is_valid() ? raised : *instance;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(shown.ptr())), shown.ptr());
}

}  // namespace

nb::str text_of(std::string_view text) {
  PyObject* const made =
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape");
  if (made == nullptr) nb::raise_python_error();
  return nb::steal<nb::str>(made);
}

void bind_errors() {
  // The class is Python's own, so that it has a signature, a docstring and can be pickled.
  static PyObject* const type =
      nb::object(nb::module_::import_("sluice._error").attr("Error")).release().ptr();
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void*) {
        try {
          std::rethrow_exception(p);
        } catch (const Error& error) {
          raise(type, error);
        } catch (const std::bad_alloc&) {
          raise(type, Error(ErrorCode::kOutOfMemory, "the host has no memory of this call's size"));
        } catch (const std::filesystem::filesystem_error& error) {
          raise(type, Error(ErrorCode::kIo, error.what()));
        }
      },
      nullptr);
}

}  // namespace sluice::python
