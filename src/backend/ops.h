// ops.h - what every backend computes: operations on the rows of an ExpertBatch (rows.h), and those
// that make rows of tokens and tokens of rows where no exchange does.
//
// Definitions are the scalar functions of sluice/quant.h; docs/design.md#arithmetic has the error
// bound of the GEMMs. Operations are asynchronous on `stream` where the device has streams. They
// touch only valid rows: bytes of other rows are neither read nor written.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/queued_work.h"
#include "backend/rows.h"
#include "sluice/backend.h"
#include "sluice/checkpoint.h"
#include "sluice/error.h"
#include "sluice/recipe.h"
#include "sluice/repack.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

/// A rank's experts in the backend's own order.
class PreparedExperts {
 public:
  virtual ~PreparedExperts() = default;
  [[nodiscard]] virtual std::size_t bytes() const noexcept = 0;
  /// Copies the bytes() there are to host memory, in an order of the backend's own: for
  /// comparisons. Waits for the device.
  virtual void copy_to_host(std::byte* host) const = 0;
  /// Where expert `index` lies, scales and all, in two parts. Experts that take_any_expert() are
  /// moved by copying these bytes, from any rank whose experts do, too.
  /// Throws: kUnsupported where experts cannot move.
  [[nodiscard]] virtual std::array<std::span<std::byte>, 2> expert_bytes(int index);
  /// Whether the bytes of any expert of the same format mean the same here.
  [[nodiscard]] virtual bool takes_any_expert() const noexcept { return true; }
};

/// Experts on their way to become PreparedExperts: memory for all of them, filled by packers.
class ExpertBuilder {
 public:
  virtual ~ExpertBuilder() = default;
  /// Gives up the experts. Requires: every matrix of every expert was added, and every packer that
  /// added one has been flushed.
  [[nodiscard]] virtual std::unique_ptr<PreparedExperts> finish() = 0;
};

/// What a packer has to hold at once.
struct PackerSizes {
  std::size_t piece_bytes = 0;   ///< Codes of the rows that are read together.
  std::size_t scales_bytes = 0;  ///< Scales of a matrix, and what their reader needs beside them.
  std::size_t codes_bytes = 0;   ///< Codes of the largest matrix.
};

/// One thread's means to fill builders of its backend: host memory to read into, and on a GPU a
/// stream, so that a copy runs while the next piece is read.
///
///   next_scales() -> read -> add_scales() -> next_piece() -> read -> add_rows() -> ... -> flush()
class ExpertPacker {
 public:
  virtual ~ExpertPacker() = default;
  /// Host memory aligned to 256 bytes, of the sizes that the packer was made for. Each waits until
  /// what was added from it before has left it.
  [[nodiscard]] virtual std::span<std::byte> next_scales() = 0;
  [[nodiscard]] virtual std::span<std::byte> next_piece() = 0;
  /// Begins a matrix of expert `index`, which counts from 0. `scales` lie in the last
  /// next_scales(). An expert's up follows its gate directly. Other threads may add other matrices.
  virtual void add_scales(ExpertBuilder& to, int index, MatrixRole role,
                          const TensorView& scales) = 0;
  /// The bias of a matrix of expert `index`, [N]. Throws: kUnsupported where there are none.
  virtual void add_bias(ExpertBuilder& to, int index, MatrixRole role, std::span<const float> bias);
  /// Codes of the next rows of the matrix, a multiple of 16 of them, in the last next_piece().
  virtual void add_rows(std::span<const std::byte> codes) = 0;
  /// Returns when everything that was added is in its place.
  virtual void flush() = 0;
  /// All its host memory together.
  [[nodiscard]] virtual std::size_t host_bytes() const noexcept = 0;
};

/// Thread time inside one expert_stage(), for reports (CPU; zero on CUDA).
struct ExpertStageTimes {
  double gemm1_us = 0, activation_us = 0, gemm2_us = 0;
};

/// What kernels multiply with, and how fast a device does nothing else.
struct ArithmeticRate {
  const char* kind = "";        ///< For reports: "int16 dot products".
  double operations_per_s = 0;  ///< Two for each multiply-add of a weight and an activation.
};

/// The GEMMs of expert_stage().
enum class ExpertHalf : std::uint8_t { kGateUp, kDown };

class BackendOps : public Backend {
 public:
  /// measure_arithmetic_rate() for each kind of arithmetic that expert_stage() uses on this device,
  /// in order of the rows per expert from which on it does. The largest is that of the device.
  [[nodiscard]] virtual std::vector<ArithmeticRate> measure_arithmetic_rates() {
    return {{.kind = "FP8", .operations_per_s = measure_arithmetic_rate()}};
  }

  /// Repacks `weights`, which lie in host memory, expert by expert and releases each one's mapped
  /// pages, so that no second copy of the weights is ever resident.
  [[nodiscard]] virtual std::unique_ptr<PreparedExperts> prepare(const ExpertWeights& weights) = 0;

  /// Room for experts that repack() brings one by one, in any order, and finish_repack() makes
  /// ready. `memory` is the caller's and outlives the result; empty: the room is allocated here.
  /// Throws: kInvalidArgument, kOutOfMemory; kUnsupported where prepare() is all there is.
  [[nodiscard]] virtual std::unique_ptr<PreparedExperts> make_room(const RepackFormat& format,
                                                                   const MutableTensorView& memory);
  /// Packs experts [first, first + sources.size()) of the room, one after the other, from memory of
  /// this device. A source may lie in the room's own memory if packing the experts before it in
  /// this call leaves it as it is; an expert that overwrites itself is packed aside first.
  /// Asynchronous on `stream`: sources stay as they are until it has passed.
  /// Throws: kInvalidArgument.
  virtual void repack(PreparedExperts& room, int first, std::span<const ExpertSource> sources,
                      Stream stream);
  /// Waits for `stream` and settles what depends on all experts of the room.
  /// Throws: kInvalidArgument naming the first scale that is not finite. The room is then of no
  /// use.
  virtual void finish_repack(PreparedExperts& room, Stream stream);
  /// Makes takes_any_expert() true. Waits for `stream`.
  virtual void take_any_expert(PreparedExperts& experts, Stream stream) {
    (void)experts, (void)stream;
  }
  /// checksum_of() bytes of this device: core/checksum.h. Waits for `stream`.
  [[nodiscard]] virtual std::uint64_t checksum(std::span<const std::byte> bytes,
                                               std::uint64_t first_word, Stream stream);
  /// The same in steps, for experts that are read one by one. `shapes` has no data.
  /// Throws: as prepare().
  [[nodiscard]] virtual std::unique_ptr<ExpertBuilder> make_builder(
      const ExpertWeights& shapes) = 0;
  /// Throws: kOutOfMemory.   Threads: any.
  [[nodiscard]] virtual std::unique_ptr<ExpertPacker> make_packer(const PackerSizes& sizes) = 0;
  /// Host threads that are this rank's share of the machine.
  [[nodiscard]] virtual int num_host_threads() const noexcept { return 1; }

  /// Records what `work` queues on `stream`. A GPU needs every kernel in it to have run before.
  [[nodiscard]] virtual std::unique_ptr<Recording> record(Stream stream, MarkedWork work);
  /// The same for work that cannot be captured: every replay() does it again, on the host, too.
  [[nodiscard]] virtual std::unique_ptr<Recording> repeat(Stream stream, MarkedWork work);

  /// `work` queues the same on any stream it is given: what it queued once may be replayed instead.
  /// Must be gone before the backend.
  [[nodiscard]] virtual std::unique_ptr<RepeatedWork> make_repeated_work(
      std::function<void(Stream)> work);

  /// Must be gone before the backend.
  [[nodiscard]] virtual std::unique_ptr<KernelChain> make_kernel_chain() {
    return std::make_unique<KernelChain>();
  }

  [[nodiscard]] virtual std::unique_ptr<StreamOrder> make_stream_order() {
    return std::make_unique<StreamOrder>();
  }

  /// codes, scale = quantize(x), x [max_rows, width] bf16, by group (pow2 if `pow2`) or static.
  virtual void quantize(const std::uint16_t* x, const RowRanges& rows, bool pow2,
                        const Fp8Rows& out, Stream stream) = 0;

  /// Moves group-scaled codes to out.static_scale. The rows of `out` may not overlap those of `in`.
  virtual void requantize(const Fp8RowsView& in, const RowRanges& rows, const Fp8Rows& out,
                          Stream stream) = 0;

  /// h = activate(gate, up), the halves of in * w13^T, in float32, quantized into `h` (group or
  /// static, by which of its scales is set), then out[row] = bf16(h * w2^T).
  /// out: [max_rows, hidden] bf16. h is scratch of the caller; its rows are dense.
  /// The codes of `in` may lie in `out`, each row at the beginning of its own row of `out`: an
  /// expert's rows of `out` are written only after GEMM1 has read all of its rows of `in`.
  virtual void expert_stage(const PreparedExperts& experts, const Fp8RowsView& in,
                            const RowRanges& rows, const Fp8Rows& h, std::uint16_t* out,
                            Stream stream, ExpertStageTimes* times) = 0;

  /// expert_stage() whose rows go home instead of to an `out`: each is written once, to where
  /// `home` says, while other rows are still computed. Bits are those of expert_stage(). The ranks'
  /// memory may be another device's; whoever reads it there waits for a signal that follows on
  /// `stream`. Only for rows of an exchange that has HomeRows; other devices have none.
  virtual void expert_stage_home(const PreparedExperts&, const Fp8RowsView&, const RowRanges&,
                                 const Fp8Rows&, const HomeRows&, Stream) {
    throw Error(ErrorCode::kUnsupported, "rows of this device do not leave from its experts");
  }

  /// Gives every entry of `entries` its row, or none, and writes the entry's token into that row of
  /// `out`, cast as `tokens` says. A token is cast once, however many rows it has.
  /// out.scale is set where the last cast has group scales; `second` and a static `first` use
  /// out.static_scale.
  virtual void gather_tokens(const TokenRows& tokens, const EntryRows& entries, const Fp8Rows& out,
                             Stream stream) = 0;

  /// The first `bytes` bytes of `count` rows, which begin `to_stride` and `from_stride` bytes
  /// apart.
  virtual void copy_rows(std::byte* to, std::size_t to_stride, const std::byte* from,
                         std::size_t from_stride, std::size_t bytes, std::int64_t count,
                         Stream stream) {
    for (std::int64_t i = 0; i < count; ++i, to += to_stride, from += from_stride) {
      copy_on_device(to, from, bytes, stream);
    }
  }

  /// y[t] = bf16(factor * sum_k weights[t, k] * rows[row_of[t, k]]), in order of k over the entries
  /// that have a row: float32, where product, sum and the last product are each rounded.
  virtual void sum_entries(const EntrySums& sums, Stream stream) = 0;

  /// One half of expert_stage() by itself, for measurements: kGateUp fills `h`, kDown reads it.
  /// Returns false, having done nothing, where halves do not exist (CPU: see ExpertStageTimes).
  [[nodiscard]] virtual bool expert_half(ExpertHalf, const PreparedExperts&, const Fp8RowsView&,
                                         const RowRanges&, const Fp8Rows&, std::uint16_t*, Stream) {
    return false;
  }
};

/// Every Backend is a BackendOps: make_backend() is the only factory.
[[nodiscard]] inline BackendOps& ops(Backend& backend) {
  return static_cast<BackendOps&>(backend);
}

}  // namespace sluice
