// Checks what a caller brings, then runs the stages of the backend on it.
#include "sluice/experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "backend/traits.h"
#include "core/check_tensor.h"
#include "core/fail.h"
#include "engine/experts_impl.h"
#include "sluice/quant.h"
#include "sluice/repack.h"

namespace sluice {
namespace {

/// `shape` with its last dimension replaced.
Shape with_width(const Shape& shape, std::int64_t width) {
  return shape.rank() == 3 ? Shape{shape[0], shape[1], width} : Shape{shape[0], width};
}

/// Channels of a row of x, checked. Throws: kInvalidArgument.
std::int64_t checked_width(const ExpertBatch& batch) {
  const Shape& shape = batch.x.shape;
  if (shape.rank() != 2 && shape.rank() != 3) {
    fail(ErrorCode::kInvalidArgument,
         "x has shape {}, expected [num_experts, max_m, width] or [num_rows, width]",
         shape.to_string());
  }
  const std::int64_t width = shape[shape.rank() - 1];
  check_argument(width > 0 && width % kActivationGroup == 0,
                 "x has rows of {}, not of a positive multiple of {}", width, kActivationGroup);
  return width;
}

/// In host memory the counts can be looked at: they must fit. `begin` is filled for contiguous rows
/// whose beginnings the caller left out.
void check_in_host_memory(RowRanges& rows, const std::int64_t* told_begin, bool is_masked,
                          std::vector<std::int64_t>& begin) {
  const std::int64_t limit = rows.max_rows_per_expert;
  std::int64_t next = 0;
  for (int e = 0; e < rows.num_experts; ++e) {
    const std::int64_t count = rows.num_rows(e);
    check_argument(count >= 0 && count <= limit, "num_rows[{}] = {} is not in [0, {}]", e, count,
                   limit);
    const std::int64_t least = is_masked ? e * limit : next;
    const std::int64_t first = told_begin != nullptr ? told_begin[e] : least;
    check_argument(is_masked ? first == least : first >= least && first + count <= rows.max_rows,
                   "row_begin[{}] = {} with {} rows: expected rows from {} on, within {}", e, first,
                   count, least, rows.max_rows);
    if (!is_masked && told_begin == nullptr) begin.push_back(first);
    next = first + count;
  }
  if (!begin.empty()) rows.begin = begin.data();
}

/// The rows of a batch that a caller brings; `begin` is memory for what the caller left out.
/// Throws: kInvalidArgument naming the tensor.
RowRanges checked_rows(const ExpertBatch& batch, const Device& device,
                       std::vector<std::int64_t>& begin) {
  const std::int64_t width = checked_width(batch);
  const bool is_masked = batch.x.shape.rank() == 3;
  if (batch.num_rows.empty()) {
    check_argument(batch.row_begin.empty(), "row_begin is given without num_rows");
    const std::int64_t rows = batch.x.shape.num_elements() / width;
    return {.num_experts = 1,
            .max_rows = rows,
            .max_rows_per_expert = rows,
            .expected_m = batch.expected_m};
  }
  if (batch.num_rows.shape.rank() != 1) {
    fail(ErrorCode::kInvalidArgument, "num_rows has shape {}, expected [num_experts]",
         batch.num_rows.shape.to_string());
  }
  const Shape shape{is_masked ? batch.x.dim(0) : batch.num_rows.dim(0)};
  check_tensor("num_rows", batch.num_rows, DType::kInt32, shape, device);
  if (!batch.row_begin.empty()) {
    check_tensor("row_begin", batch.row_begin, DType::kInt64, shape, device);
  }
  RowRanges rows = row_ranges(batch);
  if (traits_of(device.kind).has_host_memory) {
    check_in_host_memory(rows, batch.row_begin.as<std::int64_t>(), is_masked, begin);
  } else {
    check_argument(is_masked || rows.begin != nullptr,
                   "row_begin is needed for contiguous rows in device memory");
  }
  return rows;
}

/// `out` as the backend wants it. Throws: kInvalidArgument.
Fp8Rows checked_output(const E4m3Rows& out, const Shape& shape, std::int64_t width,
                       const Device& device) {
  check_tensor("codes", out.codes, DType::kFloat8E4M3, shape, device);
  const bool has_own = out.static_scale == 0;
  if (has_own) {
    check_argument(!out.per_token || !out.pow2, "pow2 is for group scales, not for one per token");
    const std::int64_t scales = scales_per_row(out.per_token ? Cast::kToken : Cast::kGroup, width);
    check_tensor("scale", out.scale, DType::kFloat32, with_width(shape, scales), device);
  } else {
    check_argument(out.scale.empty(), "both scale and static_scale are given");
    check_argument(std::isnormal(out.static_scale) && out.static_scale > 0,
                   "static_scale {} is not a positive normal number", out.static_scale);
    check_argument(!out.pow2, "pow2 is for group scales, not for a static one");
    check_argument(!out.per_token, "both per_token and static_scale are given");
  }
  return {.codes = out.codes.as<std::uint8_t>(),
          .scale = has_own ? out.scale.as<float>() : nullptr,
          .static_scale = out.static_scale,
          .width = width,
          .scale_per_row = out.per_token};
}

/// x and x_scale of a batch in `wire` format. Throws: kInvalidArgument.
void check_wire(const ExpertBatch& batch, WireFormat wire, std::int64_t width,
                const Device& device) {
  const Shape& shape = batch.x.shape;
  check_tensor("x", batch.x, wire == WireFormat::kBf16 ? DType::kBFloat16 : DType::kFloat8E4M3,
               shape, device);
  if (const std::int64_t scales = scales_per_row(sent_cast(wire), width); scales > 0) {
    check_tensor("x_scale", batch.x_scale, DType::kFloat32, with_width(shape, scales), device);
  } else {
    check_argument(batch.x_scale.empty(), "x_scale is given, but rows of {} have none",
                   to_string(wire));
  }
}

/// For batches of a caller. Throws: kInvalidArgument, kOutOfMemory.
std::shared_ptr<ExpertScratch> make_scratch(const ModelGeometry& geometry, std::int64_t max_rows,
                                            Backend& backend) {
  check_argument(max_rows > 0 && max_rows <= (std::int64_t{1} << 30),
                 "max_rows {} is not in [1, 2^30]", max_rows);
  auto scratch = std::make_shared<ExpertScratch>();
  scratch->max_rows = max_rows;
  const auto allocate = [&](std::int64_t width) {
    return Fp8Buffers{.codes = backend.allocate(fp8_code_bytes(max_rows, width)),
                      .scale = backend.allocate(fp8_scale_bytes(max_rows, width))};
  };
  // Here expert_y is a tensor of the caller, who may pass x itself: x is not quantized into it.
  scratch->x = allocate(geometry.hidden);
  scratch->h = allocate(geometry.intermediate);
  return scratch;
}

}  // namespace

Fp8RowsView received_rows(const ExpertBatch& batch, WireFormat wire, float static_scale,
                          std::int64_t width) {
  return {.codes = batch.x.as<std::uint8_t>(),
          .scale = batch.x_scale.as<float>(),
          .static_scale = static_scale,
          .width = width,
          .scale_per_row = sent_cast(wire) == Cast::kToken};
}

RowRanges check_batch(const LayerRecipe& recipe, const ExpertBatch& batch,
                      const MutableTensorView& expert_y, const BatchNeeds& needs,
                      const Device& device, std::vector<std::int64_t>& begin) {
  check_argument(!batch.num_rows.empty(), "num_rows is needed");
  const std::int64_t width = checked_width(batch);
  const RowRanges rows = checked_rows(batch, device, begin);
  check_argument(rows.num_experts == needs.num_experts,
                 "the batch has {} experts, the weights have {}", rows.num_experts,
                 needs.num_experts);
  check_argument(width == needs.hidden, "x has rows of {}, the weights take {}", width,
                 needs.hidden);
  check_argument(rows.max_rows <= needs.max_rows, "x has {} rows, more than max_rows {}",
                 rows.max_rows, needs.max_rows);
  check_wire(batch, recipe.wire, width, device);
  check_tensor("expert_y", expert_y, DType::kBFloat16, batch.x.shape, device);
  return rows;
}

void cast_batch(BackendOps& backend, const LayerRecipe& recipe, const ExpertBatch& batch,
                const RowRanges& rows, const Fp8Rows& out, Stream stream) {
  if (recipe.wire == WireFormat::kBf16) {
    const bool pow2 = recipe.gemm1 == Cast::kGroupPow2;
    backend.quantize(batch.x.as<std::uint16_t>(), rows, pow2, out, stream);
  } else {
    backend.requantize(received_rows(batch, recipe.wire, recipe.wire_static_scale(), out.width),
                       rows, out, stream);
  }
}

RowRanges row_ranges(const ExpertBatch& batch) {
  const bool is_masked = batch.x.shape.rank() == 3;
  return {.num_experts = static_cast<int>(batch.num_rows.dim(0)),
          .begin = is_masked ? nullptr : batch.row_begin.as<std::int64_t>(),
          .count = batch.num_rows.as<std::int32_t>(),
          .max_rows = is_masked ? batch.x.dim(0) * batch.x.dim(1) : batch.x.dim(0),
          .max_rows_per_expert = is_masked ? batch.x.dim(1) : batch.x.dim(0),
          .expected_m = batch.expected_m};
}

void quantize(Backend& backend, const ExpertBatch& rows, const E4m3Rows& out, Stream stream) {
  std::vector<std::int64_t> begin;
  const RowRanges ranges = checked_rows(rows, backend.device(), begin);
  const std::int64_t width = checked_width(rows);
  check_wire(rows, WireFormat::kBf16, width, backend.device());
  ops(backend).quantize(rows.x.as<std::uint16_t>(), ranges, out.pow2,
                        checked_output(out, rows.x.shape, width, backend.device()), stream);
}

void requantize(Backend& backend, const ExpertBatch& rows, const E4m3Rows& out, Stream stream) {
  std::vector<std::int64_t> begin;
  const RowRanges ranges = checked_rows(rows, backend.device(), begin);
  const std::int64_t width = checked_width(rows);
  check_wire(rows, WireFormat::kE4m3Group, width, backend.device());
  check_argument(out.static_scale != 0, "static_scale is needed: rows are re-quantized to it");
  check_argument(rows.x.data != out.codes.data || rows.x.shape.num_elements() == 0,
                 "codes and x are the same memory");
  ops(backend).requantize(received_rows(rows, WireFormat::kE4m3Group, 0, width), ranges,
                          checked_output(out, rows.x.shape, width, backend.device()), stream);
}

std::size_t fp8_code_bytes(std::int64_t max_rows, std::int64_t width) {
  return static_cast<std::size_t>(max_rows) * static_cast<std::size_t>(width);
}
std::size_t fp8_scale_bytes(std::int64_t max_rows, std::int64_t width) {
  return fp8_code_bytes(max_rows, width) / kActivationGroup * sizeof(float);
}

Fp8Rows cast_rows(const std::unique_ptr<DeviceBuffer>& codes,
                  const std::unique_ptr<DeviceBuffer>& scale, std::int64_t width, Cast cast,
                  float static_scale) {
  const bool has_own = scales_per_row(cast, width) > 0;
  return {.codes = codes ? reinterpret_cast<std::uint8_t*>(codes->data()) : nullptr,
          .scale = has_own ? reinterpret_cast<float*>(scale->data()) : nullptr,
          .static_scale = has_own ? 0.0f : static_scale,
          .width = width,
          .scale_per_row = cast == Cast::kToken};
}

Fp8Rows Fp8Buffers::rows(std::int64_t width, Cast cast, float static_scale) const {
  return cast_rows(codes, scale, width, cast, static_scale);
}

std::size_t Fp8Buffers::bytes() const noexcept {
  return (codes ? codes->bytes() : 0) + (scale ? scale->bytes() : 0);
}

std::uint64_t digest_of(const PreparedExperts& prepared) {
  std::vector<std::byte> bytes(prepared.bytes());
  prepared.copy_to_host(bytes.data());
  std::uint64_t digest = 0xcbf29ce484222325U;  // FNV-1a of words.
  for (std::size_t i = 0; i < bytes.size(); i += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min(sizeof word, bytes.size() - i));
    digest = (digest ^ word) * 0x100000001b3U;
    digest ^= digest >> 32;
  }
  return digest;
}

Experts::Impl::Impl(const ExpertWeights& shapes, std::shared_ptr<PreparedExperts> made,
                    std::shared_ptr<ExpertScratch> shared, Backend& b)
    : backend(&ops(b)),
      geometry(shapes.geometry),
      num_experts(static_cast<int>(shapes.experts.size())),
      prepared(std::move(made)),
      scratch(std::move(shared)) {
  for (const Expert& expert : shapes.experts) {
    for (const QuantMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
      codes_bytes += matrix->codes.bytes();
      scales_bytes += matrix->scales.bytes();
    }
  }
}

Experts::Impl::Impl(const RepackFormat& format, std::shared_ptr<ExpertScratch> shared, Backend& b,
                    const MutableTensorView& memory)
    : backend(&ops(b)),
      geometry(format.geometry),
      num_experts(format.num_experts),
      prepared(backend->make_room(format, memory)),
      is_missing(static_cast<std::size_t>(format.num_experts), true),
      scratch(std::move(shared)) {
  const auto elements = static_cast<std::size_t>(format.num_experts) * 3 *
                        static_cast<std::size_t>(geometry.hidden) *
                        static_cast<std::size_t>(geometry.intermediate);
  codes_bytes = elements / 2;
  scales_bytes =
      elements / static_cast<std::size_t>(geometry.group_size) * size_bytes(format.scale_dtype);
}

Fp8RowsView Experts::Impl::gemm1_rows(const LayerRecipe& recipe, const ExpertBatch& batch,
                                      const RowRanges& rows, std::uint16_t* expert_y,
                                      Stream stream) {
  const Fp8RowsView received =
      received_rows(batch, recipe.wire, recipe.wire_static_scale(), geometry.hidden);
  if (recipe.gemm1 == Cast::kNone) return received;

  Fp8Rows out = scratch->x.rows(geometry.hidden, recipe.gemm1, recipe.s1);
  if (out.codes == nullptr) {
    out.codes = reinterpret_cast<std::uint8_t*>(expert_y);
    out.stride = out.width * static_cast<std::int64_t>(sizeof(std::uint16_t));
  }
  cast_batch(*backend, recipe, batch, rows, out, stream);
  return out;
}

void Experts::Impl::gemms(const LayerRecipe& recipe, const Fp8RowsView& in, const RowRanges& rows,
                          std::uint16_t* expert_y, Stream stream, ExpertStageTimes* times) {
  const Fp8Rows h = scratch->h.rows(geometry.intermediate, recipe.gemm2, recipe.s2);
  backend->expert_stage(*prepared, in, rows, h, expert_y, stream, times);
}

void Experts::Impl::gemms_home(const LayerRecipe& recipe, const Fp8RowsView& in,
                               const RowRanges& rows, const HomeRows& home, Stream stream) {
  const Fp8Rows h = scratch->h.rows(geometry.intermediate, recipe.gemm2, recipe.s2);
  backend->expert_stage_home(*prepared, in, rows, h, home, stream);
}

Experts Experts::create(const ExpertWeights& weights, std::int64_t max_rows, Backend& backend) {
  check_argument(!weights.experts.empty(), "weights hold no expert");
  auto scratch = make_scratch(weights.geometry, max_rows, backend);
  return Experts(
      std::make_unique<Impl>(weights, ops(backend).prepare(weights), std::move(scratch), backend));
}

Experts Experts::make_room(const RepackFormat& format, std::int64_t max_rows, Backend& backend,
                           MutableTensorView memory) {
  return Experts(std::make_unique<Impl>(format, make_scratch(format.geometry, max_rows, backend),
                                        backend, memory));
}

void Experts::repack(int first, std::span<const ExpertSource> sources, Stream stream) {
  Impl& self = *impl_;
  check_argument(!self.is_missing.empty(), "the experts are repacked already");
  self.backend->repack(*self.prepared, first, sources, stream);
  for (std::size_t i = 0; i < sources.size(); ++i) {
    self.is_missing[static_cast<std::size_t>(first) + i] = false;
  }
}

void Experts::finish_repack(Stream stream) {
  Impl& self = *impl_;
  for (std::size_t i = 0; i < self.is_missing.size(); ++i) {
    check_argument(!self.is_missing[i], "expert {} of {} has not been repacked", i,
                   self.num_experts);
  }
  self.backend->finish_repack(*self.prepared, stream);
  self.is_missing.clear();
}

void Experts::reserve(std::int64_t max_rows) {
  Impl& self = *impl_;
  if (max_rows <= self.scratch->max_rows) return;
  self.outgrown.reserve(self.outgrown.size() + 1);
  auto larger = make_scratch(self.geometry, max_rows, *self.backend);
  self.outgrown.push_back(std::exchange(self.scratch, std::move(larger)));
}

void Experts::forward(const LayerRecipe& recipe, const ExpertBatch& batch,
                      MutableTensorView expert_y, Stream stream) {
  check_recipe(recipe);
  Impl& self = *impl_;
  check_argument(self.is_missing.empty(), "finish_repack() has not been called");
  std::vector<std::int64_t> begin;
  const BatchNeeds needs{.num_experts = self.num_experts,
                         .hidden = self.geometry.hidden,
                         .max_rows = self.scratch->max_rows};
  const RowRanges rows = check_batch(recipe, batch, expert_y, needs, self.backend->device(), begin);
  auto* const y = expert_y.as<std::uint16_t>();
  const Fp8RowsView in = self.gemm1_rows(recipe, batch, rows, y, stream);
  ExpertStageTimes times;
  self.gemms(recipe, in, rows, y, stream, &times);
}

int Experts::num_experts() const noexcept {
  return impl_->num_experts;
}
std::int64_t Experts::max_rows() const noexcept {
  return impl_->scratch->max_rows;
}
const ModelGeometry& Experts::geometry() const noexcept {
  return impl_->geometry;
}
std::size_t Experts::weight_bytes() const noexcept {
  return impl_->prepared->bytes();
}

Experts::Experts(std::unique_ptr<Impl> impl) noexcept : impl_(std::move(impl)) {}
Experts::Experts(Experts&&) noexcept = default;
Experts& Experts::operator=(Experts&&) noexcept = default;
Experts::~Experts() = default;

}  // namespace sluice
