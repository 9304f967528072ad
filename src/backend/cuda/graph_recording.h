// graph_recording.h - work on a stream as a CUDA graph with time stamps inside.
#pragma once

#include <memory>

#include "backend/ops.h"

namespace sluice::cuda {

/// Captures what `work` queues on `stream`. Throws: kCuda, and what `work` throws.
[[nodiscard]] std::unique_ptr<Recording> record_graph(void* stream, const MarkedWork& work);

}  // namespace sluice::cuda
