#include <cuda_runtime.h>

#include "backend/cuda/check.h"
#include "backend/cuda/fp8_rate.h"
#include "backend/cuda/ptx/sync.cuh"
#include "backend/cuda/sm90_w4a8/mainloop.cuh"
#include "backend/cuda/timed_passes.h"

namespace sluice::cuda {
namespace {

constexpr int kWarpgroups = 2;  // One waits for its sums while the other multiplies.
constexpr int kColumns = 128, kStepProducts = 64 * kColumns * kStepK;
constexpr int kSteps = 16384;

/// Any finite e4m3 code in each byte.
__device__ unsigned random_codes(unsigned i) {
  i = (i + 1) * 0x9e3779b9u;
  i = (i ^ i >> 15) * 0x85ebca6bu;
  return (i ^ i >> 13) & 0xfefefefeu;
}

/// A from registers and B from shared memory, as in the expert kernel; sums grow over all steps.
__global__ void __launch_bounds__(128 * kWarpgroups) fp8_kernel(float* sink) {
  __shared__ alignas(1024) unsigned tile[kColumns * kStepK / 4];
  for (unsigned i = threadIdx.x; i < kColumns * kStepK / 4; i += blockDim.x)
    tile[i] = random_codes(i);
  ptx::fence_proxy_async();
  __syncthreads();
  Fragments f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    f.a[i / 4][i % 4] = random_codes(threadIdx.x * 16 + static_cast<unsigned>(i));
  }
  float acc[kColumns / 2];
  clear(acc);
  const std::uint32_t x = ptx::smem_descriptor(ptx::shared_address(tile));
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::wgmma_m64k32(acc, f.a[i], x + 2 * i, true);
    ptx::wgmma_commit();
    await<0>(acc);
  }
  float total = 0;
#pragma unroll
  for (const float value : acc) total += value;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

}  // namespace

double measure_fp8_rate(int num_sms) {
  constexpr int kThreads = 128 * kWarpgroups;
  float* sink = nullptr;
  SLUICE_CUDA_CHECK(
      cudaMalloc(&sink, sizeof(float) * kThreads * static_cast<std::size_t>(num_sms)));
  const double seconds = median_seconds(19, [&] { fp8_kernel<<<num_sms, kThreads>>>(sink); });
  SLUICE_CUDA_CHECK(cudaFree(sink));
  return 2.0 * kStepProducts * kSteps * kWarpgroups * num_sms / seconds;
}

}  // namespace sluice::cuda
