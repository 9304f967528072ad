// prepared_experts.h - experts of 4-bit weights in the order in which the CPU kernels read them.
//
// A matrix [N, K] is cut into blocks of 16 output channels. Inside a block, 8 consecutive k of all
// 16 channels are one cache line, lane by lane, as they stand in the checkpoint:
//
//   line (block, k / 8):   byte  0..3    channel 0:   k1k0 k3k2 k5k4 k7k6     (low nibble last)
//                          byte  4..7    channel 1
//                          ...
//                          byte 60..63   channel 15
//
// so that the low nibbles of a line are k, k+2, k+4, k+6 and the high ones k+1, k+3, k+5, k+7 of 16
// channels: the operand shape of the byte dot products. int4 is stored as w + 8 (0 .. 15), e2m1 as
// its code. Scales keep their values and type: [block][k / group_size][16]. A bias is [N].
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/cpu/memory_nodes.h"
#include "backend/cpu/page_buffer.h"
#include "backend/ops.h"
#include "backend/repack_checks.h"

namespace sluice {
class ThreadPool;
}

namespace sluice::cpu {

inline constexpr int kBlockN = 16;  ///< Output channels side by side: one AVX-512 register.
inline constexpr int kLineK = 8;    ///< k per line.
inline constexpr int kLineBytes = kBlockN * kLineK / 2;
inline constexpr int kGroupLines = kActivationGroup / kLineK;  ///< Lines of 128 k.
static_assert(kLineBytes == 64, "a line of codes is one cache line");

/// One matrix; views into PreparedCpuExperts::memory.
struct PreparedMatrix {
  const std::uint8_t* codes = nullptr;  ///< [N / 16][K / 8][64]
  const void* scales = nullptr;         ///< [N / 16][K / group_size][16]
  WeightFormat format = WeightFormat::kInt4;
  DType scale_dtype = DType::kFloat32;
  int group_size = 128;
  std::int64_t n = 0, k = 0;
  bool has_bias = false;
  const float* bias = nullptr;  ///< [N], or null.

  [[nodiscard]] std::int64_t code_bytes() const noexcept { return n * k / 2; }
  [[nodiscard]] std::int64_t scale_bytes() const noexcept {
    return n * (k / group_size) * static_cast<std::int64_t>(size_bytes(scale_dtype));
  }
  [[nodiscard]] std::int64_t bias_bytes() const noexcept {
    return has_bias ? n * static_cast<std::int64_t>(sizeof(float)) : 0;
  }
  /// Codes, scales and bias begin on pages of their own.
  [[nodiscard]] static std::size_t whole_pages(std::int64_t bytes) noexcept {
    return (static_cast<std::size_t>(bytes) + kPageBytes - 1) / kPageBytes * kPageBytes;
  }
  [[nodiscard]] std::size_t memory_bytes() const noexcept {
    return whole_pages(code_bytes()) + whole_pages(scale_bytes()) + whole_pages(bias_bytes());
  }
};

struct PreparedExpert {
  PreparedMatrix gate, up, down;
};

class PreparedCpuExperts final : public PreparedExperts {
 public:
  /// Room for experts of these shapes, whose data is not looked at. Matrices may differ in group
  /// size and type of scales. Codes get their memory on the nodes of their channels' shares.
  /// Throws: kInvalidArgument for shapes, dtypes or group sizes that are not ours; kOutOfMemory.
  explicit PreparedCpuExperts(const ExpertWeights& shapes, const MemoryNodes& nodes);
  /// Fills it, and releases the pages of each expert when it is done.
  /// Throws: kInvalidArgument for scales that are not finite.
  void repack(const ExpertWeights& weights, ThreadPool& pool);
  /// Fills rows of one matrix from `first_row` on, a multiple of 16, by their codes; `scales` are
  /// of the whole matrix. Returns how many rows there were. finish() has the last word.
  /// Threads: any, for different rows.
  /// Throws: kInvalidArgument if scales or rows are not as the shape was.
  std::int64_t repack_rows(int index, MatrixRole role, const TensorView& scales,
                           std::int64_t first_row, std::span<const std::byte> codes);

  /// [N] of one matrix, which was announced with a bias.
  void set_bias(int index, MatrixRole role, std::span<const float> bias);

  /// Room for experts that repack() brings, in `memory` unless that is empty; that of the caller
  /// stays on the nodes where it is.
  /// Throws: kInvalidArgument, kOutOfMemory.
  PreparedCpuExperts(const RepackFormat& format, const MutableTensorView& memory,
                     const MemoryNodes& nodes);

  /// Experts [first, first + sources.size()); see BackendOps::repack().
  void repack(int first, std::span<const ExpertSource> sources, ThreadPool& pool);
  /// Throws: kInvalidArgument for the first scale that was not finite.
  void finish() const { throw_scale_fault(scale_fault_.load(), format_); }

  [[nodiscard]] std::size_t bytes() const noexcept override {
    return experts_.size() * (packed_.sizes.gate_up_bytes + packed_.sizes.down_bytes);
  }
  void copy_to_host(std::byte* host) const override;
  [[nodiscard]] std::array<std::span<std::byte>, 2> expert_bytes(int index) override;
  [[nodiscard]] int num_experts() const noexcept { return static_cast<int>(experts_.size()); }
  [[nodiscard]] const PreparedExpert& expert(int i) const {
    return experts_[static_cast<std::size_t>(i)];
  }
  [[nodiscard]] std::int64_t hidden() const noexcept { return format_.geometry.hidden; }
  [[nodiscard]] std::int64_t intermediate() const noexcept { return format_.geometry.intermediate; }
  [[nodiscard]] const ActivationFn& activation() const noexcept {
    return format_.geometry.activation;
  }

 private:
  void place_codes(const MemoryNodes& nodes) const;
  [[nodiscard]] const PreparedMatrix& matrix(int index, MatrixRole role) const;
  void repack_expert(int index, const ExpertSource& source, const PreparedExpert& out,
                     ThreadPool& pool);

  RepackFormat format_;
  PageBuffer memory_;  // Empty where it is the caller's.
  PackedMemory packed_;
  std::vector<PreparedExpert> experts_;
  std::atomic<std::uint64_t> scale_fault_{kNoFault};
};

}  // namespace sluice::cpu
