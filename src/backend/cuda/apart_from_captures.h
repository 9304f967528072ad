// apart_from_captures.h - calls that make a graph while other threads may be capturing theirs.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/check.h"

namespace sluice::cuda {

/// While it lives, what this thread does is no concern of captures that other threads have begun,
/// which would otherwise fail through the calls that make a graph.
class ApartFromCaptures {
 public:
  ApartFromCaptures() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~ApartFromCaptures() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ApartFromCaptures(const ApartFromCaptures&) = delete;
  ApartFromCaptures& operator=(const ApartFromCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Throws: kCuda.
[[nodiscard]] inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  SLUICE_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace sluice::cuda
