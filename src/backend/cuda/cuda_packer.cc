// One thread's way onto the GPU: a piece of a matrix is read into one page-locked slot while one is
// copied, and half an expert is repacked from device memory while the next half is copied.
//
//   copies, of all threads   | pieces of half n      | pieces of half n + 1  | pieces of half n + 2
//   repacks, of this thread                          | half n                | half n + 1
#include "backend/cuda/cuda_packer.h"

#include <cuda_runtime_api.h>

#include <array>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_experts.h"
#include "core/fail.h"

namespace sluice::cuda {
namespace {

std::size_t aligned(std::size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

class CudaBuilder final : public ExpertBuilder {
 public:
  CudaBuilder(int device, const ExpertWeights& shapes, StreamHandle stream)
      : device_(device),
        stream_(stream),
        experts_(std::make_unique<CudaExperts>(format_of(shapes), MutableTensorView{}, device)),
        shapes_(shapes.experts) {}

  [[nodiscard]] const CudaExperts& experts() const noexcept { return *experts_; }
  [[nodiscard]] const QuantMatrix& shape(int index, MatrixRole role) const {
    return shapes_[static_cast<std::size_t>(index)].matrix(role);
  }
  [[nodiscard]] std::unique_ptr<PreparedExperts> finish() override {
    SLUICE_CUDA_CHECK(cudaSetDevice(device_));
    experts_->finish(stream_);
    return std::move(experts_);
  }

 private:
  int device_;
  StreamHandle stream_;
  std::unique_ptr<CudaExperts> experts_;
  std::vector<Expert> shapes_;  ///< Without data.
};

/// Page-locked memory that takes turns: a slot is given out when what was copied from it has left.
class SlotRing {
 public:
  SlotRing(PinnedPool& pool, std::size_t slot_bytes, std::size_t num_slots)
      : pool_(pool), slot_bytes_(aligned(slot_bytes)), copied_(num_slots) {
    for (cudaEvent_t& event : copied_) {
      SLUICE_CUDA_CHECK(
          cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
    }
    memory_ = pool.take(slot_bytes_ * num_slots);
  }
  ~SlotRing() {
    for (cudaEvent_t event : copied_) {
      if (event == nullptr) continue;
      (void)cudaEventSynchronize(event);  // After a failure copies may still be on their way.
      (void)cudaEventDestroy(event);
    }
    if (memory_.data != nullptr) pool_.give_back(memory_);
  }
  SlotRing(const SlotRing&) = delete;
  SlotRing& operator=(const SlotRing&) = delete;

  [[nodiscard]] std::span<std::byte> next() {
    current_ = (current_ + 1) % copied_.size();
    SLUICE_CUDA_CHECK(cudaEventSynchronize(copied_[current_]));
    return {memory_.data + current_ * slot_bytes_, slot_bytes_};
  }
  /// Queues a copy out of the current slot.
  void copy(std::byte* to, std::span<const std::byte> from, cudaStream_t stream) {
    SLUICE_CUDA_CHECK(
        cudaMemcpyAsync(to, from.data(), from.size(), cudaMemcpyHostToDevice, stream));
    SLUICE_CUDA_CHECK(cudaEventRecord(copied_[current_], stream));
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return copied_.size() * slot_bytes_; }

 private:
  PinnedPool& pool_;
  std::size_t slot_bytes_;
  std::vector<cudaEvent_t> copied_;
  PinnedPool::Block memory_;
  std::size_t current_ = 0;
};

/// A stream that has ended when it goes: so nothing reads the memory that goes after it.
class OwnStream {
 public:
  OwnStream() { SLUICE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~OwnStream() {
    (void)cudaStreamSynchronize(stream_);
    (void)cudaStreamDestroy(stream_);
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  [[nodiscard]] cudaStream_t get() const noexcept { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// A point in one stream that another stream or the host waits for. Without a record nobody waits.
class Mark {
 public:
  Mark() {
    SLUICE_CUDA_CHECK(
        cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventBlockingSync));
  }
  ~Mark() { (void)cudaEventDestroy(event_); }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;
  void record(cudaStream_t stream) { SLUICE_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void let_wait(cudaStream_t stream) { SLUICE_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }
  void wait() { SLUICE_CUDA_CHECK(cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaPacker final : public ExpertPacker {
 public:
  CudaPacker(int device, const PackerSizes& sizes, PinnedPool& pool)
      : matrix_bytes_(aligned(sizes.codes_bytes) + aligned(sizes.scales_bytes)),
        staging_(device, kHalves * 2 * matrix_bytes_),
        scales_(pool, sizes.scales_bytes, kScalesSlots),
        pieces_(pool, sizes.piece_bytes, kPieceSlots),
        copies_(static_cast<cudaStream_t>(pool.copy_stream())) {}

  [[nodiscard]] std::span<std::byte> next_scales() override { return scales_.next(); }
  [[nodiscard]] std::span<std::byte> next_piece() override { return pieces_.next(); }

  void add_scales(ExpertBuilder& to, int index, MatrixRole role,
                  const TensorView& scales) override {
    builder_ = static_cast<CudaBuilder*>(&to);
    index_ = index, role_ = role;
    if (role != MatrixRole::kUp) begin_half();
    matrix_ = &builder_->shape(index, role);
    SLUICE_ASSERT(scales.dtype == matrix_->scales.dtype && scales.shape == matrix_->scales.shape);
    SLUICE_ASSERT(staging_bytes(*matrix_) <= matrix_bytes_);
    const std::size_t place = 2 * half_ + (role == MatrixRole::kUp ? 1 : 0);
    codes_ = staging_.data() + place * matrix_bytes_;
    std::byte* const staged = codes_ + aligned(matrix_->codes.bytes());
    scales_.copy(staged, {scales.as<std::byte>(), scales.bytes()}, copies_);
    staged_[place % 2] = dense_source(codes_, staged, matrix_->k(), matrix_->group_size);
    codes_done_ = 0;
  }

  void add_rows(std::span<const std::byte> codes) override {
    SLUICE_ASSERT(codes_done_ + codes.size() <= matrix_->codes.bytes());
    pieces_.copy(codes_ + codes_done_, codes, copies_);
    codes_done_ += codes.size();
    if (codes_done_ < matrix_->codes.bytes() || role_ == MatrixRole::kGate) return;
    copied_.record(copies_);
    copied_.let_wait(repacks_.get());
    const CudaExperts& experts = builder_->experts();
    if (role_ == MatrixRole::kUp) {
      experts.repack_gate_up(index_, staged_[0], staged_[1], repacks_.get());
    } else {
      experts.repack_down(index_, staged_[0], repacks_.get());
    }
    repacked_[half_].record(repacks_.get());
  }

  void flush() override { SLUICE_CUDA_CHECK(cudaStreamSynchronize(repacks_.get())); }
  [[nodiscard]] std::size_t host_bytes() const noexcept override {
    return scales_.bytes() + pieces_.bytes();
  }

 private:
  static constexpr std::size_t kScalesSlots = 2, kPieceSlots = 2, kHalves = 2;

  /// Copies go to the other half of the staging memory, once what lay there is repacked: that was
  /// queued before the half in between was read, and is over.
  void begin_half() {
    half_ = (half_ + 1) % kHalves;
    repacked_[half_].wait();
  }

  std::size_t matrix_bytes_;
  CudaBuffer staging_;  ///< Two halves of an expert: each gate and up, or down.
  SlotRing scales_, pieces_;
  Mark copied_;
  std::array<Mark, kHalves> repacked_;
  OwnStream repacks_;                   ///< Goes before what its kernels read and write.
  cudaStream_t copies_;                 ///< The pool's.
  std::array<MatrixSource, 2> staged_;  ///< Where gate and up, or down, are on the device.
  std::size_t half_ = 0;
  CudaBuilder* builder_ = nullptr;  // Of the matrix that is being added.
  const QuantMatrix* matrix_ = nullptr;
  std::byte* codes_ = nullptr;
  int index_ = 0;
  MatrixRole role_ = MatrixRole::kGate;
  std::size_t codes_done_ = 0;
};

}  // namespace

std::size_t staging_bytes(const QuantMatrix& m) {
  return aligned(m.codes.bytes()) + aligned(m.scales.bytes());
}

StreamHandle PinnedPool::copy_stream() {
  const std::lock_guard lock(mutex_);
  if (copies_ == nullptr) {
    cudaStream_t stream = nullptr;
    SLUICE_CUDA_CHECK(cudaSetDevice(device_));
    SLUICE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    copies_ = stream;
  }
  return copies_;
}

PinnedPool::~PinnedPool() {
  if (copies_ != nullptr) (void)cudaStreamDestroy(static_cast<cudaStream_t>(copies_));
  for (const Block& block : free_) (void)cudaFreeHost(block.data);
}

PinnedPool::Block PinnedPool::take(std::size_t bytes) {
  if (bytes == 0) return {};
  {
    const std::lock_guard lock(mutex_);
    // The smallest that fits: a load that comes again then finds what it gave back.
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->bytes >= bytes && (best == free_.end() || block->bytes < best->bytes)) {
        best = block;
      }
    }
    if (best != free_.end()) {
      const Block taken = *best;
      free_.erase(best);
      return taken;
    }
  }
  SLUICE_CUDA_CHECK(cudaSetDevice(device_));
  void* data = nullptr;
  const cudaError_t status = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
  if (status == cudaSuccess) return {static_cast<std::byte*>(data), bytes};
  (void)cudaGetLastError();
  fail(status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kCuda,
       "{} bytes of page-locked host memory: {}", bytes, cudaGetErrorString(status));
}

void PinnedPool::give_back(Block block) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    free_.push_back(block);
  } catch (const std::bad_alloc&) {
    (void)cudaFreeHost(block.data);
  }
}

std::unique_ptr<ExpertPacker> make_packer(int device, const PackerSizes& sizes, PinnedPool& pool) {
  return std::make_unique<CudaPacker>(device, sizes, pool);
}

std::unique_ptr<ExpertBuilder> make_builder(int device, const ExpertWeights& shapes,
                                            StreamHandle stream) {
  return std::make_unique<CudaBuilder>(device, shapes, stream);
}

}  // namespace sluice::cuda
