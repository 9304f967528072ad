// grid.cuh - order between kernels of one stream. One instruction per function.
#pragma once

namespace sluice::cuda::ptx {

/// Waits until the kernels before this one on its stream have ended and their writes are visible.
/// Returns at once in a kernel that was not launched ahead of that.
__device__ __forceinline__ void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace sluice::cuda::ptx
