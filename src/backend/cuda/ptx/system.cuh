// system.cuh - words that several devices or processes share, and the clock they have in common.
// One instruction per function.
#pragma once

#include <cstdint>

namespace sluice::cuda::ptx {

__device__ __forceinline__ std::uint64_t load_acquire_sys(const std::uint64_t* p) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}

/// For words that carry their own proof of freshness: orders nothing else.
__device__ __forceinline__ std::uint64_t load_relaxed_sys(const std::uint64_t* p) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(p));
  return value;
}

__device__ __forceinline__ void store_release_sys(std::uint64_t* p, std::uint64_t value) {
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(std::uint64_t* p, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

/// Adds to a word once everything before it, of this thread and of those that it has synchronized
/// with, is there.
__device__ __forceinline__ void reduce_add_release_sys(std::uint64_t* p, std::uint64_t value) {
  asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

/// Nanoseconds; the same clock on every SM.
__device__ __forceinline__ std::uint64_t global_timer() {
  std::uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

}  // namespace sluice::cuda::ptx
