// experts_impl.h - the stages between dispatch and combine, for Experts and Engine.
#pragma once

#include <array>
#include <memory>

#include "backend/ops.h"
#include "sluice/checkpoint.h"
#include "sluice/experts.h"

namespace sluice {

/// The valid rows of a batch whose tensors are known to fit each other, as an exchange makes it.
[[nodiscard]] RowRanges row_ranges(const ExpertBatch& batch);

struct Experts::Impl {
  Impl(const ExpertWeights& weights, std::int64_t max_rows, Backend& backend);

  /// The rows GEMM1 consumes: the received bytes themselves, or what `recipe` makes of them here.
  [[nodiscard]] Fp8RowsView gemm1_rows(const LayerRecipe& recipe, const ExpertBatch& batch,
                                       const RowRanges& rows, Stream stream);
  /// GEMM1, SwiGLU, quantize, GEMM2.
  void gemms(const LayerRecipe& recipe, const Fp8RowsView& in, const RowRanges& rows,
             std::uint16_t* expert_y, Stream stream, ExpertStageTimes* times);

  /// Bytes of the buffers below, in their order.
  [[nodiscard]] static std::array<std::size_t, 4> scratch_bytes(const ModelGeometry& geometry,
                                                                std::int64_t max_rows);

  BackendOps* backend;
  ModelGeometry geometry;
  int num_experts;
  std::int64_t max_rows;
  std::size_t codes_bytes = 0, scales_bytes = 0;  // As the checkpoint has them.
  std::unique_ptr<PreparedExperts> prepared;
  std::unique_ptr<DeviceBuffer> x_codes, x_scale;  // [max_rows, hidden], [max_rows, hidden / 128]
  std::unique_ptr<DeviceBuffer> h_codes, h_scale;  // [max_rows, intermediate], [.., / 128]
};

}  // namespace sluice
