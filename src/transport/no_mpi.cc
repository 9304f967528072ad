// The MPI transport of a build without MPI: a refusal.
#include "core/fail.h"
#include "sluice/transport.h"

namespace sluice {
std::unique_ptr<Transport> make_mpi_transport(std::chrono::milliseconds, int) {
  fail(ErrorCode::kUnsupported,
       "transport 'mpi' is not in this build: configure with SLUICE_MPI=ON");
}

bool end_mpi(std::chrono::milliseconds) {
  return true;
}

}  // namespace sluice
