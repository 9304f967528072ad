// kernel_list.h - launches of this thread that are noted instead of made: launch.cuh,
// kernel_chain.h.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>

#include "sluice/error.h"

namespace sluice::cuda {

/// A launch of a kernel with one parameter, whose bytes are copied.
struct ListedKernel {
  static constexpr std::size_t kMostBytes = 4096;

  const void* kernel = nullptr;
  dim3 blocks, threads;
  std::size_t shared_bytes = 0, num_bytes = 0;
  alignas(64) std::array<std::byte, kMostBytes> parameter;

  /// Bytes between the members of a parameter count: a difference there costs time, no more.
  [[nodiscard]] bool is_same(const ListedKernel& other) const noexcept {
    const auto same = [](const dim3& a, const dim3& b) {
      return a.x == b.x && a.y == b.y && a.z == b.z;
    };
    return kernel == other.kernel && same(blocks, other.blocks) && same(threads, other.threads) &&
           shared_bytes == other.shared_bytes && num_bytes == other.num_bytes &&
           std::memcmp(parameter.data(), other.parameter.data(), num_bytes) == 0;
  }
  void assign(const ListedKernel& other) noexcept {
    kernel = other.kernel, blocks = other.blocks, threads = other.threads;
    shared_bytes = other.shared_bytes, num_bytes = other.num_bytes;
    std::memcpy(parameter.data(), other.parameter.data(), num_bytes);
  }
};

class KernelList {
 public:
  static constexpr std::size_t kMost = 8;

  /// Throws: kInternal for one too many.
  template <class Parameter>
  void add(const void* kernel, const dim3& blocks, const dim3& threads, std::size_t shared_bytes,
           const Parameter& parameter) {
    static_assert(sizeof(Parameter) <= ListedKernel::kMostBytes);
    if (size_ == kMost) {
      throw Error(ErrorCode::kInternal,
                  "a chain has more kernels than " + std::to_string(std::size_t{kMost}));
    }
    ListedKernel& next = kernels_.at(size_++);
    next.kernel = kernel, next.blocks = blocks, next.threads = threads;
    next.shared_bytes = shared_bytes, next.num_bytes = sizeof(Parameter);
    std::memcpy(next.parameter.data(), &parameter, sizeof(Parameter));
  }
  void clear() noexcept { size_ = 0; }
  [[nodiscard]] std::span<ListedKernel> kernels() noexcept { return {kernels_.data(), size_}; }

 private:
  std::array<ListedKernel, kMost> kernels_;
  std::size_t size_ = 0;
};

/// Where launch_early() puts this thread's launches; null: it makes them.
inline constinit thread_local KernelList* thread_list = nullptr;

}  // namespace sluice::cuda
