// experts_impl.h - the stages between dispatch and combine, for Experts and Layer.
#pragma once

#include <memory>
#include <vector>

#include "backend/ops.h"
#include "sluice/checkpoint.h"
#include "sluice/experts.h"

namespace sluice {

/// The valid rows of a batch whose tensors are known to fit each other, as an exchange makes it.
[[nodiscard]] RowRanges row_ranges(const ExpertBatch& batch);

/// A batch that a caller brings, checked against the experts that are to run on it.
struct BatchNeeds {
  int num_experts;
  std::int64_t hidden;
  std::int64_t max_rows;
};
/// Its rows; `begin` is memory for what the caller left out.
/// Throws: kInvalidArgument naming the tensor.
[[nodiscard]] RowRanges check_batch(const LayerRecipe& recipe, const ExpertBatch& batch,
                                    const MutableTensorView& expert_y, const BatchNeeds& needs,
                                    const Device& device, std::vector<std::int64_t>& begin);
/// The batch's e4m3 rows, to read: as they came over `wire`.
[[nodiscard]] Fp8RowsView received_rows(const ExpertBatch& batch, WireFormat wire,
                                        float static_scale, std::int64_t width);
/// The cast that recipe.gemm1 leaves to the receiver, into `out`.
void cast_batch(BackendOps& backend, const LayerRecipe& recipe, const ExpertBatch& batch,
                const RowRanges& rows, const Fp8Rows& out, Stream stream);

/// Bytes of the codes of e4m3 rows [max_rows, width], and of their group scales.
[[nodiscard]] std::size_t fp8_code_bytes(std::int64_t max_rows, std::int64_t width);
[[nodiscard]] std::size_t fp8_scale_bytes(std::int64_t max_rows, std::int64_t width);

/// Rows that `cast` fills, in memory for codes (or none) and, where the cast gives rows scales of
/// their own, for these. `static_scale` is for the other casts.
[[nodiscard]] Fp8Rows cast_rows(const std::unique_ptr<DeviceBuffer>& codes,
                                const std::unique_ptr<DeviceBuffer>& scale, std::int64_t width,
                                Cast cast, float static_scale);

/// Memory for e4m3 rows and their group scales; none until a part is allocated.
struct Fp8Buffers {
  [[nodiscard]] Fp8Rows rows(std::int64_t width, Cast cast, float static_scale) const;
  [[nodiscard]] std::size_t bytes() const noexcept;

  std::unique_ptr<DeviceBuffer> codes, scale;
};

/// The rows between the stages of one call. Layers that run one after the other share them.
struct ExpertScratch {
  std::int64_t max_rows = 0;
  /// [max_rows, hidden], for recipes that quantize at the receiver; the scales for those that then
  /// have one per group. Without codes a row of x lies in its row of expert_y, which is twice as
  /// long: GEMM1 has read all rows of an expert before GEMM2 writes one.
  Fp8Buffers x;
  Fp8Buffers h;  ///< [max_rows, intermediate]
};

/// Of the prepared bytes: the same for the same weights on one kind of backend.
[[nodiscard]] std::uint64_t digest_of(const PreparedExperts& prepared);

struct Experts::Impl {
  /// `prepared` was made of `shapes`, whose data is not looked at. What `scratch.x` lacks, no
  /// recipe used may need.
  Impl(const ExpertWeights& shapes, std::shared_ptr<PreparedExperts> prepared,
       std::shared_ptr<ExpertScratch> scratch, Backend& backend);
  Impl(const RepackFormat& format, std::shared_ptr<ExpertScratch> scratch, Backend& backend,
       const MutableTensorView& memory);

  /// The rows GEMM1 consumes: the received bytes themselves, or what `recipe` makes of them here,
  /// in the scratch or in the rows of `expert_y`.
  [[nodiscard]] Fp8RowsView gemm1_rows(const LayerRecipe& recipe, const ExpertBatch& batch,
                                       const RowRanges& rows, std::uint16_t* expert_y,
                                       Stream stream);
  /// GEMM1, activation, quantize, GEMM2.
  void gemms(const LayerRecipe& recipe, const Fp8RowsView& in, const RowRanges& rows,
             std::uint16_t* expert_y, Stream stream, ExpertStageTimes* times);

  /// The same; rows go to their tokens' ranks as they are made.
  void gemms_home(const LayerRecipe& recipe, const Fp8RowsView& in, const RowRanges& rows,
                  const HomeRows& home, Stream stream);

  BackendOps* backend;
  ModelGeometry geometry;
  int num_experts;
  std::size_t codes_bytes = 0, scales_bytes = 0;  // As the checkpoint has them.
  std::shared_ptr<PreparedExperts> prepared;      ///< Shared with LocalExperts.
  std::vector<bool> is_missing;  ///< [num_experts] while they are repacked; then empty.
  std::shared_ptr<ExpertScratch> scratch;
  std::vector<std::shared_ptr<ExpertScratch>> outgrown;  ///< Graphs may use it.
};

}  // namespace sluice
