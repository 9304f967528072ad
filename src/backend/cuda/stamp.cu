#include "backend/cuda/stamp.h"

#include <cuda_runtime.h>

#include "backend/cuda/check.h"
#include "backend/cuda/ptx/system.cuh"

namespace sluice::cuda {
namespace {

__global__ void stamp_kernel(std::uint64_t* at) {
  *at = ptx::global_timer();
}

}  // namespace

void launch_stamp(std::uint64_t* at, void* stream) {
  stamp_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(at);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
