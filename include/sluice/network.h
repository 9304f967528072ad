// network.h - where processes on several hosts meet.
#pragma once

#include <string>
#include <vector>

namespace sluice {

/// Where the processes of a job meet over TCP. What the secret protects is who may join: it is
/// proved by challenge and response, and never sent. What joined processes say to each other is
/// neither encrypted nor signed, as the messages of NCCL and MPI are not, so the network between
/// the hosts must be one that is trusted.
struct TcpConfig {
  /// Where rank 0 can be reached: "host:port" or "[host]:port". Rank 0 listens at the first one,
  /// which must be an address of its host, or "0.0.0.0:port" or "[::]:port" for all of them. The
  /// other ranks try them in turn.
  std::vector<std::string> addresses = {};
  std::string secret = {};  ///< The same in all processes of the job, and in no other.
  int rank = 0, num_ranks = 1;
  /// Rank 0: a socket that listens already, to take over and to close. -1: none.
  int listener = -1;
};

}  // namespace sluice
