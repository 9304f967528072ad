// load_files.h - the tensors that a load reads, as extents of files: read plainly, and put out of
// the system's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "checkpoint/expert_reader.h"

namespace sluice {

class LoadFiles {
 public:
  explicit LoadFiles(std::span<const std::unique_ptr<ExpertReader>> readers);

  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  /// Reads every tensor, and nothing else, a piece at a time into memory of the thread's own that
  /// stays in its core's cache. Returns bytes per second.
  [[nodiscard]] double read(int num_threads) const { return read_into(num_threads, {}); }
  /// The same into new memory that holds all of them afterwards, as a load to the host has to.
  /// Throws: kOutOfMemory.
  [[nodiscard]] double read_and_keep(int num_threads) const;
  /// Asks the system to forget the files' pages.   Throws: kIo.
  void drop() const;
  /// Share of the bytes that the system holds in memory. Throws: kIo.
  [[nodiscard]] double cached_share() const;

 private:
  struct Matrix {
    std::vector<TensorRef> tensors;
    std::uint64_t begin = 0;  ///< Of its bytes among those of all matrices.
  };
  [[nodiscard]] double read_into(int num_threads, std::span<std::byte> all) const;
  std::vector<Matrix> matrices_;  ///< In the order of a load.
  std::uint64_t bytes_ = 0;
};

}  // namespace sluice
