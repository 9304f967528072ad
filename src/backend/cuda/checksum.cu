// checksum.cu - core/checksum.h on the device.
//
// Maths     sum over i of mix64(word[i] + (first_word + i + 1) * c), modulo 2^64
// Tile      each thread takes every 16-byte vector of its own stride; sums meet by atomics, which
//           may come in any order.
// Needs     bytes aligned to 16, a multiple of 16 of them.
// Bound     bytes: each is read once.
#include <cuda_runtime.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/checksum_kernel.h"

namespace sluice::cuda {
namespace {

constexpr int kThreads = 512;

__device__ unsigned long long mix(unsigned long long z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

__global__ void __launch_bounds__(kThreads)
    checksum_kernel(const ulonglong2* data, long long num_vectors, unsigned long long first_word,
                    unsigned long long* sum) {
  constexpr unsigned long long kStep = 0x9e3779b97f4a7c15ull;
  unsigned long long mine = 0;
  const long long stride = static_cast<long long>(gridDim.x) * kThreads;
  for (long long i = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; i < num_vectors;
       i += stride) {
    const ulonglong2 words = __ldcs(data + i);
    const unsigned long long at = first_word + 2 * static_cast<unsigned long long>(i) + 1;
    mine += mix(words.x + at * kStep) + mix(words.y + (at + 1) * kStep);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) mine += __shfl_down_sync(0xffffffffu, mine, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, mine);
}

}  // namespace

void launch_checksum(const void* bytes, std::size_t num_bytes, std::uint64_t first_word,
                     unsigned long long* sum, int num_sms, StreamHandle stream) {
  const auto vectors = static_cast<long long>(num_bytes / sizeof(ulonglong2));
  if (vectors == 0) return;
  const long long blocks = std::min<long long>((vectors + kThreads - 1) / kThreads, 4ll * num_sms);
  checksum_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                    static_cast<cudaStream_t>(stream)>>>(static_cast<const ulonglong2*>(bytes),
                                                         vectors, first_word, sum);
  SLUICE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace sluice::cuda
