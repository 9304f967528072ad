#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

void bind_transport(nb::module_& m) {
  nb::class_<PyTransport>(m, "Transport",
                          "Moves bytes between the ranks of one expert-parallel group; one object\n"
                          "for each rank, used by one thread at a time.")
      .def_static(
          "inproc",
          [](int num_ranks) {
            if (num_ranks < 1 || num_ranks > 1024) {
              throw Error(ErrorCode::kInvalidArgument,
                          "num_ranks " + std::to_string(num_ranks) + " is not in [1, 1024]");
            }
            nb::list list;
            for (auto& transport : make_inproc_transports(num_ranks)) {
              auto owner = std::make_unique<PyTransport>();
              owner->transport = std::move(transport);
              list.append(nb::cast(owner.release(), nb::rv_policy::take_ownership));
            }
            return nb::typed<nb::list, PyTransport>(list);
          },
          "num_ranks"_a,
          "Ranks as threads of this process: a list with the transport of each rank.")
      .def_prop_ro(
          "rank", [](const PyTransport& t) { return t.transport->rank(); }, "This rank's number.")
      .def_prop_ro(
          "num_ranks", [](const PyTransport& t) { return t.transport->num_ranks(); },
          "Size of the group.")
      .def_prop_ro(
          "name", [](const PyTransport& t) { return t.transport->name(); }, "'inproc', ...")
      .def("__repr__", [](const PyTransport& t) {
        return "<sluice.Transport " + t.transport->name() + ", rank " +
               std::to_string(t.transport->rank()) + " of " +
               std::to_string(t.transport->num_ranks()) + ">";
      });
}

}  // namespace sluice::python
