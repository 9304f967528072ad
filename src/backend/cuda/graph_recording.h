// graph_recording.h - work on a stream with time stamps inside: as a CUDA graph, or done anew.
#pragma once

#include <memory>

#include "backend/ops.h"

namespace sluice::cuda {

/// Captures what `work` queues on `stream`. Throws: kCuda, and what `work` throws.
[[nodiscard]] std::unique_ptr<Recording> record_graph(void* stream, const MarkedWork& work);
/// Calls `work` at each replay. Throws: kCuda.
[[nodiscard]] std::unique_ptr<Recording> repeat_calls(void* stream, MarkedWork work);

}  // namespace sluice::cuda
