// One Hopper GPU as a backend. Host code only: kernels are reached through w4a8.h and
// elementwise.h.
#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "backend/cuda/check.h"
#include "backend/cuda/checksum_kernel.h"
#include "backend/cuda/cuda_experts.h"
#include "backend/cuda/cuda_packer.h"
#include "backend/cuda/elementwise.h"
#include "backend/cuda/fp8_rate.h"
#include "backend/cuda/graph_recording.h"
#include "backend/cuda/kernel_chain.h"
#include "backend/cuda/read_rate.h"
#include "backend/cuda/repeated_work.h"
#include "backend/cuda/stream_order.h"
#include "backend/cuda/token_rows.h"
#include "backend/cuda/w4a8.h"
#include "backend/ops.h"
#include "core/fail.h"
#include "core/home_process.h"
#include "core/threads.h"

namespace sluice {

int num_cuda_devices() noexcept;  // Below; see make_backend.cc.

namespace {

class CudaBackend final : public BackendOps {
 public:
  /// `share`: one of how many ranks on this device. Each gets as many SMs as the others, so that
  /// their persistent kernels and their waiting ones fit on it together.
  CudaBackend(int index, int share) : index_(index) {
    use_device();
    SLUICE_CUDA_CHECK(cudaGetDeviceProperties(&properties_, index));
    if (properties_.major != 9 || properties_.minor != 0) {
      fail(ErrorCode::kUnsupported,
           "cuda:{} is {} of compute capability {}.{}; the kernels need 9.0", index,
           properties_.name, properties_.major, properties_.minor);
    }
    check_argument(share >= 1 && share <= properties_.multiProcessorCount,
                   "{} ranks share cuda:{} and its {} SMs", share, index,
                   properties_.multiProcessorCount);
    num_sms_ = properties_.multiProcessorCount / share;
    cuda::prepare_gather_kernels();
    cuda::prepare_sum_kernel();
    SLUICE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  ~CudaBackend() override {
    if (cudaSetDevice(index_) == cudaSuccess) (void)cudaStreamDestroy(stream_);
  }

  [[nodiscard]] Device device() const noexcept override { return {Device::Kind::kCuda, index_}; }
  [[nodiscard]] std::string description() const override {
    return fmt::format("cuda:{}, {}, {} SMs", index_, properties_.name, num_sms_);
  }
  [[nodiscard]] double measure_read_bandwidth() override {
    use_device();
    return cuda::measure_read_rate(properties_.multiProcessorCount);
  }
  [[nodiscard]] double measure_arithmetic_rate() override {
    use_device();
    return cuda::measure_fp8_rate(properties_.multiProcessorCount);
  }
  [[nodiscard]] std::unique_ptr<DeviceBuffer> allocate(std::size_t bytes) override {
    return make_buffer(bytes);
  }
  [[nodiscard]] Stream stream() override { return {stream_}; }
  void copy_to_host(void* host, const void* device, std::size_t bytes, Stream stream) override {
    copy(host, device, bytes, cudaMemcpyDeviceToHost, stream);
  }
  void copy_from_host(void* device, const void* host, std::size_t bytes, Stream stream) override {
    copy(device, host, bytes, cudaMemcpyHostToDevice, stream);
  }
  void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream) override {
    cuda::refuse_in_chain("a copy");
    use_device();
    SLUICE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                                      static_cast<cudaStream_t>(stream.handle)));
  }
  void copy_rows(std::byte* to, std::size_t to_stride, const std::byte* from,
                 std::size_t from_stride, std::size_t bytes, std::int64_t count,
                 Stream stream) override {
    cuda::refuse_in_chain("a copy of rows");
    use_device();
    if (count == 0) return;
    SLUICE_CUDA_CHECK(cudaMemcpy2DAsync(to, to_stride, from, from_stride, bytes,
                                        static_cast<std::size_t>(count), cudaMemcpyDeviceToDevice,
                                        static_cast<cudaStream_t>(stream.handle)));
  }
  void synchronize(Stream stream) override {
    use_device();
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream.handle)));
  }

  [[nodiscard]] std::unique_ptr<Recording> record(Stream stream, MarkedWork work) override {
    use_device();
    return cuda::record_graph(stream.handle, work);
  }
  [[nodiscard]] std::unique_ptr<Recording> repeat(Stream stream, MarkedWork work) override {
    use_device();
    return cuda::repeat_calls(stream.handle, std::move(work));
  }
  [[nodiscard]] std::unique_ptr<RepeatedWork> make_repeated_work(
      std::function<void(Stream)> work) override {
    return cuda::make_repeated_work(index_, stream_, patience_, std::move(work));
  }
  [[nodiscard]] std::unique_ptr<KernelChain> make_kernel_chain() override {
    return cuda::make_kernel_chain(index_, stream_);
  }
  [[nodiscard]] std::unique_ptr<StreamOrder> make_stream_order() override {
    use_device();
    return cuda::make_stream_order(index_);
  }

  [[nodiscard]] std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) override;
  [[nodiscard]] std::unique_ptr<ExpertBuilder> make_builder(const ExpertWeights& shapes) override;
  [[nodiscard]] std::unique_ptr<ExpertPacker> make_packer(const PackerSizes& sizes) override;
  [[nodiscard]] int num_host_threads() const noexcept override;
  [[nodiscard]] std::unique_ptr<PreparedExperts> make_room(
      const RepackFormat& format, const MutableTensorView& memory) override {
    use_device();
    return std::make_unique<CudaExperts>(format, memory, index_);
  }
  void repack(PreparedExperts& room, int first, std::span<const ExpertSource> sources,
              Stream stream) override {
    use_device();
    static_cast<CudaExperts&>(room).repack(first, sources, stream.handle);
  }
  void finish_repack(PreparedExperts& room, Stream stream) override {
    use_device();
    static_cast<CudaExperts&>(room).finish(stream.handle);
  }
  void take_any_expert(PreparedExperts& experts, Stream stream) override {
    use_device();
    static_cast<CudaExperts&>(experts).take_any_expert(stream.handle);
  }
  [[nodiscard]] std::uint64_t checksum(std::span<const std::byte> bytes, std::uint64_t first_word,
                                       Stream stream) override;
  void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2, const Fp8Rows& out,
                Stream stream) override;
  void requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                  Stream stream) override;
  void expert_stage(const PreparedExperts& experts, const Fp8RowsView& in, const RowRanges& rows,
                    const Fp8Rows& h, std::uint16_t* out, Stream stream,
                    ExpertStageTimes* times) override;
  void expert_stage_home(const PreparedExperts& experts, const Fp8RowsView& in,
                         const RowRanges& rows, const Fp8Rows& h, const HomeRows& home,
                         Stream stream) override;
  void gather_tokens(const TokenRows& tokens, const EntryRows& entries, const Fp8Rows& out,
                     Stream stream) override;
  void sum_entries(const EntrySums& sums, Stream stream) override;
  [[nodiscard]] bool expert_half(ExpertHalf half, const PreparedExperts& prepared,
                                 const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& h,
                                 std::uint16_t* out, Stream stream) override;

 private:
  void use_device() const {
    home_.require("backend");
    if (!cuda::is_in_chain()) SLUICE_CUDA_CHECK(cudaSetDevice(index_));  // The chain has done it.
  }
  [[nodiscard]] std::unique_ptr<CudaBuffer> make_buffer(std::size_t bytes) const {
    use_device();
    return std::make_unique<CudaBuffer>(index_, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
            Stream stream) const {
    if (bytes == 0) return;
    use_device();
    const auto queue = static_cast<cudaStream_t>(stream.handle);
    // The driver holds a lock while a copy of pageable memory waits for its turn. If that turn
    // comes after a kernel that waits for another rank, that rank's copies must not need the lock.
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(queue));
    SLUICE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, kind, queue));
    SLUICE_CUDA_CHECK(cudaStreamSynchronize(queue));
  }
  [[nodiscard]] cuda::ExpertGemms gemms_of(const CudaExperts& experts, const Fp8RowsView& in,
                                           const RowRanges& rows, const Fp8Rows& h,
                                           std::uint16_t* out) const;
  [[nodiscard]] MatrixSource stage(const QuantMatrix& matrix, std::byte* at) const;

  HomeProcess home_;  // CUDA's own word for a child is "initialization error".
  int index_;
  int num_sms_ = 1;  // This rank's share.
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  cuda::PinnedPool pinned_{index_};
  cuda::GraphPatience patience_;
  std::unique_ptr<CudaBuffer> checksum_;  // One word; from the first checksum() on.
};

std::uint64_t CudaBackend::checksum(std::span<const std::byte> bytes, std::uint64_t first_word,
                                    Stream stream) {
  SLUICE_ASSERT(bytes.size() % 16 == 0);
  if (checksum_ == nullptr) checksum_ = make_buffer(sizeof(std::uint64_t));
  use_device();
  const auto queue = static_cast<cudaStream_t>(stream.handle);
  SLUICE_CUDA_CHECK(cudaMemsetAsync(checksum_->data(), 0, checksum_->bytes(), queue));
  cuda::launch_checksum(bytes.data(), bytes.size(), first_word,
                        reinterpret_cast<unsigned long long*>(checksum_->data()), num_sms_,
                        stream.handle);
  std::uint64_t sum = 0;
  copy(&sum, checksum_->data(), sizeof(sum), cudaMemcpyDeviceToHost, stream);
  return sum;
}

/// Copies a matrix to staging memory. Waits for whatever still reads that.
MatrixSource CudaBackend::stage(const QuantMatrix& m, std::byte* at) const {
  std::byte* const scales = at + (m.codes.bytes() + 255) / 256 * 256;
  copy(at, m.codes.data, m.codes.bytes(), cudaMemcpyHostToDevice, {stream_});
  copy(scales, m.scales.data, m.scales.bytes(), cudaMemcpyHostToDevice, {stream_});
  return dense_source(at, scales, m.k(), m.group_size);
}

std::unique_ptr<PreparedExperts> CudaBackend::prepare(const ExpertWeights& weights) {
  std::unique_ptr<PreparedExperts> experts = make_room(format_of(weights), {});
  const Expert& first = weights.experts.front();
  const auto staging = make_buffer(cuda::staging_bytes(first.gate) + cuda::staging_bytes(first.up) +
                                   cuda::staging_bytes(first.down));
  for (std::size_t e = 0; e < weights.experts.size(); ++e) {
    const Expert& expert = weights.experts[e];
    std::byte* const up = staging->data() + cuda::staging_bytes(expert.gate);
    const ExpertSource source{.gate = stage(expert.gate, staging->data()),
                              .up = stage(expert.up, up),
                              .down = stage(expert.down, up + cuda::staging_bytes(expert.up))};
    repack(*experts, static_cast<int>(e), {&source, 1}, {stream_});
    weights.release_pages(static_cast<int>(e));
  }
  finish_repack(*experts, {stream_});
  return experts;
}

std::unique_ptr<ExpertBuilder> CudaBackend::make_builder(const ExpertWeights& shapes) {
  use_device();
  return cuda::make_builder(index_, shapes, stream_);
}

std::unique_ptr<ExpertPacker> CudaBackend::make_packer(const PackerSizes& sizes) {
  use_device();
  return cuda::make_packer(index_, sizes, pinned_);
}

int CudaBackend::num_host_threads() const noexcept {
  const int devices = std::max(1, num_cuda_devices());
  const int share = std::max(1, properties_.multiProcessorCount / num_sms_);
  return std::max(1, static_cast<int>(available_cores().size()) / devices / share);
}

void CudaBackend::quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2,
                           const Fp8Rows& out, Stream stream) {
  use_device();
  cuda::launch_quantize({.x = x, .rows = rows, .pow2 = pow2, .out = out}, num_sms_, stream.handle);
}

void CudaBackend::requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                             Stream stream) {
  use_device();
  cuda::launch_requantize({.in = in, .rows = rows, .out = out}, num_sms_, stream.handle);
}

cuda::ExpertGemms CudaBackend::gemms_of(const CudaExperts& experts, const Fp8RowsView& in,
                                        const RowRanges& rows, const Fp8Rows& h,
                                        std::uint16_t* out) const {
  return {.gate_up = experts.gate_up(),
          .down = experts.down(),
          .rows = rows,
          .x = in,
          .h = h,
          .y = out,
          .sync = experts.sync->data(),
          .config = cuda::choose_config({.num_experts = rows.num_experts,
                                         .expected_m = std::max(1, rows.expected_m),
                                         .max_rows = static_cast<int>(rows.max_rows_per_expert),
                                         .has_row_scales = in.scale_per_row},
                                        {.num_sms = num_sms_}),
          .activation = experts.format.geometry.activation};
}

void CudaBackend::expert_stage(const PreparedExperts& prepared, const Fp8RowsView& in,
                               const RowRanges& rows, const Fp8Rows& h, std::uint16_t* out,
                               Stream stream, ExpertStageTimes* times) {
  use_device();
  if (times != nullptr) *times = {};
  const auto& experts = static_cast<const CudaExperts&>(prepared);
  cuda::launch_experts(gemms_of(experts, in, rows, h, out), stream.handle);
}

void CudaBackend::expert_stage_home(const PreparedExperts& prepared, const Fp8RowsView& in,
                                    const RowRanges& rows, const Fp8Rows& h, const HomeRows& home,
                                    Stream stream) {
  use_device();
  cuda::ExpertGemms gemms =
      gemms_of(static_cast<const CudaExperts&>(prepared), in, rows, h, nullptr);
  gemms.home = home;
  cuda::launch_experts(gemms, stream.handle);
}

void CudaBackend::gather_tokens(const TokenRows& tokens, const EntryRows& entries,
                                const Fp8Rows& out, Stream stream) {
  use_device();
  cuda::launch_gather_tokens({.tokens = tokens, .entries = entries, .out = out}, num_sms_,
                             stream.handle);
}

void CudaBackend::sum_entries(const EntrySums& sums, Stream stream) {
  use_device();
  cuda::launch_sum_entries(sums, stream.handle);
}

bool CudaBackend::expert_half(ExpertHalf half, const PreparedExperts& prepared,
                              const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& h,
                              std::uint16_t* out, Stream stream) {
  use_device();
  const cuda::ExpertGemms gemms =
      gemms_of(static_cast<const CudaExperts&>(prepared), in, rows, h, out);
  if (half == ExpertHalf::kGateUp) {
    cuda::launch_gate_up({.weights = gemms.gate_up,
                          .rows = gemms.rows,
                          .x = gemms.x,
                          .h = gemms.h,
                          .sync = gemms.sync,
                          .config = gemms.config,
                          .activation = gemms.activation},
                         stream.handle);
  } else {
    cuda::launch_grouped_gemm({.weights = gemms.down,
                               .rows = gemms.rows,
                               .x = gemms.h,
                               .y = gemms.y,
                               .sync = gemms.sync,
                               .config = gemms.config},
                              stream.handle);
  }
  return true;
}

}  // namespace

/// See make_backend.cc.
int num_cuda_devices() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

/// See make_backend.cc.
std::unique_ptr<Backend> make_cuda_backend(const BackendConfig& config) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    fail(ErrorCode::kUnsupported, "cuda:{}: no CUDA device on this machine ({})",
         config.device.index, cudaGetErrorString(status));
  }
  check_argument(config.device.index >= 0 && config.device.index < count,
                 "cuda:{}: this machine has {} CUDA device(s)", config.device.index, count);
  return std::make_unique<CudaBackend>(config.device.index, std::max(1, config.num_local_ranks));
}

}  // namespace sluice
