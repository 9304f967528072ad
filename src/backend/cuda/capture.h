// capture.h - what code queues on a stream, as a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/check.h"

namespace sluice::cuda {

/// What work() queues on `stream`, which is not being captured; the caller destroys the graph.
/// Throws: kCuda; what `work` throws. The stream then captures no more.
template <class Work>
[[nodiscard]] cudaGraph_t capture_graph(cudaStream_t stream, cudaStreamCaptureMode mode,
                                        const Work& work) {
  cudaGraph_t graph = nullptr;
  SLUICE_CUDA_CHECK(cudaStreamBeginCapture(stream, mode));
  try {
    work();
  } catch (...) {
    (void)cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    throw;
  }
  SLUICE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  return graph;
}

/// The same, ready for cudaGraphLaunch().
template <class Work>
[[nodiscard]] cudaGraphExec_t capture_launch(cudaStream_t stream, cudaStreamCaptureMode mode,
                                             const Work& work) {
  const cudaGraph_t graph = capture_graph(stream, mode, work);
  cudaGraphExec_t exec = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
  (void)cudaGraphDestroy(graph);
  if (status != cudaSuccess) throw_cuda_error(status, "cudaGraphInstantiate");
  return exec;
}

}  // namespace sluice::cuda
