// config.h - the process environment, read in one place.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "sluice/recipe.h"

namespace sluice {

/// What the environment says. Everything here can also be set by the API, which wins.
struct Environment {
  DispatchDtype dispatch_dtype = DispatchDtype::kAuto;  ///< SLUICE_DISPATCH_DTYPE
  std::chrono::milliseconds peer_timeout{10'000};       ///< SLUICE_TIMEOUT_MS, 1 .. 3'600'000
};

/// Throws: kInvalidArgument naming the variable, its value and what it may be.
[[nodiscard]] Environment read_environment();

/// Which rank this process is in a job of one process per rank.
struct JobPlace {
  int rank = 0, num_ranks = 1;
  int num_ranks_on_host = 1;
  std::string job;              ///< What only the processes of this job have in common.
  std::string secret;           ///< What they prove to each other. SLUICE_SECRET, or else `job`.
  bool has_own_secret = false;  ///< SLUICE_SECRET is set.
  /// Where processes of several hosts meet, "host:port" of rank 0: SLUICE_MEETING, or MASTER_ADDR
  /// and the port after MASTER_PORT, at which torchrun listens itself. Empty if neither is set.
  std::string meeting;
};

/// The first launcher whose variables are set: sluice (SLUICE_RANK, SLUICE_WORLD_SIZE, SLUICE_JOB,
/// SLUICE_LOCAL_WORLD_SIZE), torchrun (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
/// MASTER_PORT), mpirun (OMPI_COMM_WORLD_*, OMPI_MCA_ess_base_jobid) or srun (SLURM_*). Nothing if
/// there was none.
/// Throws: kInvalidArgument naming the variable, its value and what it may be.
[[nodiscard]] std::optional<JobPlace> read_job_place();

/// Names this host: the same in all processes on it, and in no other. NCCL_HOSTID if it is set, as
/// NCCL does, so that a part of a host can be taken for a host of its own; otherwise host name and
/// boot.
[[nodiscard]] std::string host_id();

/// "0.1.0"
[[nodiscard]] const char* version() noexcept;

}  // namespace sluice
