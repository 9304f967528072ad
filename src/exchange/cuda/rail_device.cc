#include "exchange/cuda/rail_device.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "core/fail.h"
#include "exchange/cuda/device_sharing.h"
#include "exchange/cuda/rail_kernels.h"
#include "sluice/exchange.h"

namespace sluice {
namespace {

using cuda::RailSlot;
using cuda::RailTokens;

cudaStream_t queue_of(Stream stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

class CudaRailDevice final : public RailDevice {
 public:
  explicit CudaRailDevice(int device) : device_(device) {
    CudaRailDevice::use();
    cuda::prepare_rail_kernels();
  }

  void use() override { SLUICE_CUDA_CHECK(cudaSetDevice(device_)); }
  std::shared_ptr<std::byte> map_host(std::size_t bytes) override {
    void* memory = nullptr;
    SLUICE_CUDA_CHECK(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable));
    std::fill_n(static_cast<std::byte*>(memory), bytes, std::byte{0});
    return {static_cast<std::byte*>(memory), [](std::byte* p) { (void)cudaFreeHost(p); }};
  }
  void reach(const std::byte* window) override { enable_peer_access(device_, window); }
  void clear(void* memory, std::size_t bytes, Stream stream) override {
    SLUICE_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, queue_of(stream)));
  }

  int count_ctas(Transport& transport, const ExchangeConfig& config) override {
    const int ranks = count_ranks_on_device(transport, device_, config.peer_timeout).all;
    int num_sms = 0;
    SLUICE_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device_));
    const int share = num_sms / ranks;
    check_argument(share >= config.hosts.num_hosts(),
                   "{} ranks share cuda:{} and its {} SMs; each of {} hosts takes one", ranks,
                   device_, num_sms, config.hosts.num_hosts());
    check_argument(config.num_sms <= share,
                   "num_sms {} exceeds {}: {} ranks share the {} SMs of cuda:{}", config.num_sms,
                   share, ranks, num_sms, device_);
    return config.num_sms > 0 ? config.num_sms : share;
  }
  bool is_capturing(Stream stream) override {
    cudaStreamCaptureStatus status{};
    SLUICE_CUDA_CHECK(cudaStreamIsCapturing(queue_of(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }
  void synchronize(Stream stream) override {
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(queue_of(stream)));
  }

  void route(const RailSlot& p, const RailTokens& d, Stream stream) override {
    cuda::launch_route(p, d, stream.handle);
  }
  void pack(const RailSlot& p, const RailTokens& d, WireFormat wire, int num_ctas,
            Stream stream) override {
    cuda::launch_pack(p, d, wire, num_ctas, stream.handle);
  }
  void sizes(const RailSlot& p, Stream stream) override { cuda::launch_sizes(p, stream.handle); }
  void place(const RailSlot& p, const RailTokens& d, Stream stream) override {
    cuda::launch_place(p, d, stream.handle);
  }
  void spread(const RailSlot& p, int num_ctas, Stream stream) override {
    cuda::launch_spread(p, num_ctas, stream.handle);
  }
  void give(const RailSlot& p, bool dropped, Stream stream) override {
    cuda::launch_give(p, dropped, stream.handle);
  }
  void relay(const RailSlot& p, bool sends, int num_ctas, Stream stream) override {
    cuda::launch_relay(p, sends, num_ctas, stream.handle);
  }
  void sum(const RailSlot& p, const RailTokens& d, int num_ctas, Stream stream) override {
    cuda::launch_sum(p, d, num_ctas, stream.handle);
  }
  void keep_rows(const RailSlot& p, const std::uint16_t* expert_y, int num_ctas,
                 Stream stream) override {
    cuda::launch_keep_rows(p, expert_y, num_ctas, stream.handle);
  }

 private:
  int device_;
};

}  // namespace

std::unique_ptr<RailDevice> make_cuda_rail_device(int device) {
  return std::make_unique<CudaRailDevice>(device);
}

}  // namespace sluice
