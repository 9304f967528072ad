// carveout.h - one split of an SM's memory for every kernel of a layer.
#pragma once

#include <cuda_runtime.h>

#include "backend/cuda/check.h"

namespace sluice::cuda {

/// Lets `kernel` ask for the split that the experts' kernels need: as much shared memory as there
/// is. A kernel that asked for another split would have to wait until the SM is empty.
inline void prefer_shared_memory(const void* kernel) {
  SLUICE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared));
}
template <class... Params>
void prefer_shared_memory(void (*kernel)(Params...)) {
  prefer_shared_memory(reinterpret_cast<const void*>(kernel));
}

}  // namespace sluice::cuda
