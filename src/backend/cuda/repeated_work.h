// repeated_work.h - work that is queued again and again, as a CUDA graph once that has paid.
#pragma once

#include <functional>
#include <memory>

#include "backend/ops.h"

namespace sluice::cuda {

/// How often work runs before it becomes a graph. Making one takes as long as dozens of launches;
/// this grows where graphs were thrown away before they had saved that, and falls again where they
/// were of use. One for a backend, used by one thread at a time.
struct GraphPatience {
  int runs_before = 2;
};

/// `own_stream` belongs to device `index`; graphs are captured there, and their kernels have its
/// priority on whatever stream they are launched.
[[nodiscard]] std::unique_ptr<RepeatedWork> make_repeated_work(int index, void* own_stream,
                                                               GraphPatience& patience,
                                                               std::function<void(Stream)> work);

}  // namespace sluice::cuda
