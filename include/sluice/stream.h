// stream.h - an opaque handle to a device's work queue.
#pragma once

namespace sluice {

/// A cudaStream_t on CUDA; ignored by the CPU backend, whose calls return when the work is done.
struct Stream {
  void* handle = nullptr;
};

}  // namespace sluice
