#include "engine/mover_memory.h"

#include <utility>

#include "backend/traits.h"

namespace sluice {

MoverMemory::MoverMemory(BackendOps& backend, std::size_t bytes) : bytes_(bytes) {
  if (!traits_of(backend.device().kind).has_host_memory) unshared_ = backend.allocate(bytes);
}

void MoverMemory::connect(Transport& transport, std::chrono::milliseconds timeout) {
  constexpr std::size_t kFlagsAlone = 128;
  rank_ = transport.rank();
  const std::size_t window_bytes = unshared_ ? kFlagsAlone : bytes_;
  if (unshared_) {
    std::shared_ptr<std::byte> mine(unshared_, unshared_->data());
    unshared_.reset();
    shared_ = transport.share_device_memory(std::move(mine), bytes_, timeout);
  }
  window_ = transport.make_window(window_bytes, 2 * transport.num_ranks(), timeout);
}

std::byte* MoverMemory::local() const {
  return shared_.empty() ? window_->local() : of_rank(rank_);
}

std::byte* MoverMemory::of_rank(int rank) const {
  return shared_.empty() ? nullptr : shared_[static_cast<std::size_t>(rank)].get();
}

}  // namespace sluice
