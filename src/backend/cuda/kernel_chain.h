// kernel_chain.h - a few kernels as one CUDA graph whose parameters are set anew for each launch.
#pragma once

#include <memory>

#include "backend/queued_work.h"

namespace sluice::cuda {

/// `own_stream` belongs to device `index`; graphs are captured there, and their kernels have its
/// priority on whatever stream they are launched.
[[nodiscard]] std::unique_ptr<KernelChain> make_kernel_chain(int index, void* own_stream);

/// Whether this thread's kernels are noted now.
[[nodiscard]] bool is_in_chain() noexcept;
/// Throws: kInternal if they are, since `what` would be queued before them.
void refuse_in_chain(const char* what);

}  // namespace sluice::cuda
