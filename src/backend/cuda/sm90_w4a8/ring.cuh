// ring.cuh - how math warps take stages from the ring.
#pragma once

#include "backend/cuda/sm90_w4a8/unit.cuh"

namespace sluice::cuda {

/// Waits for the next stage of the ring and returns its index.
template <class C>
__device__ __forceinline__ int acquire(Shared<C>& s, Ring& ring) {
  const int stage = ring.stage;
  wait(&s.full[stage], ring.parity);
  ring.advance<C::kStages>();
  return stage;
}

/// Waits until the stage at a place of the ring is full, for a warp that may have products in
/// flight: its lanes leave together.
template <class C>
__device__ __forceinline__ void wait_together(Shared<C>& s, const Ring& at) {
  while (!__all_sync(0xffffffffu, ptx::mbarrier_try_wait(&s.full[at.stage], at.parity))) {
  }
}

/// The same as acquire() for such a warp.
template <class C>
__device__ __forceinline__ int acquire_together(Shared<C>& s, Ring& ring) {
  const int stage = ring.stage;
  wait_together(s, ring);
  ring.advance<C::kStages>();
  return stage;
}

template <class C>
__device__ __forceinline__ Ring after(Ring at) {
  at.advance<C::kStages>();
  return at;
}

/// From here on ptxas knows that a warp's lanes are together, and keeps what they share in uniform
/// registers, also around a loop whose first step stands before it.
__device__ __forceinline__ void gather_lanes() {
  ptx::wgmma_fence();
}

/// A value that all lanes share, where the compiler cannot know it: goes to a uniform register.
__device__ __forceinline__ int uniform(int v) {
  return static_cast<int>(__reduce_or_sync(0xffffffffu, static_cast<unsigned>(v)));
}
__device__ __forceinline__ std::uint32_t uniform(std::uint32_t v) {
  return __reduce_or_sync(0xffffffffu, v);
}
__device__ __forceinline__ Ring uniform(const Ring& ring) {
  return {uniform(ring.stage), uniform(ring.parity)};
}

}  // namespace sluice::cuda
