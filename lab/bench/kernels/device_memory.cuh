// device_memory.cuh - device memory and numbers from a seed, for the checker and the benchmark.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "backend/cuda/check.h"

namespace sluice::cuda::bench {

/// Device memory that lives as long as the object.
template <class T>
struct Buffer {
  T* data = nullptr;
  std::size_t size = 0;
  Buffer() = default;
  explicit Buffer(std::size_t n) : size(n) {
    if (n > 0) SLUICE_CUDA_CHECK(cudaMalloc(&data, n * sizeof(T)));
  }
  Buffer(Buffer&& o) noexcept : data(o.data), size(o.size) {
    o.data = nullptr;
    o.size = 0;
  }
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data, o.data);
    std::swap(size, o.size);
    return *this;
  }
  ~Buffer() { cudaFree(data); }
  void fill(int byte) { SLUICE_CUDA_CHECK(cudaMemset(data, byte, size * sizeof(T))); }
  void upload(const std::vector<T>& v) {
    SLUICE_CUDA_CHECK(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    std::vector<T> v(size);
    SLUICE_CUDA_CHECK(cudaMemcpy(v.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
};

__host__ __device__ inline std::uint32_t hash(std::uint64_t x) {
  x = (x + 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 31)) * 0x94d049bb133111ebull;
  return static_cast<std::uint32_t>(x >> 32);
}

/// kUniform: every code is equally likely. The hardest case for correctness, and for power.
/// kNormal: what a checkpoint and a quantizer produce: normal values, largest magnitude on the
/// scale's end.
enum class Data { kUniform, kNormal };

__device__ inline float normal(std::uint32_t r) {
  const float u = ((r & 0xffff) + 0.5f) * 0x1p-16f, v = (r >> 16) * 0x1p-16f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

}  // namespace sluice::cuda::bench
