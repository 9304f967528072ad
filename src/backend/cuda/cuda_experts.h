// cuda_experts.h - one layer's experts on a Hopper GPU, and how they get there.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "backend/cuda/w4a8.h"
#include "backend/ops.h"
#include "backend/repack_checks.h"

namespace sluice {

class CudaBuffer final : public DeviceBuffer {
 public:
  /// Throws: kOutOfMemory with what is free, kCuda.
  CudaBuffer(int device, std::size_t bytes);
  ~CudaBuffer() override;
  CudaBuffer(const CudaBuffer&) = delete;
  CudaBuffer& operator=(const CudaBuffer&) = delete;
  [[nodiscard]] std::byte* data() const noexcept override { return static_cast<std::byte*>(data_); }
  [[nodiscard]] std::size_t bytes() const noexcept override { return bytes_; }

 private:
  int device_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

/// Weights in the kernels' order, and the words their launches synchronize on.
struct CudaExperts final : PreparedExperts {
  /// Room; waits for the device.   Throws: kInvalidArgument, kUnsupported, kOutOfMemory.
  CudaExperts(const RepackFormat& format, const MutableTensorView& memory, int device);

  /// See BackendOps. The device is the current one.
  void repack(int first, std::span<const ExpertSource> sources, cuda::StreamHandle stream);
  void finish(cuda::StreamHandle stream);
  [[nodiscard]] std::array<std::span<std::byte>, 2> expert_bytes(int index) override {
    return part_bytes(packed, index);
  }
  /// kSignMagnitude cannot say -8, kE2M1 runs no far matrix.
  [[nodiscard]] bool takes_any_expert() const noexcept override {
    return code != cuda::WeightCode::kSignMagnitude && code != cuda::WeightCode::kE2M1;
  }
  /// Makes it so for all experts; waits for `stream`.
  void take_any_expert(cuda::StreamHandle stream);

  /// Of one expert, from sources that overlap no packed memory. Threads: any, for different halves
  /// of experts.
  void repack_gate_up(int index, const MatrixSource& gate, const MatrixSource& up,
                      cuda::StreamHandle stream) const;
  void repack_down(int index, const MatrixSource& down, cuda::StreamHandle stream) const;

  void copy_to_host(std::byte* host) const override;
  [[nodiscard]] std::size_t bytes() const noexcept override {
    return static_cast<std::size_t>(format.num_experts) *
           (packed.sizes.gate_up_bytes + packed.sizes.down_bytes);
  }
  [[nodiscard]] cuda::PackedWeights gate_up() const noexcept {
    return {.data = packed.gate_up, .shape = gate_up_shape, .code = code};
  }
  [[nodiscard]] cuda::PackedWeights down() const noexcept {
    return {.data = packed.down, .shape = down_shape, .code = code};
  }

  RepackFormat format;
  int device;
  cuda::WeightShape gate_up_shape, down_shape;
  /// The cheaper code, of int4 without -8, of mxfp4 without far matrices; finish() turns it into
  /// the other one if there is any. This is int4's.
  cuda::WeightCode code = cuda::WeightCode::kSignMagnitude;
  std::unique_ptr<CudaBuffer> memory;  // Empty where it is the caller's.
  PackedMemory packed;
  std::unique_ptr<CudaBuffer> sync;  // cuda::sync_bytes(): zero between launches; then findings.
  cuda::RepackFindings* findings;
  std::unique_ptr<CudaBuffer> aside;  // For an expert that would overwrite itself; until finish().

 private:
  /// Packed memory of expert `index`.
  [[nodiscard]] std::byte* part_of(int index, bool is_gate_up) const;
  /// Of experts from `index` on, whose packed halves follow each other in `out`.
  void repack_half(int index, bool is_gate_up, std::span<const ExpertSource> sources,
                   std::byte* out, cuda::StreamHandle stream, bool in_place = false) const;
  /// Of one that would overwrite itself.
  void repack_aside(int index, std::span<const ExpertSource> one, cuda::StreamHandle stream);
  /// After the first expert of a whole layer: if it has a -8, the others are packed for that at
  /// once, and finish() need not go over all of them. Waits for the stream.
  void choose_code(cuda::StreamHandle stream);
  [[nodiscard]] cuda::RepackFindings found_so_far(cuda::StreamHandle stream) const;
};

/// What the experts of a layer have in common, and are refused without.
/// Throws: kInvalidArgument, kUnsupported naming what differs.
[[nodiscard]] RepackFormat format_of(const ExpertWeights& shapes);

}  // namespace sluice
