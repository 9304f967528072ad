// timed_passes.h - the time of a kernel, for the rates that a device is measured by.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "backend/cuda/check.h"

namespace sluice::cuda {

/// Median of the seconds that the device takes for what launch() queues on the default stream:
/// `num_passes` times, an odd number, after two that warm up.
template <class Launch>
[[nodiscard]] double median_seconds(int num_passes, const Launch& launch) {
  constexpr int kWarmUp = 2;
  cudaEvent_t begin, end;
  SLUICE_CUDA_CHECK(cudaEventCreate(&begin));
  SLUICE_CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> ms(static_cast<std::size_t>(kWarmUp + num_passes));
  for (float& pass : ms) {
    SLUICE_CUDA_CHECK(cudaEventRecord(begin));
    launch();
    SLUICE_CUDA_CHECK(cudaEventRecord(end));
    SLUICE_CUDA_CHECK(cudaEventSynchronize(end));
    SLUICE_CUDA_CHECK(cudaEventElapsedTime(&pass, begin, end));
  }
  SLUICE_CUDA_CHECK(cudaEventDestroy(begin));
  SLUICE_CUDA_CHECK(cudaEventDestroy(end));
  std::sort(ms.begin() + kWarmUp, ms.end());
  return static_cast<double>(ms[static_cast<std::size_t>(kWarmUp + num_passes / 2)]) * 1e-3;
}

}  // namespace sluice::cuda
