// An event after each use; the next use, if it is on another stream, waits for it on the device.
//
// Uses inside a graph capture are kept apart from the others. An event that was recorded in a
// capture exists only there, and a capture may not wait for one that was recorded outside.
#include "backend/cuda/stream_order.h"

#include <cuda_runtime_api.h>

#include "backend/cuda/check.h"

namespace sluice::cuda {
namespace {

class Event {
 public:
  Event() { SLUICE_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  [[nodiscard]] cudaEvent_t get() const noexcept { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

/// The last use, outside captures or in one.
struct Use {
  Event event = {};
  cudaStream_t stream = nullptr;
  unsigned long long capture = 0;
  bool is_recorded = false;
};

/// 0 outside a capture.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  unsigned long long id = 0;
  SLUICE_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

class CudaStreamOrder final : public StreamOrder {
 public:
  explicit CudaStreamOrder(int index) : index_(index) {}

  Seen before(Stream stream) override {
    SLUICE_CUDA_CHECK(cudaSetDevice(index_));
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    const unsigned long long capture = capture_of(queue);
    const Use& last = capture == 0 ? outside_ : captured_;
    if (last.is_recorded && last.stream != queue && last.capture == capture) {
      SLUICE_CUDA_CHECK(cudaStreamWaitEvent(queue, last.event.get(), 0));
    }
    return {capture};
  }

  void after(Stream stream) override {
    SLUICE_CUDA_CHECK(cudaSetDevice(index_));
    after(stream, Seen{capture_of(static_cast<cudaStream_t>(stream.handle))});
  }

  void after(Stream stream, Seen seen) override {
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    Use& use = seen.capture == 0 ? outside_ : captured_;
    SLUICE_CUDA_CHECK(cudaEventRecord(use.event.get(), queue));
    use.stream = queue, use.capture = seen.capture, use.is_recorded = true;
  }

 private:
  int index_;
  Use outside_, captured_;
};

}  // namespace

std::unique_ptr<StreamOrder> make_stream_order(int index) {
  return std::make_unique<CudaStreamOrder>(index);
}

}  // namespace sluice::cuda
