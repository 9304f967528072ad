// How the processes of a job end MPI together, or leave it as it is.
#include <algorithm>

#include "transport/mpi_link_impl.h"

namespace sluice {

using std::chrono::milliseconds;

bool MpiLink::Impl::all_said(Farewell farewell) const {
  return std::ranges::all_of(peers,
                             [&](const Peer& p) { return p.farewell && *p.farewell >= farewell; });
}

bool MpiLink::Impl::somebody_leaves() const {
  return std::ranges::any_of(peers, [](const Peer& p) { return p.farewell == Farewell::kLeaves; });
}

bool MpiLink::exchange_farewells(Farewell farewell, milliseconds timeout) {
  try {
    for (int r = 0; r < impl_->num_ranks; ++r) {
      send(r, {.kind = RecordKind::kGoodbye, .at = static_cast<std::uint64_t>(farewell)}, {},
           timeout);
      ship(r, timeout);
    }
    const bool all = wait_until(Impl::Clock::now() + timeout, [&] {
      return impl_->somebody_leaves() || (impl_->all_said(farewell) && impl_->all_sent());
    });
    const std::lock_guard lock(impl_->mutex);
    return all && !impl_->somebody_leaves();
  } catch (const Error&) {
    return false;  // Whoever needs to know why has been told by the operation that failed.
  }
}

// A process that gives up leaves without MPI_Finalize, which would then keep a late one for ever.
// So it says that it leaves; and nobody ends MPI who has not heard from all that they heard all.
bool MpiLink::end(milliseconds timeout) {
  auto& link = the_link();
  if (!link) return true;
  Impl& impl = *link->impl_;
  impl.require_home();
  const bool all = link->exchange_farewells(Farewell::kGoodbye, timeout) &&
                   link->exchange_farewells(Farewell::kHeardAll, timeout);
  if (!all) (void)link->exchange_farewells(Farewell::kLeaves, milliseconds(0));
  impl.stop_thread();
  if (all) {
    SLUICE_MPI(MPI_Comm_free, &impl.comm);
    if (impl.owns_mpi) SLUICE_MPI(MPI_Finalize);
  }
  link.reset();
  return all;
}

}  // namespace sluice
