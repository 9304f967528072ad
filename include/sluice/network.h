// network.h - ranks as processes of several hosts: where they meet, and NCCL between them.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/config.h"
#include "sluice/transport.h"

namespace sluice {

/// Where the processes of a job meet over TCP. What the secret protects is who may join: it is
/// proved by challenge and response, and never sent. What joined processes say to each other is
/// neither encrypted nor signed, as the messages of NCCL and MPI are not, so the network between
/// the hosts must be one that is trusted.
struct TcpConfig {
  /// Where rank 0 can be reached: "host:port" or "[host]:port". Rank 0 listens at the first one: at
  /// that address of its host, or at all of them for "0.0.0.0:port", "[::]:port" and any name but
  /// localhost, which may stand for something else on rank 0's host. The other ranks try them in
  /// turn, and all that a name stands for.
  std::vector<std::string> addresses = {};
  std::string secret = {};  ///< The same in all processes of the job, and in no other: at least 16
                            ///< bytes, drawn at random.
  int rank = 0, num_ranks = 1;
  /// Rank 0: a socket that listens already, to take over and to close. -1: none.
  int listener = -1;
};

/// A group that the caller has: torch.distributed's, an MPI communicator, another Transport.
struct ProcessGroup {
  int rank = 0, num_ranks = 1;
  /// Collective: every rank's bytes, as many on each, ordered by rank.
  std::function<std::vector<std::vector<std::byte>>(std::span<const std::byte>)> all_gather;
};

struct NcclConfig {
  int device = 0;  ///< CUDA device of this rank. -1: by its place among the ranks of its host.
  std::string host = {};  ///< This process's host; ranks with equal ones share one. "": host_id().
  std::string library = {};  ///< Path of NCCL. "": the one that the process has loaded, or else the
                             ///< loader's libnccl.so.2.
};

/// Ranks as processes that each have a GPU, on any number of hosts with as many ranks on each.
/// Within a host they share device memory as over ipc, and a group of one host is a group over ipc.
/// Between hosts NCCL connects the ranks of one local index. `meeting` is for set-up, and finds out
/// whom to name if something fails.
/// Ranks: collective.
/// Throws: kUnsupported without NCCL 2.28 or a CUDA device, or if hosts have different numbers of
///   ranks; kInvalidArgument; kPeerTimeout naming the ranks that did not come; kTransport.
[[nodiscard]] std::unique_ptr<Transport> make_nccl_transport(const NcclConfig& config,
                                                             const TcpConfig& meeting,
                                                             std::chrono::milliseconds timeout);

/// The same, for processes that have a group. It is used once, to agree on a meeting place.
[[nodiscard]] std::unique_ptr<Transport> make_nccl_transport(const NcclConfig& config,
                                                             const ProcessGroup& group,
                                                             std::chrono::milliseconds timeout);

/// The same, for processes that a launcher started. On one host they need no meeting place.
/// Throws also: kInvalidArgument naming the variable that is missing or too short, SLUICE_MEETING
///   or SLUICE_SECRET, before anything else is tried.
[[nodiscard]] std::unique_ptr<Transport> make_nccl_transport(const NcclConfig& config,
                                                             const JobPlace& place,
                                                             std::chrono::milliseconds timeout);

/// The ranks of a communicator that the caller has: an ncclComm_t, as an opaque handle, of the
/// library that `config` names. all_gather() takes a stream and a little memory of its device, and
/// no longer than the timeout. The communicator stays the caller's, who uses it before and after,
/// and not at the same time: rails need communicators of their own, one for each local rank.
/// Throws: kUnsupported without NCCL 2.28; kInvalidArgument for a null handle. all_gather() throws
///   kTransport with what NCCL says; kPeerTimeout, and the communicator is then of no more use;
///   kInvalidArgument for 0 bytes, for which NCCL waits for nobody.
[[nodiscard]] ProcessGroup group_of_communicator(void* nccl_comm, const NcclConfig& config,
                                                 std::chrono::milliseconds timeout);

/// A meeting place for the ranks of `group`: a free port of rank 0's host, all addresses that the
/// host has, and a new secret. Rank 0 listens already.
/// Ranks: collective. Throws: kTransport; what the group throws.
[[nodiscard]] TcpConfig agree_on_meeting(const ProcessGroup& group);

}  // namespace sluice
