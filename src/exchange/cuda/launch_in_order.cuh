// launch_in_order.cuh - how the kernels of the exchange are launched.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "backend/cuda/check.h"
#include "backend/cuda/ptx/grid.cuh"
#include "exchange/cuda/exchange_kernels.h"

namespace sluice::cuda {

/// The first step of every kernel that launch_in_order() launches.
__device__ inline void begin_in_order(const SlotParams& p) {
  ptx::wait_for_earlier_kernels();
  if (p.is_alone) ptx::allow_next_kernel();
}

/// Launches a kernel that begins with begin_in_order(). The device may set its CTAs up once all
/// CTAs of the kernel before it on the stream have ended or have announced that it may.
///
/// Where ranks share a device, kernels of the exchange do not announce it: no CTA is parked behind
/// a kernel that waits for other ranks. The experts' kernels do (backend/cuda/launch.cuh), and they
/// wait for no other rank. So once they have ended each rank has one waiting kernel at most, and
/// that fits into its share of the SMs. A rank that is alone on its device keeps nobody out, so
/// there the experts' CTAs are set up while the last flags are on their way.
template <class... Parameters, class... Arguments>
void launch_in_order(void (*kernel)(Parameters...), int num_ctas, int threads, int shared_bytes,
                     void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  SLUICE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace sluice::cuda
