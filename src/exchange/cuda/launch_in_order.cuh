// launch_in_order.cuh - how the kernels of the exchange are launched.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "backend/cuda/check.h"

namespace sluice::cuda {

/// Launches a kernel that begins with ptx::wait_for_earlier_kernels(). The device may set its CTAs
/// up once all CTAs of the kernel before it on the stream have ended or have announced that it may.
///
/// Kernels of the exchange never announce it: no CTA is parked behind a kernel that waits for other
/// ranks. The experts' kernels do (backend/cuda/launch.cuh), and they wait for no other rank. So
/// once they have ended each rank has one waiting kernel at most, and that fits into its share of
/// the SMs.
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
