// device.cuh - one rank's view of every rank's memory, inside a kernel.
//
// A DeviceWindow is a plain struct over base pointers, passed to kernels by value. Where the
// pointers come from (one process, CUDA IPC) is the transport's business; kernels only add offsets.
// All ranks' windows have the same layout, so an offset means the same everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sluice {

/// Most ranks that one kernel addresses directly.
inline constexpr int kMaxDeviceRanks = 64;

struct DeviceWindow {
  std::byte* base[kMaxDeviceRanks];
  int rank, num_ranks;

#ifdef __CUDACC__
  template <class T>
  __device__ __forceinline__ T* at(int peer, std::size_t offset) const {
    return reinterpret_cast<T*>(base[peer] + offset);
  }
  template <class T>
  __device__ __forceinline__ T* own(std::size_t offset) const {
    return at<T>(rank, offset);
  }
#endif
};

}  // namespace sluice
