// bulk_store.cuh - asynchronous copies from shared to global memory. One instruction per function.
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/mbarrier.cuh"

namespace sluice::cuda::ptx {

/// `bytes` contiguous bytes, a multiple of 16, both ends 16 B aligned; part of the thread's next
/// group. Shared memory written by ordinary stores needs fence_proxy_async() first.
__device__ __forceinline__ void bulk_store(void* dst, const void* src, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
               "r"(shared_address(src)), "r"(bytes)
               : "memory");
}

/// Closes the thread's group of bulk stores.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until all but the thread's latest `Pending` groups have read their shared memory.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

/// Waits until all but the thread's latest `Pending` groups have written their global memory.
template <int Pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace sluice::cuda::ptx
