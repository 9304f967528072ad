// module.cc - sluice._core: the extension module, and sluice.Error for every sluice::Error.
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace {

const char* code_name(sluice::ErrorCode code) {
  using sluice::ErrorCode;
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
    case ErrorCode::kInternal:
      break;
  }
  return "internal";
}

}  // namespace

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  m.doc() = "The C++ library behind the package sluice; import that instead.";
  // The class is Python's own, so that it has a signature, a docstring and can be pickled.
  static PyObject* const error =
      nb::object(nb::module_::import_("sluice._error").attr("Error")).release().ptr();
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void*) {
        try {
          std::rethrow_exception(p);
        } catch (const sluice::Error& e) {
          const nb::object instance =
              nb::handle(error)(code_name(e.code()), e.what(), nb::cast(e.ranks()));
          PyErr_SetObject(error, instance.ptr());
        }
      },
      nullptr);
  // What a thread still holds when the interpreter ends, or a cache of another extension module, is
  // not freed, and is no fault of this module: nanobind would print a page about it at exit.
  nb::set_leak_warnings(false);
  m.def("_report_leaks", &nb::set_leak_warnings, nb::arg("on"),
        "For tests: whether instances that are alive at exit are printed to stderr.");
  m.def("version", &sluice::version, "Version of the library, for example '0.1.0'.");
  sluice::python::bind_recipe(m);
  sluice::python::bind_placement(m);
  sluice::python::bind_backend(m);
  sluice::python::bind_transport(m);
  sluice::python::bind_checkpoint(m);
  sluice::python::bind_exchange(m);
  sluice::python::bind_experts(m);
  sluice::python::bind_repack(m);
  sluice::python::bind_layer(m);
  sluice::python::bind_layer_group(m);
  sluice::python::bind_local(m);
  sluice::python::bind_engine(m);
  sluice::python::bind_workload(m);
  sluice::python::bind_accuracy(m);
}
