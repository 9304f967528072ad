// mpi_start.h - starts MPI for the transport, or joins the program's, and what its calls share.
//
// Only for the sources of the transport: it includes mpi.h.
#pragma once

#include <mpi.h>

#include <chrono>
#include <thread>
#include <vector>

namespace sluice {

/// Throws: kTransport with what MPI says about `status`, and `ranks` to blame, unless it is a
/// success.
void check_mpi(int status, const char* call, std::vector<int> ranks = {});

/// Every call of MPI goes through here.
#define SLUICE_MPI(function, ...) ::sluice::check_mpi(function(__VA_ARGS__), #function)

/// Polls often at first, then sleeps: a rank that waits long leaves the core to the others.
class Backoff {
 public:
  void pause() {
    if (++rounds_ < 50) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(rounds_ < 500 ? 20 : 200));
    }
  }
  void reset() noexcept { rounds_ = 0; }

 private:
  int rounds_ = 0;
};

/// What a process has once MPI runs.
struct MpiStart {
  int rank = 0, num_ranks = 0;
  bool owns_mpi = false;          ///< The program had not started MPI; whoever ends it is to.
  MPI_Comm comm = MPI_COMM_NULL;  ///< The transport's own: no message of the program is in it.
};

/// Collective over all processes of the job. Throws: kPeerTimeout naming the processes that did not
/// come; kTransport naming one of another version; kUnsupported if MPI runs with too little thread
/// support.
[[nodiscard]] MpiStart start_mpi(std::chrono::milliseconds timeout);

}  // namespace sluice
