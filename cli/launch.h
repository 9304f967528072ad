// launch.h - where the ranks of a run are: threads of this process, or processes of a job.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "sluice/error.h"
#include "sluice/hosts.h"
#include "sluice/transport.h"

namespace sluice::cli {

struct Output;

/// For `--transport ipc` where nobody has started processes yet: starts `num_ranks` of them with
/// this program's arguments and waits for them. True if it did, and there is nothing left to do
/// here: the exit status is theirs, and rank 0 has written the files.
[[nodiscard]] bool ran_as_processes(const std::string& transport, int num_ranks,
                                    std::chrono::milliseconds timeout, Output& output);

/// Throws: kInvalidArgument if `transport` cannot move the memory of `backend`.
void check_transport(const std::string& transport, const std::string& backend);

class Launch {
 public:
  /// `transport`: inproc, mpi, ipc or nccl. `num_ranks` 0 = one, or one for each process of the
  /// job; any other number must be that of the processes. All processes but rank 0 lose their
  /// standard output and write no files.
  Launch(const std::string& transport, int num_ranks, std::chrono::milliseconds timeout,
         Output& output);

  [[nodiscard]] int num_ranks() const noexcept { return num_ranks_; }
  [[nodiscard]] bool has_processes() const noexcept { return has_processes_; }
  /// The one that prints, verifies and writes.
  [[nodiscard]] bool is_reporter() const noexcept { return rank_ == 0; }

  /// Where `rank` of this process stands among the ranks of its machine, or over nccl of its host.
  struct Place {
    int local_rank = 0, num_local_ranks = 1;
  };
  [[nodiscard]] Place place_of(int rank) const;

  /// [num_ranks] host_id() of each rank; empty where ranks are threads.
  [[nodiscard]] const std::vector<std::string>& hosts() const noexcept { return hosts_; }
  /// Which rank is on which host, where the transport finds that out; else one host.
  [[nodiscard]] Hosts transport_hosts() const { return world_ ? world_->hosts() : Hosts(); }

  /// Runs `body` on every process, none of which goes on if it failed on any: all throw the same
  /// cause, naming its rank. A rank that does not even say so is named by the timeout.
  void together(const std::function<void()>& body);

  struct Option {
    const char* name;
    std::string value;
  };
  /// Processes may have been started with command lines of their own. Throws: kTransport on
  /// every rank, naming the first option that a rank has otherwise than rank 0, and both values.
  /// Requires: all give the same names in the same order.
  void check_alike(const std::vector<Option>& options);

  /// Runs body(rank, transport) for every rank, each on a thread or in its process, and returns
  /// what each returned; over processes, on the reporter only. Throws: the first cause; ranks that
  /// waited for a failed one do not count as causes.
  [[nodiscard]] std::vector<std::string> run_ranks(
      const std::function<std::string(int, Transport&)>& body);

  /// The last call. Over processes the others then have nothing left to do.
  void finish();

 private:
  [[nodiscard]] std::vector<std::string> gather(std::string mine,
                                                std::chrono::milliseconds timeout) const;
  void find_place();
  int rank_ = 0, num_ranks_ = 1;
  bool has_processes_ = false, is_mpi_ = false;
  std::chrono::milliseconds timeout_;
  Output& output_;
  std::vector<std::string> hosts_;
  Place place_;                       // Of this process's rank, over processes.
  std::unique_ptr<Transport> world_;  // Null where ranks are threads, and after finish().
};

}  // namespace sluice::cli
