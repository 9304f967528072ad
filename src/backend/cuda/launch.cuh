// launch.cuh - kernels that start while the kernel before them on the stream still ends.
//
//   kernel n     ...work...............|ends|
//   kernel n + 1            |set-up|waits...|work...      programmatic dependent launch
//
// Both halves of the contract: a kernel started by launch_early() calls follow_predecessor() in
// every thread before it touches global memory. A kernel that waits for other ranks never lets its
// successor start early: CTAs parked behind it could keep those ranks' kernels off the device.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/check.h"
#include "backend/cuda/kernel_list.h"

namespace sluice::cuda {

/// Waits until all earlier work of the stream is done and visible, then lets the next kernel set
/// itself up wherever this one leaves room.
__device__ __forceinline__ void follow_predecessor() {
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
}

struct LaunchSize {
  int blocks = 1, threads = 1, shared_bytes = 0, blocks_y = 1;
};

/// While this thread has a list, the launch goes there.
template <class Params>
void launch_early(void (*kernel)(Params), const LaunchSize& size, const Params& params,
                  cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(size.blocks), static_cast<unsigned>(size.blocks_y));
  const dim3 threads(static_cast<unsigned>(size.threads));
  const auto shared_bytes = static_cast<std::size_t>(size.shared_bytes);
  if (thread_list != nullptr) {
    thread_list->add(reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, params);
    return;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  SLUICE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace sluice::cuda
