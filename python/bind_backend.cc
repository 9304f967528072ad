#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include "bindings.h"

namespace sluice::python {

using namespace nb::literals;

void bind_backend(nb::module_& m) {
  nb::class_<PyBackend>(m, "Backend",
                        "One device that quantizes rows and runs expert GEMMs; one for each rank.\n"
                        "Serves one thread at a time; a second one gets an Error.",
                        nb::is_weak_referenceable())
      .def(
          "__init__",
          [](PyBackend* self, std::string_view device, Whole<"num_threads"> num_threads,
             Whole<"local_rank"> local_rank, Whole<"num_local_ranks"> num_local_ranks) {
            std::unique_ptr<Backend> backend;
            {
              const Released released;
              backend = make_backend({.device = parse_device(device),
                                      .num_threads = num_threads,
                                      .local_rank = local_rank,
                                      .num_local_ranks = num_local_ranks});
            }
            new (self) PyBackend{.backend = std::move(backend)};
          },
          "device"_a = "cpu", nb::kw_only(), "num_threads"_a = 0, "local_rank"_a = 0,
          "num_local_ranks"_a = 1,
          "device: 'cpu', 'cuda' or 'cuda:1'.\n"
          "num_threads: CPU only; 0 takes this rank's even share of the cores.\n"
          "local_rank, num_local_ranks: which share, where ranks are threads of one process; on\n"
          "CUDA, how many ranks share the device.\n\n"
          "Raises Error: unsupported where there is no such device; invalid_argument.")
      .def_prop_ro(
          "device", [](const PyBackend& b) { return to_text(b.device()); }, "'cpu' or 'cuda:0'.")
      .def_prop_ro(
          "description", [](const PyBackend& b) { return b.backend->description(); },
          "For reports: 'cpu, 2 threads, AVX2'.")
      .def_prop_ro(
          "stream",
          [](const PyBackend& b) {
            return reinterpret_cast<std::uintptr_t>(b.backend->stream().handle);
          },
          "Handle of a queue of this backend's own; 0 on the CPU.")
      .def(
          "measure_read_bandwidth",
          [](PyBackend& b) {
            const Call call(b);
            return b.backend->measure_read_bandwidth();
          },
          "Bytes per second this device reads, measured now (about 0.2 s).")
      .def(
          "synchronize",
          [](PyBackend& b, const StreamArgument& stream) {
            const Call call(b);
            b.backend->synchronize(to_stream(stream, {}, b.device()));
          },
          "stream"_a = 0, "Waits for everything queued on `stream`. Nothing to do on the CPU.")
      .def("__repr__",
           [](const PyBackend& b) { return "<sluice.Backend " + b.backend->description() + ">"; });
}

}  // namespace sluice::python
