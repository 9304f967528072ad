// check.h - CUDA calls that fail throw sluice::Error and leave no sticky error behind.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "sluice/error.h"

/// Evaluates a call that returns cudaError_t; throws kCuda (kOutOfMemory for allocations).
#define SLUICE_CUDA_CHECK(call)                                                               \
  do {                                                                                        \
    const cudaError_t sluice_status = (call);                                                 \
    if (sluice_status != cudaSuccess) ::sluice::cuda::throw_cuda_error(sluice_status, #call); \
  } while (false)

namespace sluice::cuda {

[[noreturn]] inline void throw_cuda_error(cudaError_t status, const char* call) {
  (void)cudaGetLastError();
  const ErrorCode code =
      status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kCuda;
  throw Error(code, std::string(call) + ": " + cudaGetErrorString(status));
}

}  // namespace sluice::cuda
