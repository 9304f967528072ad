// run_ranks.h - runs one body per rank, each with its transport: ranks are threads of this process,
// or processes that all run the same tests: `mpirun -n N test --transport mpi`, or
// `test --transport ipc --processes N`, or `test --transport nccl --processes N --hosts H`, where
// processes of one machine are taken for H hosts.
#pragma once

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sluice/backend.h"
#include "sluice/config.h"
#include "sluice/error.h"
#include "sluice/lab/ranks.h"
#include "sluice/network.h"
#include "sluice/transport.h"

namespace sluice::testing {

/// Longest wait for another process between two tests.
inline constexpr std::chrono::milliseconds kProcessTimeout{30'000};

/// Over all processes; null where ranks are threads. Set by start_processes().
inline std::unique_ptr<Transport>& control_transport() {
  static std::unique_ptr<Transport> transport;
  return transport;
}

/// What the processes were started with: mpi, ipc or nccl.
inline std::string& process_transport() {
  static std::string name;
  return name;
}

/// Between the processes of a group over ipc, which NCCL_HOSTID spreads over hosts.
inline std::unique_ptr<Transport> make_nccl_over(Transport& ipc,
                                                 std::chrono::milliseconds timeout) {
  const ProcessGroup group{ipc.rank(), ipc.num_ranks(), [&](std::span<const std::byte> mine) {
                             return ipc.all_gather(mine, timeout);
                           }};
  const int device = ipc.rank() % std::max(1, num_devices(Device::Kind::kCuda));
  return make_nccl_transport({.device = device}, group, timeout);
}

/// A transport of the first `num_ranks` processes, 0 = all; null on the others.
inline std::unique_ptr<Transport> make_process_transport(const std::string& name, int num_ranks,
                                                         std::chrono::milliseconds timeout) {
  if (name == "mpi") return make_mpi_transport(timeout, num_ranks);
  if (name == "nccl") {
    const auto ipc = make_process_transport("ipc", num_ranks, timeout);
    return ipc == nullptr ? nullptr : make_nccl_over(*ipc, timeout);
  }
  if (name != "ipc") {
    throw Error(ErrorCode::kInvalidArgument, "transport '" + name + "' is not mpi, ipc or nccl");
  }
  const JobPlace place = read_job_place().value();
  if (num_ranks == 0) num_ranks = place.num_ranks;
  if (place.rank >= num_ranks) return nullptr;
  return make_ipc_transport(
      {.job = place.job, .secret = place.secret, .rank = place.rank, .num_ranks = num_ranks},
      timeout);
}

/// `name`: mpi, ipc or nccl. To be followed by end_processes().
inline void start_processes(const std::string& name) {
  process_transport() = name;
  control_transport() = make_process_transport(name == "nccl" ? "ipc" : name, 0, kProcessTimeout);
}
/// False if not all processes reached this.
inline bool end_processes() {
  if (control_transport() == nullptr) return true;
  const bool is_mpi = control_transport()->name() == "mpi";
  control_transport().reset();
  return !is_mpi || end_mpi(kProcessTimeout);
}

inline bool ranks_are_processes() {
  return control_transport() != nullptr;
}

/// Every process's bytes, of any length; just `mine` where ranks are threads.
inline std::vector<std::string> gather_bytes(std::string mine) {
  if (!ranks_are_processes()) return {mine};
  const std::uint64_t size = mine.size();
  std::vector<std::uint64_t> sizes;
  for (const auto& part :
       control_transport()->all_gather(std::as_bytes(std::span(&size, 1)), kProcessTimeout)) {
    std::memcpy(&sizes.emplace_back(), part.data(), sizeof(size));
  }
  std::uint64_t longest = 0;
  for (const std::uint64_t s : sizes) longest = std::max(longest, s);
  mine.resize(longest);
  const auto parts =
      control_transport()->all_gather(std::as_bytes(std::span(mine)), kProcessTimeout);
  std::vector<std::string> result;
  for (std::size_t r = 0; r < parts.size(); ++r) {
    result.emplace_back(reinterpret_cast<const char*>(parts[r].data()), sizes[r]);
  }
  return result;
}

/// A count that each rank made for itself, over all of them.
inline int sum_over_ranks(int mine) {
  int sum = 0;
  for (const std::string& part :
       gather_bytes(std::string(reinterpret_cast<const char*>(&mine), sizeof(mine)))) {
    int value = 0;
    std::memcpy(&value, part.data(), sizeof(value));
    sum += value;
  }
  return sum;
}

/// Makes what rank r wrote into values[r] known to all processes.
template <class T>
void share_between_ranks(std::vector<std::vector<T>>& values) {
  if (!ranks_are_processes()) return;
  const auto mine = static_cast<std::size_t>(control_transport()->rank());
  const std::string bytes = mine < values.size()
                                ? std::string(reinterpret_cast<const char*>(values[mine].data()),
                                              values[mine].size() * sizeof(T))
                                : std::string();
  const auto parts = gather_bytes(bytes);
  for (std::size_t r = 0; r < values.size(); ++r) {
    values[r].resize(parts[r].size() / sizeof(T));
    if (!values[r].empty()) std::memcpy(values[r].data(), parts[r].data(), parts[r].size());
  }
}

/// Code, text and ranks of a failure.
struct Failure {
  ErrorCode code = ErrorCode::kInternal;
  std::string text;
  std::vector<int> ranks;
};
inline std::optional<Failure> describe(const std::exception_ptr& failure) {
  if (!failure) return std::nullopt;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    return Failure{error.code(), error.what(), error.ranks()};
  } catch (const std::exception& error) {
    return Failure{ErrorCode::kInternal, error.what(), {}};
  }
}

/// Puts something between a rank and its transport, to inject faults.
using WrapTransport = std::function<std::unique_ptr<Transport>(int, std::unique_ptr<Transport>)>;

/// Runs body(transport) as rank `rank`; what it threw, null for nothing.
template <class Body>
std::exception_ptr try_rank(int rank, std::unique_ptr<Transport> transport, const Body& body,
                            const WrapTransport& wrap) {
  try {
    if (wrap) transport = wrap(rank, std::move(transport));
    body(*transport);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

/// Runs body(transport) in this process if it is one of the ranks, and learns how the others fared.
template <class Body>
std::vector<std::exception_ptr> try_processes(int num_ranks, const Body& body,
                                              const WrapTransport& wrap) {
  std::unique_ptr<Transport> transport =
      make_process_transport(process_transport(), num_ranks, kProcessTimeout);
  std::exception_ptr mine;
  if (transport) {
    const int rank = transport->rank();
    mine = try_rank(rank, std::move(transport), body, wrap);
  }
  std::string text;  // Code, number of ranks and ranks, a byte each; then the message.
  if (const auto failure = describe(mine)) {
    text += static_cast<char>(failure->code);
    text += static_cast<char>(failure->ranks.size());
    for (const int rank : failure->ranks) text += static_cast<char>(rank);
    text += failure->text;
  }
  const auto texts = gather_bytes(text);
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(num_ranks));
  for (std::size_t r = 0; r < failures.size(); ++r) {
    if (texts[r].empty()) continue;
    const auto ranks_end = texts[r].begin() + 2 + texts[r][1];
    failures[r] = std::make_exception_ptr(Error(static_cast<ErrorCode>(texts[r][0]),
                                                std::string(ranks_end, texts[r].end()),
                                                std::vector<int>(texts[r].begin() + 2, ranks_end)));
  }
  return failures;
}

/// Runs body(transport) once for each rank; returns what each threw, null for nothing.
template <class Body>
std::vector<std::exception_ptr> try_ranks(int num_ranks, const Body& body,
                                          const WrapTransport& wrap = {}) {
  if (ranks_are_processes()) return try_processes(num_ranks, body, wrap);
  auto transports = make_inproc_transports(num_ranks);
  return try_on_every_rank(num_ranks, [&](int rank) {
    std::unique_ptr<Transport> transport = std::move(transports[static_cast<std::size_t>(rank)]);
    if (wrap) transport = wrap(rank, std::move(transport));
    body(*transport);
  });
}

template <class Body>
void run_ranks(int num_ranks, const Body& body) {
  for (const auto& failure : try_ranks(num_ranks, body)) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace sluice::testing
