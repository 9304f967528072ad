// grid.cuh - order between kernels of one stream. One instruction per function.
#pragma once

namespace sluice::cuda::ptx {

/// Waits until the kernels before this one on its stream have ended and their writes are visible.
/// Returns at once in a kernel that was not launched ahead of that.
__device__ __forceinline__ void wait_for_earlier_kernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// Lets the next kernel on the stream be set up wherever there is room, if it was launched ahead of
/// this one's end. It still waits for that end.
__device__ __forceinline__ void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace sluice::cuda::ptx
