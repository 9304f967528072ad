// Checks what a caller brings, then runs the stages of the backend on it.
#include "sluice/experts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/fail.h"
#include "engine/experts_impl.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

void check_tensor(const char* name, const TensorView& t, DType dtype, const Shape& shape,
                  const Device& device) {
  check_argument(t.dtype == dtype, "{} is {}, expected {}", name, to_string(t.dtype),
                 to_string(dtype));
  check_argument(t.shape == shape, "{} has shape {}, expected {}", name, t.shape.to_string(),
                 shape.to_string());
  check_argument(t.data != nullptr || shape.num_elements() == 0, "{} has no data", name);
  check_argument(t.device == device, "{} does not live on the backend's device", name);
}

/// `shape` with its last dimension replaced.
Shape with_width(const Shape& shape, std::int64_t width) {
  return shape.rank() == 3 ? Shape{shape[0], shape[1], width} : Shape{shape[0], width};
}

/// The layout of a batch, before its row counts are looked at.
struct Layout {
  bool masked;
  std::int64_t num_experts, max_rows, max_rows_per_expert, width;
};

Layout layout_of(const ExpertBatch& batch, bool rows_are_told) {
  const Shape& shape = batch.x.shape;
  check_argument(shape.rank() == 2 || shape.rank() == 3,
                 "x has shape {}, expected [num_experts, max_m, width] or [num_rows, width]",
                 shape.to_string());
  const bool masked = shape.rank() == 3;
  const std::int64_t width = shape[shape.rank() - 1];
  check_argument(width > 0 && width % kActivationGroup == 0,
                 "x has rows of {}, not of a positive multiple of {}", width, kActivationGroup);
  if (!rows_are_told) {
    const std::int64_t rows = masked ? shape[0] * shape[1] : shape[0];
    return {.masked = false,
            .num_experts = 1,
            .max_rows = rows,
            .max_rows_per_expert = rows,
            .width = width};
  }
  const Shape& counts = batch.num_rows.shape;
  check_argument(counts.rank() == 1, "num_rows has shape {}, expected [num_experts]",
                 counts.to_string());
  if (masked) {
    return {.masked = true,
            .num_experts = shape[0],
            .max_rows = shape[0] * shape[1],
            .max_rows_per_expert = shape[1],
            .width = width};
  }
  return {.masked = false,
          .num_experts = counts[0],
          .max_rows = shape[0],
          .max_rows_per_expert = shape[0],
          .width = width};
}

/// ExpertRows of a batch, with memory for the parts that the caller left out.
class RowRanges {
 public:
  RowRanges(const ExpertBatch& batch, BackendOps& backend, Experts::Impl* cache, Stream stream)
      : layout_(layout_of(batch, !batch.num_rows.empty())) {
    const Device device = backend.device();
    const bool told = !batch.num_rows.empty();
    const Shape shape{layout_.num_experts};
    if (told) check_tensor("num_rows", batch.num_rows, DType::kInt32, shape, device);
    if (!batch.row_begin.empty()) {
      check_argument(told, "row_begin is given without num_rows");
      check_tensor("row_begin", batch.row_begin, DType::kInt64, shape, device);
    }
    rows_ = {.num_local_experts = static_cast<int>(layout_.num_experts),
             .row_begin = batch.row_begin.as<std::int64_t>(),
             .num_rows = batch.num_rows.as<std::int32_t>(),
             .max_rows = layout_.max_rows,
             .max_rows_per_expert = layout_.max_rows_per_expert,
             .expected_m = batch.expected_m};
    if (device.kind == Device::Kind::kHost) {
      complete_on_host();
    } else {
      complete_on_device(backend, cache, stream);
    }
  }

  [[nodiscard]] const ExpertRows& rows() const noexcept { return rows_; }
  [[nodiscard]] const Layout& layout() const noexcept { return layout_; }

 private:
  void complete_on_host() {
    if (!rows_.num_rows) {
      num_rows_ = {static_cast<std::int32_t>(layout_.max_rows)};
      rows_.num_rows = num_rows_.data();
    }
    const bool derive = !rows_.row_begin;
    if (derive) row_begin_.resize(static_cast<std::size_t>(layout_.num_experts));
    std::int64_t next = 0;
    for (int e = 0; e < rows_.num_local_experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      const std::int64_t count = rows_.num_rows[e];
      check_argument(count >= 0 && count <= layout_.max_rows_per_expert,
                     "num_rows[{}] = {} is not in [0, {}]", e, count, layout_.max_rows_per_expert);
      if (derive) row_begin_[i] = layout_.masked ? e * layout_.max_rows_per_expert : next;
      const std::int64_t begin = derive ? row_begin_[i] : rows_.row_begin[e];
      const std::int64_t least = layout_.masked ? e * layout_.max_rows_per_expert : next;
      check_argument(
          layout_.masked ? begin == least : begin >= least && begin + count <= layout_.max_rows,
          "row_begin[{}] = {} with {} rows: expected rows from {} on, within {}", e, begin, count,
          least, layout_.max_rows);
      next = begin + count;
    }
    if (derive) rows_.row_begin = row_begin_.data();
  }

  void complete_on_device(BackendOps& backend, Experts::Impl* cache, Stream stream) {
    if (!rows_.num_rows) {
      const auto rows = static_cast<std::int32_t>(layout_.max_rows);
      num_rows_buffer_ = backend.allocate(sizeof(rows));
      backend.copy_from_host(num_rows_buffer_->data(), &rows, sizeof(rows), stream);
      rows_.num_rows = reinterpret_cast<const std::int32_t*>(num_rows_buffer_->data());
    } else if (!rows_.row_begin) {
      check_argument(layout_.masked, "row_begin is needed for contiguous rows in device memory");
    }
    if (rows_.row_begin) return;
    auto& buffer = cache ? cache->row_begin : row_begin_buffer_;
    if (!cache || cache->row_begin_max_m != layout_.max_rows_per_expert) {
      row_begin_.resize(static_cast<std::size_t>(layout_.num_experts));
      for (std::size_t e = 0; e < row_begin_.size(); ++e) {
        row_begin_[e] = static_cast<std::int64_t>(e) * layout_.max_rows_per_expert;
      }
      const std::size_t bytes = row_begin_.size() * sizeof(row_begin_[0]);
      if (!buffer) buffer = backend.allocate(bytes);
      backend.copy_from_host(buffer->data(), row_begin_.data(), bytes, stream);
      if (cache) cache->row_begin_max_m = layout_.max_rows_per_expert;
    }
    rows_.row_begin = reinterpret_cast<const std::int64_t*>(buffer->data());
  }

  Layout layout_;
  ExpertRows rows_;
  std::vector<std::int32_t> num_rows_;
  std::vector<std::int64_t> row_begin_;
  std::unique_ptr<DeviceBuffer> num_rows_buffer_, row_begin_buffer_;
};

/// `out` as the backend wants it. Throws: kInvalidArgument.
QuantizedRows checked_output(const E4m3Rows& out, const Shape& shape, std::int64_t width,
                             const Device& device) {
  check_tensor("codes", out.codes, DType::kFloat8E4M3, shape, device);
  const bool grouped = out.static_scale == 0;
  if (grouped) {
    check_tensor("scale", out.scale, DType::kFloat32, with_width(shape, width / kActivationGroup),
                 device);
  } else {
    check_argument(out.scale.empty(), "both scale and static_scale are given");
    check_argument(std::isnormal(out.static_scale) && out.static_scale > 0,
                   "static_scale {} is not a positive normal number", out.static_scale);
    check_argument(!out.pow2, "pow2 is for group scales, not for a static one");
  }
  return {.codes = out.codes.as<std::uint8_t>(),
          .scale = grouped ? out.scale.as<float>() : nullptr,
          .static_scale = out.static_scale,
          .width = width};
}

/// x and x_scale of a batch in `wire` format. Throws: kInvalidArgument.
void check_wire(const ExpertBatch& batch, WireFormat wire, std::int64_t width,
                const Device& device) {
  const Shape& shape = batch.x.shape;
  check_tensor("x", batch.x, wire == WireFormat::kBf16 ? DType::kBFloat16 : DType::kFloat8E4M3,
               shape, device);
  if (wire == WireFormat::kE4m3Group || wire == WireFormat::kE4m3Pow2) {
    check_tensor("x_scale", batch.x_scale, DType::kFloat32,
                 with_width(shape, width / kActivationGroup), device);
  } else {
    check_argument(batch.x_scale.empty(), "x_scale is given, but rows of {} have none",
                   to_string(wire));
  }
}

/// e4m3 rows of a batch, to read: nothing below writes through the pointers.
QuantizedRows received_rows(const ExpertBatch& batch, float static_scale, std::int64_t width) {
  return {.codes = static_cast<std::uint8_t*>(const_cast<void*>(batch.x.data)),
          .scale = static_cast<float*>(const_cast<void*>(batch.x_scale.data)),
          .static_scale = static_scale,
          .width = width};
}

}  // namespace

void quantize(Backend& backend, const ExpertBatch& rows, const E4m3Rows& out, Stream stream) {
  const RowRanges ranges(rows, ops(backend), nullptr, stream);
  const std::int64_t width = ranges.layout().width;
  check_wire(rows, WireFormat::kBf16, width, backend.device());
  ops(backend).quantize(rows.x.as<std::uint16_t>(), ranges.rows(), out.pow2,
                        checked_output(out, rows.x.shape, width, backend.device()), stream);
}

void requantize(Backend& backend, const ExpertBatch& rows, const E4m3Rows& out, Stream stream) {
  const RowRanges ranges(rows, ops(backend), nullptr, stream);
  const std::int64_t width = ranges.layout().width;
  check_wire(rows, WireFormat::kE4m3Group, width, backend.device());
  check_argument(out.static_scale != 0, "static_scale is needed: rows are re-quantized to it");
  check_argument(rows.x.data != out.codes.data || rows.x.shape.num_elements() == 0,
                 "codes and x are the same memory");
  ops(backend).requantize(received_rows(rows, 0, width), ranges.rows(),
                          checked_output(out, rows.x.shape, width, backend.device()), stream);
}

Experts::Impl::Impl(const ExpertWeights& weights, std::int64_t rows, Backend& b)
    : backend(&ops(b)),
      geometry(weights.geometry),
      num_experts(static_cast<int>(weights.experts.size())),
      max_rows(rows),
      prepared(backend->prepare(weights)) {
  for (const Expert& expert : weights.experts) {
    for (const Int4Matrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
      codes_bytes += matrix->codes.bytes();
      scales_bytes += matrix->scales.bytes();
    }
  }
  const auto bytes = scratch_bytes(geometry, max_rows);
  std::size_t i = 0;
  for (auto* buffer : {&x_codes, &x_scale, &h_codes, &h_scale}) {
    *buffer = backend->allocate(bytes[i++]);
  }
}

std::array<std::size_t, 4> Experts::Impl::scratch_bytes(const ModelGeometry& geometry,
                                                        std::int64_t max_rows) {
  const auto rows = static_cast<std::size_t>(max_rows);
  const auto hidden = static_cast<std::size_t>(geometry.hidden);
  const auto intermediate = static_cast<std::size_t>(geometry.intermediate);
  return {rows * hidden, rows * hidden / kActivationGroup * sizeof(float), rows * intermediate,
          rows * intermediate / kActivationGroup * sizeof(float)};
}

QuantizedRows Experts::Impl::gemm1_rows(const Recipe& recipe, const ExpertBatch& batch,
                                        const ExpertRows& rows, Stream stream) {
  const QuantizedRows received = received_rows(
      batch, recipe.wire == WireFormat::kE4m3Static ? recipe.s1 : 0.0f, geometry.hidden);
  if (recipe.gemm1_as_sent) return received;

  const bool grouped = recipe.gemm1 == GemmInput::kGroup;
  const QuantizedRows out{.codes = reinterpret_cast<std::uint8_t*>(x_codes->data()),
                          .scale = grouped ? reinterpret_cast<float*>(x_scale->data()) : nullptr,
                          .static_scale = grouped ? 0.0f : recipe.s1,
                          .width = geometry.hidden};
  if (recipe.wire == WireFormat::kBf16) {
    backend->quantize(batch.x.as<std::uint16_t>(), rows, /*pow2=*/false, out, stream);
  } else {
    backend->requantize(received, rows, out, stream);
  }
  return out;
}

void Experts::Impl::gemms(const Recipe& recipe, const QuantizedRows& in, const ExpertRows& rows,
                          std::uint16_t* expert_y, Stream stream, ExpertStageTimes* times) {
  const bool grouped = recipe.gemm2 == GemmInput::kGroup;
  const QuantizedRows h{.codes = reinterpret_cast<std::uint8_t*>(h_codes->data()),
                        .scale = grouped ? reinterpret_cast<float*>(h_scale->data()) : nullptr,
                        .static_scale = grouped ? 0.0f : recipe.s2,
                        .width = geometry.intermediate};
  backend->expert_stage(*prepared, in, rows, h, expert_y, stream, times);
}

Experts Experts::create(const ExpertWeights& weights, std::int64_t max_rows, Backend& backend) {
  check_argument(!weights.experts.empty(), "weights hold no expert");
  check_argument(max_rows > 0 && max_rows <= (std::int64_t{1} << 30),
                 "max_rows {} is not in [1, 2^30]", max_rows);
  return Experts(std::make_unique<Impl>(weights, max_rows, backend));
}

void Experts::forward(const Recipe& recipe, const ExpertBatch& batch, MutableTensorView expert_y,
                      Stream stream) {
  Impl& self = *impl_;
  const Device device = self.backend->device();
  check_argument(!batch.num_rows.empty(), "num_rows is needed");
  const Layout layout = layout_of(batch, true);
  check_argument(layout.num_experts == self.num_experts,
                 "the batch has {} experts, the weights have {}", layout.num_experts,
                 self.num_experts);
  check_argument(layout.width == self.geometry.hidden, "x has rows of {}, the weights take {}",
                 layout.width, self.geometry.hidden);
  check_argument(layout.max_rows <= self.max_rows, "x has {} rows, more than max_rows {}",
                 layout.max_rows, self.max_rows);
  check_wire(batch, recipe.wire, layout.width, device);
  check_tensor("expert_y", expert_y, DType::kBFloat16, batch.x.shape, device);
  const RowRanges ranges(batch, *self.backend, &self, stream);
  const QuantizedRows in = self.gemm1_rows(recipe, batch, ranges.rows(), stream);
  ExpertStageTimes times;
  self.gemms(recipe, in, ranges.rows(), expert_y.as<std::uint16_t>(), stream, &times);
}

int Experts::num_experts() const noexcept {
  return impl_->num_experts;
}
std::int64_t Experts::max_rows() const noexcept {
  return impl_->max_rows;
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
