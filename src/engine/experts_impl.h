// experts_impl.h - the stages between dispatch and combine, for Experts and Layer.
#pragma once

#include <memory>

#include "backend/ops.h"
#include "sluice/checkpoint.h"
#include "sluice/experts.h"

namespace sluice {

/// The valid rows of a batch whose tensors are known to fit each other, as an exchange makes it.
[[nodiscard]] RowRanges row_ranges(const ExpertBatch& batch);

/// Memory for e4m3 rows [max_rows, width] and their group scales; none until allocate().
struct Fp8Buffers {
  void allocate(Backend& backend, std::int64_t max_rows, std::int64_t width);
  [[nodiscard]] Fp8Rows rows(std::int64_t width, bool is_grouped, float static_scale) const;
  [[nodiscard]] std::size_t bytes() const noexcept;
  /// What allocate() takes.
  [[nodiscard]] static std::size_t planned_bytes(std::int64_t max_rows, std::int64_t width);

  std::unique_ptr<DeviceBuffer> codes, scale;
};

/// The rows between the stages of one call. Layers that run one after the other share them.
struct ExpertScratch {
  std::int64_t max_rows = 0;
  Fp8Buffers x;  ///< [max_rows, hidden], for recipes that quantize at the receiver.
  Fp8Buffers h;  ///< [max_rows, intermediate]
};

struct Experts::Impl {
  /// `scratch.x` may be missing if every recipe used has Cast::kNone for gemm1.
  Impl(const ExpertWeights& weights, std::shared_ptr<ExpertScratch> scratch, Backend& backend);

  /// The rows GEMM1 consumes: the received bytes themselves, or what `recipe` makes of them here.
  [[nodiscard]] Fp8RowsView gemm1_rows(const LayerRecipe& recipe, const ExpertBatch& batch,
                                       const RowRanges& rows, Stream stream);
  /// GEMM1, SwiGLU, quantize, GEMM2.
  void gemms(const LayerRecipe& recipe, const Fp8RowsView& in, const RowRanges& rows,
             std::uint16_t* expert_y, Stream stream, ExpertStageTimes* times);

  BackendOps* backend;
  ModelGeometry geometry;
  int num_experts;
  std::size_t codes_bytes = 0, scales_bytes = 0;  // As the checkpoint has them.
  std::unique_ptr<PreparedExperts> prepared;
  std::shared_ptr<ExpertScratch> scratch;
};

}  // namespace sluice
