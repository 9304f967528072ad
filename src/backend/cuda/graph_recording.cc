#include "backend/cuda/graph_recording.h"

#include <cuda_runtime_api.h>

#include <deque>

#include "backend/cuda/check.h"

namespace sluice::cuda {
namespace {

class Event {
 public:
  Event() { SLUICE_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  [[nodiscard]] cudaEvent_t get() const noexcept { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaStream_t stream, const MarkedWork& work) : stream_(stream) {
    SLUICE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      work([this] {
        SLUICE_CUDA_CHECK(cudaEventRecordWithFlags(marks_.emplace_back().get(), stream_,
                                                   cudaEventRecordExternal));
      });
    } catch (...) {
      (void)cudaStreamEndCapture(stream, &graph_);
      if (graph_ != nullptr) (void)cudaGraphDestroy(graph_);
      throw;
    }
    SLUICE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph_));
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph_, 0);
    (void)cudaGraphDestroy(graph_);
    if (status != cudaSuccess) throw_cuda_error(status, "cudaGraphInstantiate");
    SLUICE_CUDA_CHECK(cudaGraphUpload(exec_, stream));
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream));
  }
  ~GraphRecording() override { (void)cudaGraphExecDestroy(exec_); }
  GraphRecording(const GraphRecording&) = delete;
  GraphRecording& operator=(const GraphRecording&) = delete;

  void replay() override { SLUICE_CUDA_CHECK(cudaGraphLaunch(exec_, stream_)); }
  [[nodiscard]] std::vector<double> marks_us() override {
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    std::vector<double> us;
    for (std::size_t i = 1; i < marks_.size(); ++i) {
      float ms = 0;
      SLUICE_CUDA_CHECK(cudaEventElapsedTime(&ms, marks_[i - 1].get(), marks_[i].get()));
      us.push_back(static_cast<double>(ms) * 1e3);
    }
    return us;
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  std::deque<Event> marks_;
};

}  // namespace

std::unique_ptr<Recording> record_graph(void* stream, const MarkedWork& work) {
  return std::make_unique<GraphRecording>(static_cast<cudaStream_t>(stream), work);
}

}  // namespace sluice::cuda
