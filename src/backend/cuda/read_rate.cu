#include <cuda_runtime.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/read_rate.h"
#include "backend/cuda/timed_passes.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;  // Independent 16-byte loads in flight per thread.

/// Reads everything; the xor keeps the loads alive and is written only if it hits an impossible
/// value.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* data, long long num_vectors, unsigned* sink) {
  unsigned value = 0;
  const long long stride = static_cast<long long>(gridDim.x) * kThreads * kLoads;
  for (long long base = static_cast<long long>(blockIdx.x) * kThreads * kLoads + threadIdx.x;
       base < num_vectors; base += stride) {
    uint4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const long long at = base + static_cast<long long>(i) * kThreads;
      v[i] = at < num_vectors ? __ldcs(data + at) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) value ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (value == 0x9e3779b9u) *sink = value;
}

}  // namespace

double measure_read_rate(int num_sms) {
  std::size_t free_bytes = 0, total_bytes = 0;
  SLUICE_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
  const std::size_t bytes = std::min<std::size_t>(std::size_t{4} << 30, free_bytes / 2) / 256 * 256;
  void* data = nullptr;
  SLUICE_CUDA_CHECK(cudaMalloc(&data, bytes + 256));
  unsigned* sink = reinterpret_cast<unsigned*>(static_cast<char*>(data) + bytes);
  SLUICE_CUDA_CHECK(cudaMemset(data, 0x5a, bytes + 256));
  const double seconds = median_seconds(5, [&] {
    read_kernel<<<num_sms * 4, kThreads>>>(static_cast<const uint4*>(data),
                                           static_cast<long long>(bytes / sizeof(uint4)), sink);
  });
  SLUICE_CUDA_CHECK(cudaFree(data));
  return static_cast<double>(bytes) / seconds;
}

}  // namespace sluice::cuda
