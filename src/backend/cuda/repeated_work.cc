// A few kernels as one graph. cudaGraphLaunch takes the host about as long as one kernel's launch.
#include "backend/cuda/repeated_work.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "backend/cuda/apart_from_captures.h"
#include "backend/cuda/capture.h"
#include "backend/cuda/check.h"

namespace sluice::cuda {
namespace {

constexpr int kLeastPatience = 2, kMostPatience = 1 << 16;
constexpr int kLaunchesThatPay = 32;

class GraphWork final : public RepeatedWork {
 public:
  GraphWork(int index, cudaStream_t own_stream, GraphPatience& patience,
            std::function<void(Stream)> work)
      : index_(index), own_stream_(own_stream), patience_(patience), work_(std::move(work)) {}
  ~GraphWork() override {
    if (graph_ == nullptr) return;
    patience_.runs_before = num_launches_ < kLaunchesThatPay
                                ? std::min(2 * patience_.runs_before, kMostPatience)
                                : std::max(patience_.runs_before / 2, kLeastPatience);
    const ApartFromCaptures apart;  // The device may still run it: CUDA waits with freeing it.
    if (cudaSetDevice(index_) == cudaSuccess) (void)cudaGraphExecDestroy(graph_);
  }
  GraphWork(const GraphWork&) = delete;
  GraphWork& operator=(const GraphWork&) = delete;

  void queue(Stream stream) override {
    SLUICE_CUDA_CHECK(cudaSetDevice(index_));
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    if (is_capturing(queue)) {
      work_(stream);  // Its kernels overlap with their neighbours; a graph in a graph would not.
      return;
    }
    if (graph_ == nullptr && (num_runs_ < patience_.runs_before || !make_graph())) {
      ++num_runs_;
      work_(stream);
      return;
    }
    SLUICE_CUDA_CHECK(cudaGraphLaunch(graph_, queue));
    ++num_launches_;
  }

 private:
  /// False while somebody captures on the backend's own stream.
  [[nodiscard]] bool make_graph() {
    const ApartFromCaptures apart;
    if (is_capturing(own_stream_)) return false;
    graph_ =
        capture_launch(own_stream_, cudaStreamCaptureModeRelaxed, [&] { work_({own_stream_}); });
    return true;
  }

  int index_;
  cudaStream_t own_stream_;
  GraphPatience& patience_;
  std::function<void(Stream)> work_;
  cudaGraphExec_t graph_ = nullptr;
  int num_runs_ = 0;
  long long num_launches_ = 0;
};

}  // namespace

std::unique_ptr<RepeatedWork> make_repeated_work(int index, void* own_stream,
                                                 GraphPatience& patience,
                                                 std::function<void(Stream)> work) {
  return std::make_unique<GraphWork>(index, static_cast<cudaStream_t>(own_stream), patience,
                                     std::move(work));
}

}  // namespace sluice::cuda
