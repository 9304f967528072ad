// loading.h - how experts get from a checkpoint's files to a device, and what that took.
//
//   files --read--> piece --check, repack, copy--> prepared experts      thread 0
//   files --read--> piece --check, repack, copy--> prepared experts      thread 1 ...
//
// Each thread takes the next matrices and goes all the way with them, some rows at a time: so
// reading, checking, repacking and copying overlap. Host memory holds the scales of a matrix and
// about 1 MB of its codes for each thread, three times that where a GPU copies meanwhile, however
// many experts there are. Nothing is mapped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sluice/checkpoint.h"
#include "sluice/placement.h"

namespace sluice {

/// Choices of whoever loads.
struct LoadOptions {
  /// Threads that read and repack. 0: this rank's share of the cores, between 4 and 16.
  int num_threads = 0;
  /// Told the fraction of the bytes that is read, on the calling thread, ten times a second at
  /// most. What it throws ends the load, and comes out of it.
  Progress progress = {};
  /// Of each layer, for a group with num_slots; empty: Placement::even() for all of them.
  std::vector<Placement> placements = {};
};

/// What loading took on one rank. Of several loads: times and bytes are sums, host_bytes and
/// num_threads the largest.
struct LoadStats {
  double seconds = 0;                ///< From the first read to the last expert in its place.
  std::uint64_t file_bytes = 0;      ///< Read from the checkpoint's files.
  std::uint64_t prepared_bytes = 0;  ///< Weights in the backend's own order that came of it.
  std::size_t host_bytes = 0;        ///< Host memory that was read into.
  int num_threads = 0;

  void add(const LoadStats& other) noexcept;
  [[nodiscard]] double bytes_per_s() const noexcept {
    return seconds > 0 ? static_cast<double>(file_bytes) / seconds : 0;
  }
};

}  // namespace sluice
