#include "backend/cuda/graph_recording.h"

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/stamp.h"

namespace sluice::cuda {
namespace {

constexpr std::size_t kMaxMarks = 4096;

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaStream_t stream, const MarkedWork& work) : stream_(stream) {
    SLUICE_CUDA_CHECK(
        cudaHostAlloc(reinterpret_cast<void**>(&stamps_), kMaxMarks * sizeof(*stamps_), 0));
    SLUICE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      work([this] {
        if (num_marks_ == kMaxMarks) {
          throw Error(ErrorCode::kInvalidArgument,
                      "a recording has at most " + std::to_string(kMaxMarks) + " marks");
        }
        launch_stamp(stamps_ + num_marks_++, stream_);
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
  ~GraphRecording() override {
    (void)cudaGraphExecDestroy(exec_);
    (void)cudaFreeHost(stamps_);
  }
  GraphRecording(const GraphRecording&) = delete;
  GraphRecording& operator=(const GraphRecording&) = delete;

  void replay() override { SLUICE_CUDA_CHECK(cudaGraphLaunch(exec_, stream_)); }
  [[nodiscard]] std::vector<double> marks_us() override {
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    std::vector<double> us;
    for (std::size_t i = 1; i < num_marks_; ++i) {
      us.push_back(static_cast<double>(stamps_[i] - stamps_[i - 1]) * 1e-3);
    }
    return us;
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  std::uint64_t* stamps_ = nullptr;  // Host memory that the device writes.
  std::size_t num_marks_ = 0;
};

}  // namespace

std::unique_ptr<Recording> record_graph(void* stream, const MarkedWork& work) {
  return std::make_unique<GraphRecording>(static_cast<cudaStream_t>(stream), work);
}

}  // namespace sluice::cuda
