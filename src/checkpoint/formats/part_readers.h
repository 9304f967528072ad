// part_readers.h - what several formats need to read: scales, scalars, codes that must be
// rewritten.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "checkpoint/expert_storage.h"
#include "checkpoint/formats/format.h"
#include "checkpoint/tensor_index.h"
#include "sluice/tensor.h"

namespace sluice {

/// Requires: the part exists, which check_parts() has seen to.
[[nodiscard]] const TensorRef& part_of(const ExpertTensors& expert, std::string_view part);

/// Throws: kUnsupported for another dtype and for a shape that contradicts the config, naming file,
/// tensor, what is there and what is expected; of a part of `matrix` also the sizes it would fit.
void check_part(const TensorRef& tensor, const PartSpec& spec,
                const MatrixLayout* matrix = nullptr);

/// One number, F32, F16 or BF16, finite and positive. Throws: kCorruptFile calling it `what`.
[[nodiscard]] float read_positive(const TensorRef& tensor, std::string_view what);

/// [n, groups] scales: a view into the file, or a copy where they lie misaligned or are F16 (which
/// float32 holds exactly). Throws: kCorruptFile for one that is not finite and positive,
/// kUnsupported for one of kScaleLimit or more.
[[nodiscard]] TensorView load_scales(const TensorRef& tensor, std::int64_t n, std::int64_t groups,
                                     ExpertStorage& storage);

/// The same of e8m0: its NaN is corrupt.
[[nodiscard]] TensorView load_e8m0(const TensorRef& tensor, std::int64_t n, std::int64_t groups,
                                   ExpertStorage& storage);

/// [n] of a BF16, F16 or F32 tensor, those of `rows`. Throws: kCorruptFile for one that is not
/// finite.
[[nodiscard]] std::vector<float> read_bias(const TensorRef& tensor, RowStep rows, std::int64_t n);

/// `in` with zero codes, or scales of one, up to [n, width], in new memory of `storage`.
[[nodiscard]] TensorView padded_codes(const TensorView& in, std::int64_t n, std::int64_t width,
                                      ExpertStorage& storage);
[[nodiscard]] TensorView padded_scales(const TensorView& in, std::int64_t n, std::int64_t width,
                                       ExpertStorage& storage);
/// Codes, scales and bias of a matrix as the model has it, padded to what is canonical.
[[nodiscard]] QuantMatrix padded(const QuantMatrix& in, const MatrixLayout& matrix,
                                 ExpertStorage& storage);

/// [n, k / 2] codes as they lie in the file.
[[nodiscard]] TensorView view_codes(const TensorRef& tensor, const MatrixLayout& matrix,
                                    ExpertStorage& storage,
                                    WeightFormat format = WeightFormat::kInt4);
/// The same with every nibble's highest bit flipped: q + 8 becomes two's complement q.
[[nodiscard]] TensorView load_offset_codes(const TensorRef& tensor, const MatrixLayout& matrix,
                                           ExpertStorage& storage);

/// Flips the highest bit of every nibble of `in`, into `out`, which may be the same memory.
void flip_high_bits(std::span<const std::byte> in, std::byte* out) noexcept;

/// New memory that lives as long as `storage`.
[[nodiscard]] std::span<std::byte> allocate(ExpertStorage& storage, std::size_t bytes);

[[nodiscard]] float f16_to_float(std::uint16_t bits) noexcept;

}  // namespace sluice
