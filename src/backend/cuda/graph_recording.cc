#include "backend/cuda/graph_recording.h"

#include <cuda_runtime_api.h>

#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/capture.h"
#include "backend/cuda/check.h"
#include "backend/cuda/stamp.h"

namespace sluice::cuda {
namespace {

constexpr std::size_t kMaxMarks = 4096;

/// Times that the device writes into host memory.
class Stamps {
 public:
  explicit Stamps(cudaStream_t stream) : stream_(stream) {
    SLUICE_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&at_), kMaxMarks * sizeof(*at_), 0));
  }
  ~Stamps() { (void)cudaFreeHost(at_); }
  Stamps(const Stamps&) = delete;
  Stamps& operator=(const Stamps&) = delete;

  void clear() { num_marks_ = 0; }
  void mark() {
    if (num_marks_ == kMaxMarks) {
      throw Error(ErrorCode::kInvalidArgument,
                  "a recording has at most " + std::to_string(kMaxMarks) + " marks");
    }
    launch_stamp(at_ + num_marks_++, stream_);
  }
  /// Between neighbours; waits for the stream.
  [[nodiscard]] std::vector<double> differences_us() const {
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream_));
    std::vector<double> us;
    for (std::size_t i = 1; i < num_marks_; ++i) {
      us.push_back(static_cast<double>(at_[i] - at_[i - 1]) * 1e-3);
    }
    return us;
  }

 private:
  cudaStream_t stream_;
  std::uint64_t* at_ = nullptr;
  std::size_t num_marks_ = 0;
};

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaStream_t stream, const MarkedWork& work)
      : stream_(stream),
        stamps_(stream),
        exec_(capture_launch(stream, cudaStreamCaptureModeThreadLocal,
                             [&] { work([this] { stamps_.mark(); }); })) {
    SLUICE_CUDA_CHECK(cudaGraphUpload(exec_, stream));
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream));
  }
  ~GraphRecording() override { (void)cudaGraphExecDestroy(exec_); }
  GraphRecording(const GraphRecording&) = delete;
  GraphRecording& operator=(const GraphRecording&) = delete;

  void replay() override { SLUICE_CUDA_CHECK(cudaGraphLaunch(exec_, stream_)); }
  [[nodiscard]] std::vector<double> marks_us() override { return stamps_.differences_us(); }

 private:
  cudaStream_t stream_;
  Stamps stamps_;
  cudaGraphExec_t exec_;
};

class StampedCalls final : public Recording {
 public:
  StampedCalls(cudaStream_t stream, MarkedWork work) : stamps_(stream), work_(std::move(work)) {}
  void replay() override {
    stamps_.clear();
    work_([this] { stamps_.mark(); });
  }
  [[nodiscard]] std::vector<double> marks_us() override { return stamps_.differences_us(); }

 private:
  Stamps stamps_;
  MarkedWork work_;
};

}  // namespace

std::unique_ptr<Recording> record_graph(void* stream, const MarkedWork& work) {
  return std::make_unique<GraphRecording>(static_cast<cudaStream_t>(stream), work);
}

std::unique_ptr<Recording> repeat_calls(void* stream, MarkedWork work) {
  return std::make_unique<StampedCalls>(static_cast<cudaStream_t>(stream), std::move(work));
}

}  // namespace sluice::cuda
