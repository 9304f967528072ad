// experts.h - a rank's experts on one device, and what they do to rows: the middle of a layer.
//
//   ExpertBatch --quantize?--> GEMM1, activation, quantize --> GEMM2 --> expert_y
//
// For callers that bring an exchange of their own; a Layer is these and an Exchange together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "sluice/exchange.h"
#include "sluice/recipe.h"
#include "sluice/stream.h"
#include "sluice/tensor.h"

namespace sluice {

class Backend;
struct ExpertSource;
struct ExpertWeights;
struct ModelGeometry;
struct RepackFormat;

/// Where e4m3 rows go. Exactly one of `scale` and `static_scale` is set.
struct E4m3Rows {
  MutableTensorView codes;  ///< Shape of the rows read; e4m3.
  MutableTensorView scale;  ///< The same with width / 128, or with 1 if `per_token`; float32.
  float static_scale = 0;
  bool pow2 = false;       ///< Group scales are powers of two.
  bool per_token = false;  ///< One scale for each row.
};

/// out = e4m3(rows.x), by group, by token or static: the formats of quant.h.
/// rows.x: [num_experts, max_m, width] or [num_rows, width] bf16, its valid rows told by num_rows
/// and row_begin as in ExpertBatch; without num_rows every row is valid.
/// Stream: asynchronous on CUDA, without allocation or copies; may be captured once it has run.
/// Throws: kInvalidArgument naming the tensor.
void quantize(Backend& backend, const ExpertBatch& rows, const E4m3Rows& out, Stream stream);

/// Moves group-scaled e4m3 rows (x, x_scale) to out.static_scale: a second rounding.
/// Otherwise as quantize().
void requantize(Backend& backend, const ExpertBatch& rows, const E4m3Rows& out, Stream stream);

/// Threads: one at a time.
class Experts {
 public:
  /// Repacks `weights` for `backend` and reserves the memory between the stages for batches of up
  /// to `max_rows` rows, padding included. Borrows `backend`; `weights` are not needed afterwards.
  /// Throws: kInvalidArgument for weights that no backend takes, kOutOfMemory.
  [[nodiscard]] static Experts create(const ExpertWeights& weights, std::int64_t max_rows,
                                      Backend& backend);

  /// Room for experts whose weights lie in the device's memory (repack.h): repack() brings them,
  /// and finish_repack() makes them ready. The packed weights go into `memory`, packed_bytes() of
  /// the device, which the caller keeps until the experts are gone; empty: they are allocated here.
  /// Throws: kInvalidArgument, kOutOfMemory.
  [[nodiscard]] static Experts make_room(const RepackFormat& format, std::int64_t max_rows,
                                         Backend& backend, MutableTensorView memory = {});
  /// Packs experts [first, first + sources.size()), one after the other. Sources may lie in
  /// `memory` itself if packing the experts before them in this call leaves them as they are. So
  /// codes at the end of each of its two parts (packed_sizes()) can be packed in order; an expert
  /// that overwrites itself takes the memory of one more for a while.
  /// Stream: asynchronous on CUDA: sources stay as they are until it has passed.
  /// Throws: kInvalidArgument naming the expert and the matrix.
  void repack(int first, std::span<const ExpertSource> sources, Stream stream);
  /// After every expert has been packed.
  /// Stream: waits for it.
  /// Throws: kInvalidArgument if an expert is missing, or naming the first scale that is not
  /// finite;
  ///   in the second case the experts are of no use any more.
  void finish_repack(Stream stream);

  Experts(Experts&&) noexcept;
  Experts& operator=(Experts&&) noexcept;
  ~Experts();

  /// expert_y[row] = expert(batch.x[row]) for every valid row, rounded as `recipe` says; the
  /// router's weights are not applied. batch.x is in recipe.wire format.
  ///
  /// batch:    num_rows [num_experts] int32 is needed; row_begin [num_experts] int64 may be empty
  ///           in the masked layout, and in host memory also in the contiguous one.
  /// expert_y: [num_experts, max_m, hidden] or [max_rows, hidden] bf16; other rows stay as they
  ///           are.
  /// Stream:   asynchronous on CUDA; may be captured once a batch of the same shape has run.
  /// Throws:   kInvalidArgument naming tensor or recipe; in host memory also for row counts that do
  ///           not fit.
  void forward(const LayerRecipe& recipe, const ExpertBatch& batch, MutableTensorView expert_y,
               Stream stream);

  /// Makes room for batches of more rows: afterwards max_rows() is at least `max_rows`. Memory that
  /// calls used before is kept until the experts are gone, since a captured graph may use it.
  /// Stream: allocates, which waits for the device; not during a capture.
  /// Throws: kInvalidArgument, kOutOfMemory.
  void reserve(std::int64_t max_rows);

  [[nodiscard]] int num_experts() const noexcept;
  [[nodiscard]] std::int64_t max_rows() const noexcept;
  [[nodiscard]] const ModelGeometry& geometry() const noexcept;
  /// Bytes of prepared weights.
  [[nodiscard]] std::size_t weight_bytes() const noexcept;

  struct Impl;  ///< Internal.

 private:
  friend class LocalGroup;
  explicit Experts(std::unique_ptr<Impl> impl) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
