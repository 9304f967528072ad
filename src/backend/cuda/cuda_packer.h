// cuda_packer.h - how matrices that threads read in host memory get into a layer's experts.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "backend/cuda/w4a8.h"
#include "backend/ops.h"
#include "sluice/checkpoint.h"

namespace sluice::cuda {

/// Bytes that codes and scales of a matrix take in device memory, each aligned to 256.
[[nodiscard]] std::size_t staging_bytes(const QuantMatrix& matrix);

/// What the threads of all loads share. Page-locked host memory, kept for the next load: locking
/// pages takes as long as reading them. And one stream for the copies of all threads: a copy engine
/// that changes from stream to stream stands still for 7 us between two copies.
/// Threads: any.
class PinnedPool {
 public:
  explicit PinnedPool(int device) : device_(device) {}
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  struct Block {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
  };
  /// Throws: kOutOfMemory.
  [[nodiscard]] Block take(std::size_t bytes);
  void give_back(Block block) noexcept;
  /// Made when it is first asked for; goes with the pool. Nothing that is queued on it waits for
  /// another stream, or all threads' copies would.
  [[nodiscard]] StreamHandle copy_stream();

 private:
  int device_;
  std::mutex mutex_;
  StreamHandle copies_ = nullptr;
  std::vector<Block> free_;
};

/// Streams and events are of `device`, the current one. Borrows `pool`.
[[nodiscard]] std::unique_ptr<ExpertPacker> make_packer(int device, const PackerSizes& sizes,
                                                        PinnedPool& pool);
/// `stream`: for what is left to do at the end. `device` is the current one.
[[nodiscard]] std::unique_ptr<ExpertBuilder> make_builder(int device, const ExpertWeights& shapes,
                                                          StreamHandle stream);

}  // namespace sluice::cuda
