// expert_loader.h - threads that read experts of a checkpoint and repack them for one backend.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/ops.h"
#include "checkpoint/expert_reader.h"
#include "sluice/loading.h"

namespace sluice {

/// Called on the calling thread when the experts of readers [0, index] have been read, for each
/// index in order. What it throws ends the load.
using OnRead = std::function<void(std::size_t index)>;

/// The experts of each reader, in the backend's own order; `stats` says what it took. On return, or
/// after a failure, no thread is left, and what was made halfway is gone.
/// Throws: what reading or repacking threw first, in the order of the experts; what
///   options.progress and `on_read` throw; kOutOfMemory.
[[nodiscard]] std::vector<std::unique_ptr<PreparedExperts>> load_prepared(
    BackendOps& backend, std::span<const std::unique_ptr<ExpertReader>> readers,
    const LoadOptions& options, LoadStats& stats, const OnRead& on_read = {});

}  // namespace sluice
