// One Hopper GPU as a backend. Host code only: kernels are reached through w4a8.h and
// elementwise.h.
#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <utility>

#include "backend/check_experts.h"
#include "backend/cuda/check.h"
#include "backend/cuda/elementwise.h"
#include "backend/cuda/fp8_rate.h"
#include "backend/cuda/graph_recording.h"
#include "backend/cuda/read_rate.h"
#include "backend/cuda/stream_order.h"
#include "backend/cuda/token_rows.h"
#include "backend/cuda/w4a8.h"
#include "backend/ops.h"
#include "core/fail.h"

namespace sluice {
namespace {

class CudaBuffer final : public DeviceBuffer {
 public:
  CudaBuffer(int device, std::size_t bytes) : device_(device), bytes_(bytes) {
    if (bytes == 0) return;
    const cudaError_t status = cudaMalloc(&data_, bytes);
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();
    std::size_t free_bytes = 0, total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    fail(status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kCuda,
         "cuda:{}: {} bytes requested, {} of {} free: {}", device, bytes, free_bytes, total_bytes,
         cudaGetErrorString(status));
  }
  ~CudaBuffer() override {
    if (data_ != nullptr && cudaSetDevice(device_) == cudaSuccess) (void)cudaFree(data_);
  }
  CudaBuffer(const CudaBuffer&) = delete;
  CudaBuffer& operator=(const CudaBuffer&) = delete;
  [[nodiscard]] std::byte* data() const noexcept override { return static_cast<std::byte*>(data_); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }

 private:
  int device_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

/// One layer's experts in the kernels' order, and the words their launches synchronize on.
struct CudaExperts final : PreparedExperts {
  [[nodiscard]] std::size_t bytes() const noexcept override {
    return gate_up->bytes() + down->bytes();
  }
  std::unique_ptr<CudaBuffer> gate_up, down;
  std::unique_ptr<CudaBuffer> sync;  // cuda::sync_bytes(): zero between launches.
  cuda::WeightShape gate_up_shape, down_shape;
  cuda::WeightCode code = cuda::WeightCode::kSignMagnitude;
  ActivationFn activation;
  int num_experts = 0;
};

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
    cuda::prepare_token_kernels();
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
    use_device();
    SLUICE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
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
  [[nodiscard]] std::unique_ptr<StreamOrder> make_stream_order() override {
    use_device();
    return cuda::make_stream_order(index_);
  }

  [[nodiscard]] std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) override;
  void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2, const Fp8Rows& out,
                Stream stream) override;
  void requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                  Stream stream) override;
  void expert_stage(const PreparedExperts& experts, const Fp8RowsView& in, const RowRanges& rows,
                    const Fp8Rows& h, std::uint16_t* out, Stream stream,
                    ExpertStageTimes* times) override;
  void gather_tokens(const TokenRows& tokens, const EntryRows& entries, const Fp8Rows& out,
                     Stream stream) override;
  void sum_entries(const EntrySums& sums, Stream stream) override;
  [[nodiscard]] bool expert_half(ExpertHalf half, const PreparedExperts& prepared,
                                 const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& h,
                                 std::uint16_t* out, Stream stream) override;

 private:
  void use_device() const { SLUICE_CUDA_CHECK(cudaSetDevice(index_)); }
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
  void repack_all(const ExpertWeights& weights, CudaExperts& experts);
  void repack(const Expert& expert, std::size_t index, const CudaExperts& experts,
              std::byte* staging) const;

  int index_;
  int num_sms_ = 1;  // This rank's share.
  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
};

/// Bytes of one matrix on the device while it is being repacked; sections are 256-byte aligned.
std::size_t staging_bytes(const QuantMatrix& m) {
  return (m.codes.bytes() + 255) / 256 * 256 + (m.scales.bytes() + 255) / 256 * 256;
}

std::unique_ptr<PreparedExperts> CudaBackend::prepare(const ExpertWeights& weights) {
  check_argument(!weights.experts.empty(), "no experts to prepare");
  check_experts(weights);
  cuda::check_kernel_activation(weights.geometry.activation);
  const Expert& first = weights.experts.front();
  for (const Expert& expert : weights.experts) {
    for (const QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
      if (m->scales.dtype == first.gate.scales.dtype && m->group_size == first.gate.group_size &&
          m->format == first.gate.format) {
        continue;
      }
      fail(ErrorCode::kUnsupported,
           "experts of one layer with {} scales per {} weights and {} scales per {}: the CUDA "
           "backend wants one kind",
           to_string(first.gate.scales.dtype), first.gate.group_size, to_string(m->scales.dtype),
           m->group_size);
    }
  }
  const auto scale_type =
      first.gate.scales.dtype == DType::kFloat32 ? cuda::ScaleType::kF32 : cuda::ScaleType::kBf16;
  const auto hidden = static_cast<int>(first.gate.k());
  const auto intermediate = static_cast<int>(first.gate.n());
  const int group = first.gate.group_size;
  const WeightFormat format = first.gate.format;
  auto experts = std::make_unique<CudaExperts>();
  experts->num_experts = static_cast<int>(weights.experts.size());
  experts->gate_up_shape = {.n = 2 * intermediate,
                            .k = hidden,
                            .group = group,
                            .scale_type = scale_type,
                            .format = format};
  experts->down_shape = {
      .n = hidden, .k = intermediate, .group = group, .scale_type = scale_type, .format = format};
  experts->activation = weights.geometry.activation;
  const std::size_t count = weights.experts.size();
  experts->gate_up = make_buffer(count * cuda::packed_expert_bytes(experts->gate_up_shape));
  experts->down = make_buffer(count * cuda::packed_expert_bytes(experts->down_shape));
  experts->sync = make_buffer(cuda::sync_bytes(experts->num_experts));
  SLUICE_CUDA_CHECK(cudaMemset(experts->sync->data(), 0, experts->sync->bytes()));
  repack_all(weights, *experts);
  return experts;
}

/// Tries the cheaper code first: it cannot express -8, which quantizers of this format do not make.
/// If a -8 turns up, everything is packed again with the code that can.
void CudaBackend::repack_all(const ExpertWeights& weights, CudaExperts& experts) {
  const Expert& first = weights.experts.front();
  const auto staging =
      make_buffer(staging_bytes(first.gate) + staging_bytes(first.up) + staging_bytes(first.down));
  const auto found = make_buffer(sizeof(std::int32_t));
  SLUICE_CUDA_CHECK(cudaMemsetAsync(found->data(), 0, sizeof(std::int32_t), stream_));
  for (experts.code = cuda::WeightCode::kSignMagnitude;;
       experts.code = cuda::WeightCode::kOnesComplement) {
    for (std::size_t e = 0; e < weights.experts.size(); ++e) {
      const Expert& expert = weights.experts[e];
      std::byte* at = staging->data();
      for (const QuantMatrix* m : {&expert.gate, &expert.up, &expert.down}) {
        copy(at, m->codes.data, m->codes.bytes(), cudaMemcpyHostToDevice, {stream_});
        cuda::launch_find_minus8(reinterpret_cast<std::uint8_t*>(at), m->codes.bytes(),
                                 reinterpret_cast<std::int32_t*>(found->data()), stream_);
        std::byte* const scales = at + (m->codes.bytes() + 255) / 256 * 256;
        copy(scales, m->scales.data, m->scales.bytes(), cudaMemcpyHostToDevice, {stream_});
        at += staging_bytes(*m);
      }
      repack(expert, e, experts, staging->data());
      SLUICE_CUDA_CHECK(cudaStreamSynchronize(stream_));
      weights.release_pages(static_cast<int>(e));
    }
    std::int32_t has_minus8 = 0;
    copy_to_host(&has_minus8, found->data(), sizeof(has_minus8), {stream_});
    if (has_minus8 == 0 || experts.code == cuda::WeightCode::kOnesComplement) return;
  }
}

void CudaBackend::repack(const Expert& expert, std::size_t index, const CudaExperts& experts,
                         std::byte* staging) const {
  const auto codes_at = [](std::byte* at) { return reinterpret_cast<const std::uint8_t*>(at); };
  const auto scales_at = [](std::byte* at, const QuantMatrix& m) -> const void* {
    return at + (m.codes.bytes() + 255) / 256 * 256;
  };
  std::byte* const gate = staging;
  std::byte* const up = gate + staging_bytes(expert.gate);
  std::byte* const down = up + staging_bytes(expert.up);
  const cuda::WeightShape& shape = experts.gate_up_shape;
  cuda::launch_repack_gate_up(
      {.hidden = shape.k,
       .intermediate = shape.n / 2,
       .group = shape.group,
       .scale_type = shape.scale_type,
       .code = experts.code,
       .gate = codes_at(gate),
       .up = codes_at(up),
       .gate_scale = scales_at(gate, expert.gate),
       .up_scale = scales_at(up, expert.up),
       .packed = experts.gate_up->data() + index * cuda::packed_expert_bytes(shape)},
      stream_);
  cuda::launch_repack_plain(
      {.shape = experts.down_shape,
       .code = experts.code,
       .weight = codes_at(down),
       .scale = scales_at(down, expert.down),
       .packed = experts.down->data() + index * cuda::packed_expert_bytes(experts.down_shape)},
      stream_);
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
  return {.gate_up = {.data = experts.gate_up->data(),
                      .shape = experts.gate_up_shape,
                      .code = experts.code},
          .down = {.data = experts.down->data(), .shape = experts.down_shape, .code = experts.code},
          .rows = rows,
          .x = in,
          .h = h,
          .y = out,
          .sync = experts.sync->data(),
          .config = cuda::choose_config({.num_experts = rows.num_experts,
                                         .expected_m = std::max(1, rows.expected_m),
                                         .max_rows = static_cast<int>(rows.max_rows_per_expert)},
                                        {.num_sms = num_sms_}),
          .activation = experts.activation};
}

void CudaBackend::expert_stage(const PreparedExperts& prepared, const Fp8RowsView& in,
                               const RowRanges& rows, const Fp8Rows& h, std::uint16_t* out,
                               Stream stream, ExpertStageTimes* times) {
  use_device();
  if (times != nullptr) *times = {};
  const auto& experts = static_cast<const CudaExperts&>(prepared);
  cuda::launch_experts(gemms_of(experts, in, rows, h, out), stream.handle);
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
