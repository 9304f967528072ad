// device.cuh - one rank's view of every rank's memory, inside a kernel.
//
// A DeviceWindow is a plain value, passed to kernels. All ranks' windows have the same layout, so
// an offset means the same everywhere. Offsets are in bytes; an index counts elements from there.
//
// Kernels reach other ranks by the operations below alone. There is one kind of window today: every
// rank's memory is addressable, so a put is a store or a bulk copy, and a signal is a store with
// release. Where the pointers come from (one process, CUDA IPC) is the transport's business.
// docs/adding-a-transport.md says what another kind has to do.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include "backend/cuda/ptx/bulk_store.cuh"
#include "backend/cuda/ptx/system.cuh"
#endif

namespace sluice {

/// Most ranks that one kernel addresses directly.
inline constexpr int kMaxDeviceRanks = 64;

struct DeviceWindow {
  std::byte* base[kMaxDeviceRanks];
  int rank, num_ranks;

#ifdef __CUDACC__
  /// This rank's own memory.
  template <class T>
  __device__ __forceinline__ T* own(std::size_t offset) const {
    return at<T>(rank, offset);
  }

  /// Writes element `index` of the array at `offset` of the peer's window. There before a later
  /// signal of this thread, or of a thread that it has synchronized with.
  template <class T>
  __device__ __forceinline__ void put(int peer, std::size_t offset, std::int64_t index,
                                      T value) const {
    at<T>(peer, offset)[index] = value;
  }

  /// The same for a word that arrives whole and proves by itself that it is new: no signal follows.
  __device__ __forceinline__ void put_word(int peer, std::size_t offset, std::int64_t index,
                                           std::uint64_t value) const {
    cuda::ptx::store_relaxed_sys(at<std::uint64_t>(peer, offset) + index, value);
  }

  /// Copies `bytes` from shared memory to byte `index` of the array at `offset`; a multiple of 16,
  /// and both ends 16 B aligned. It joins the thread's group of bulk puts, and runs on while the
  /// thread does. Shared memory that ordinary stores wrote needs fence_proxy_async_shared() first.
  __device__ __forceinline__ void put_bulk(int peer, std::size_t offset, std::int64_t index,
                                           const std::uint8_t* source, std::uint32_t bytes) const {
    cuda::ptx::bulk_store(at<std::uint8_t>(peer, offset) + index, source, bytes);
  }
  /// Closes the thread's group of bulk puts.
  __device__ __forceinline__ void close_puts() const {
    cuda::ptx::bulk_commit();
  }
  /// Waits until the sources of all but the thread's `Pending` newest groups may be written again.
  template <int Pending>
  __device__ __forceinline__ void wait_sources() const {
    cuda::ptx::bulk_wait_read<Pending>();
  }
  /// Waits until all of the thread's bulk puts are complete: a signal may follow.
  __device__ __forceinline__ void wait_puts() const {
    cuda::ptx::bulk_wait<0>();
  }

  /// Sets this rank's flag in the array of flags [num_ranks] u64 at `flags` of the peer's window.
  /// A peer that sees it also sees every put that was there before.
  __device__ __forceinline__ void signal(int peer, std::size_t flags, std::uint64_t value) const {
    cuda::ptx::store_release_sys(at<std::uint64_t>(peer, flags) + rank, value);
  }

  /// Adds to that flag instead, if several threads of this rank have a share in it. A peer that
  /// sees the sum also sees every put that was there before each of the shares.
  __device__ __forceinline__ void add_to_signal(int peer, std::size_t flags,
                                                std::uint64_t share) const {
    cuda::ptx::reduce_add_release_sys(at<std::uint64_t>(peer, flags) + rank, share);
  }

  /// Waits until rank `source` has set its flag at `flags` of the own window to `value` or more, or
  /// until give_up(), which is asked after each look in vain, says true. Returns the last look's
  /// flag.
  template <class GiveUp>
  __device__ __forceinline__ std::uint64_t wait(std::size_t flags, int source, std::uint64_t value,
                                                GiveUp&& give_up) const {
    const std::uint64_t* const flag = own<const std::uint64_t>(flags) + source;
    std::uint64_t seen = cuda::ptx::load_acquire_sys(flag);
    while (seen < value) {
      if (give_up()) break;
      seen = cuda::ptx::load_acquire_sys(flag);
    }
    return seen;
  }

  /// A word of the own window as it is now; orders nothing.
  __device__ __forceinline__ std::uint64_t word(std::size_t offset, std::int64_t index) const {
    return cuda::ptx::load_relaxed_sys(own<const std::uint64_t>(offset) + index);
  }

  /// A peer's memory, to be read after its signal. Only peers that are addressable have it.
  template <class T>
  __device__ __forceinline__ const T* pull(int peer, std::size_t offset) const {
    return at<const T>(peer, offset);
  }

 private:
  template <class T>
  __device__ __forceinline__ T* at(int peer, std::size_t offset) const {
    return reinterpret_cast<T*>(base[peer] + offset);
  }
#endif
};

}  // namespace sluice
