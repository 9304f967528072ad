// expert_storage.h - what keeps the views of an ExpertWeights alive, and which of them are mapped.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/mmap.h"

namespace sluice {

/// Files that the views point into, and copies of what does not lie in its file as it is wanted:
/// misaligned scales, columns of a matrix.
struct ExpertStorage {
  std::vector<std::shared_ptr<const MappedFile>> files;
  std::vector<std::unique_ptr<std::byte[]>> copies;
  std::shared_ptr<const void> base = {};  ///< Of the weights that these are a part of, if any.
  /// Memory of the caller's that copies go into; without it: into `copies`.
  std::optional<std::span<std::byte>> room = {};
};

/// Bytes that something of this size takes of a room: what follows stays aligned for any element.
[[nodiscard]] constexpr std::size_t aligned_in_room(std::size_t bytes) noexcept {
  constexpr std::size_t kAlignment = 256;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Deleter of ExpertWeights::storage. Its type tells release_pages() that the weights are mapped:
/// pages of weights that somebody assembled in memory must never be given back.
struct ExpertStorageDeleter {
  const ExpertStorage* storage;
  void operator()(const void*) const noexcept { delete storage; }
};

}  // namespace sluice
