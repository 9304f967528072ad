#include <fmt/format.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "sluice/network.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

using Timeout = std::optional<int>;
using Ranks = nb::typed<nb::list, PyTransport>;

std::unique_ptr<PyTransport> owned(std::unique_ptr<Transport> transport) {
  auto owner = std::make_unique<PyTransport>();
  owner->transport = std::move(transport);
  return owner;
}

Ranks inproc(const Whole<"num_ranks">& given) {
  const int num_ranks = given;
  if (num_ranks < 1 || num_ranks > 1024) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("num_ranks {} is not in [1, 1024]", num_ranks));
  }
  nb::list list;
  for (auto& transport : make_inproc_transports(num_ranks)) {
    list.append(nb::cast(owned(std::move(transport)).release(), nb::rv_policy::take_ownership));
  }
  return Ranks(list);
}

std::unique_ptr<PyTransport> ipc(const IpcConfig& config, const Timeout& timeout_ms) {
  const auto timeout = timeout_or_environment(timeout_ms);
  const Released released;
  return owned(make_ipc_transport(config, timeout));
}

NcclConfig nccl_config(const std::optional<int>& device) {
  return {
      .device = device.value_or(-1),
      .library = nb::cast<std::string>(nb::module_::import_("sluice._group").attr("nccl_path")())};
}

/// The all_gather of a group of Python's, which is called with the GIL and may throw.
ProcessGroup group_of(int rank, int num_ranks, const nb::object& all_gather) {
  return {rank, num_ranks, [&all_gather](std::span<const std::byte> mine) {
            const Acquired acquired;
            std::vector<std::vector<std::byte>> parts;
            for (const nb::handle part : all_gather(nb::bytes(mine.data(), mine.size()))) {
              const auto bytes = nb::cast<nb::bytes>(part);
              const auto* const data = static_cast<const std::byte*>(bytes.data());
              parts.emplace_back(data, data + bytes.size());
            }
            return parts;
          }};
}

std::unique_ptr<PyTransport> from_group(const nb::object& group, const std::optional<int>& device,
                                        const Timeout& timeout_ms) {
  // The group's own calls are Python's.
  using Met = std::tuple<int, int, std::string, std::string, int, nb::object>;
  const auto [rank, num_ranks, job, secret, num_hosts, all_gather] =
      nb::cast<Met>(nb::module_::import_("sluice._group").attr("meet")(group, host_id()));
  if (num_hosts == 1) {
    return ipc({.job = job, .secret = secret, .rank = rank, .num_ranks = num_ranks}, timeout_ms);
  }
  const auto timeout = timeout_or_environment(timeout_ms);
  const NcclConfig config = nccl_config(device);
  const ProcessGroup shared = group_of(rank, num_ranks, all_gather);
  const Released released;
  return owned(make_nccl_transport(config, shared, timeout));
}

std::unique_ptr<PyTransport> from_environment(const std::optional<int>& device,
                                              const Timeout& timeout_ms) {
  const std::optional<JobPlace> place = read_job_place();
  if (!place) {
    throw Error(ErrorCode::kInvalidArgument,
                "the environment names no rank: start this under torchrun, mpirun or srun, or set "
                "SLUICE_RANK, SLUICE_WORLD_SIZE and SLUICE_JOB");
  }
  if (place->num_ranks_on_host != place->num_ranks) {
    const auto timeout = timeout_or_environment(timeout_ms);
    const NcclConfig config = nccl_config(device);
    const Released released;
    return owned(make_nccl_transport(config, *place, timeout));
  }
  return ipc({.job = place->job,
              .secret = place->secret,
              .rank = place->rank,
              .num_ranks = place->num_ranks},
             timeout_ms);
}

std::unique_ptr<PyTransport> mpi(int num_ranks, const Timeout& timeout_ms) {
  const auto timeout = timeout_or_environment(timeout_ms);
  const Released released;
  auto transport = make_mpi_transport(timeout, num_ranks);
  return transport ? owned(std::move(transport)) : nullptr;
}

nb::typed<nb::list, nb::bytes> all_gather(PyTransport& t, const nb::bytes& mine,
                                          const Timeout& timeout_ms) {
  const auto timeout = timeout_or_environment(timeout_ms);
  std::vector<std::vector<std::byte>> everyone;
  {
    const Exclusive exclusive(t.busy, "transport");
    const std::span bytes(static_cast<const std::byte*>(mine.data()), mine.size());
    const Released released;
    everyone = t.transport->all_gather(bytes, timeout);
  }
  nb::list list;
  for (const auto& bytes : everyone) list.append(nb::bytes(bytes.data(), bytes.size()));
  return nb::typed<nb::list, nb::bytes>(list);
}

void bind_makers(nb::class_<PyTransport>& c) {
  c.def_static("inproc", &inproc, "num_ranks"_a,
               "Ranks as threads of this process: a list with the transport of each rank.")
      .def_static(
          "from_group", &from_group, "group"_a, nb::kw_only(), "device"_a = nb::none(),
          "timeout_ms"_a = nb::none(),
          "Ranks as the processes of a group: a torch ProcessGroup, an mpi4py communicator, or\n"
          "any object with rank, size and all_gather(object) -> list. The group is used at the\n"
          "start alone, to agree on a meeting place. Over ipc if all are on one host (host_id()),\n"
          "over nccl if not. device: the CUDA device of this rank, for nccl; default: its index\n"
          "on its host. Collective.\n\n"
          "Raises Error: unsupported on several hosts without NCCL or a GPU, peer_timeout naming "
          "ranks.")
      .def_static("from_environment", &from_environment, nb::kw_only(), "device"_a = nb::none(),
                  "timeout_ms"_a = nb::none(),
                  "Ranks as the processes that a launcher started: torchrun, mpirun, srun, or\n"
                  "SLUICE_RANK, SLUICE_WORLD_SIZE and SLUICE_JOB. Over ipc on one host; over nccl\n"
                  "on several, which also takes SLUICE_SECRET, and SLUICE_MEETING or MASTER_ADDR\n"
                  "and MASTER_PORT. Collective.\n\n"
                  "Raises Error: invalid_argument naming the variable, unsupported, peer_timeout.")
      .def_static(
          "ipc",
          [](std::string job, std::string secret, int rank, int num_ranks, const Timeout& ms) {
            return ipc({.job = std::move(job),
                        .secret = std::move(secret),
                        .rank = rank,
                        .num_ranks = num_ranks},
                       ms);
          },
          "job"_a, nb::kw_only(), "secret"_a, "rank"_a, "num_ranks"_a, "timeout_ms"_a = nb::none(),
          "Ranks as processes of one user on one host, CUDA memory included. Collective.\n\n"
          "job: names the meeting place. secret: what the processes prove to know,\n"
          "at least 16 bytes.\n\n"
          "Raises Error: peer_timeout naming the ranks that did not come, transport if they "
          "disagree.")
      .def_static(
          "mpi", &mpi, "num_ranks"_a = 0, nb::kw_only(), "timeout_ms"_a = nb::none(),
          "Ranks as the first `num_ranks` processes of an MPI job, 0 for all; None on the\n"
          "others. CPU memory only. Collective; end_mpi() is every process's last call.\n\n"
          "Raises Error: unsupported in a build without MPI, peer_timeout naming processes.",
          nb::sig("def mpi(num_ranks: int = 0, *, timeout_ms: int | None = None) -> "
                  "Transport | None"));
}

}  // namespace

void bind_transport(nb::module_& m) {
  nb::class_<PyTransport> c(
      m, "Transport",
      "Moves bytes between the ranks of one expert-parallel group; one object\n"
      "for each rank, used by one thread at a time.");
  bind_makers(c);
  c.def_prop_ro(
       "rank", [](const PyTransport& t) { return t.transport->rank(); }, "This rank's number.")
      .def_prop_ro(
          "num_ranks", [](const PyTransport& t) { return t.transport->num_ranks(); },
          "Size of the group.")
      .def_prop_ro(
          "name", [](const PyTransport& t) { return t.transport->name(); },
          "'inproc', 'ipc', 'mpi' or 'nccl'.")
      .def_prop_ro(
          "hosts",
          [](const PyTransport& t) {
            const Hosts hosts = t.transport->hosts();
            std::vector<int> of_rank;
            for (int r = 0; r < t.transport->num_ranks(); ++r) of_rank.push_back(hosts.host_of(r));
            return of_rank;
          },
          "Each rank's host, numbered from 0, where the transport finds that out (nccl); else one\n"
          "host.")
      .def("all_gather", &all_gather, "mine"_a, nb::kw_only(), "timeout_ms"_a = nb::none(),
           "Every rank's bytes, as many on each, ordered by rank. For set-up. Collective.\n\n"
           "Raises Error: peer_timeout naming ranks, transport.")
      .def("__repr__", [](const PyTransport& t) {
        return fmt::format("<sluice.Transport {}, rank {} of {}>", t.transport->name(),
                           t.transport->rank(), t.transport->num_ranks());
      });
  m.def(
      "host_id", &host_id,
      "Names this host: NCCL_HOSTID if it is set, or host name and boot. Ranks with the same name "
      "are on one host.");
  m.def(
      "end_mpi",
      [](const Timeout& timeout_ms) {
        const auto timeout = timeout_or_environment(timeout_ms);
        const Released released;
        return end_mpi(timeout);
      },
      nb::kw_only(), "timeout_ms"_a = nb::none(),
      "The last call of every process of an MPI job, with no transport left. False: some process\n"
      "did not say goodbye in time; then just exit.");
}

}  // namespace sluice::python
