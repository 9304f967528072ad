// module.cc - sluice._core: the extension module.
#include "bindings.h"

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  m.doc() = "The C++ library behind the package sluice; import that instead.";
  sluice::python::bind_errors();
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
