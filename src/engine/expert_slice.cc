// Slices of experts for tensor parallelism: rows of gate and up, columns of down.
#include <cstring>
#include <memory>
#include <utility>

#include "checkpoint/expert_storage.h"
#include "core/fail.h"
#include "sluice/local_experts.h"
#include "sluice/quant.h"

namespace sluice {
namespace {

/// Rows [first, first + count) of a view; they stay where they are.
TensorView rows_of(const TensorView& view, std::int64_t first, std::int64_t count) {
  const std::size_t row_bytes = view.bytes() / static_cast<std::size_t>(view.dim(0));
  TensorView rows = view;
  rows.data = view.as<std::byte>() + static_cast<std::size_t>(first) * row_bytes;
  rows.shape = {count, view.dim(1)};
  return rows;
}

/// Columns [first, first + count) of a view, copied into `storage`.
TensorView columns_of(const TensorView& view, std::int64_t first, std::int64_t count,
                      ExpertStorage& storage) {
  const auto num_rows = static_cast<std::size_t>(view.dim(0));
  const std::size_t row_bytes = view.bytes() / num_rows;
  const std::size_t element_bytes = row_bytes / static_cast<std::size_t>(view.dim(1));
  const std::size_t begin = static_cast<std::size_t>(first) * element_bytes;
  const std::size_t bytes = static_cast<std::size_t>(count) * element_bytes;
  std::byte* const copy =
      storage.copies.emplace_back(new std::byte[num_rows * bytes]).get();  // All written below.
  for (std::size_t row = 0; row < num_rows; ++row) {
    std::memcpy(copy + row * bytes, view.as<std::byte>() + row * row_bytes + begin, bytes);
  }
  TensorView columns = view;
  columns.data = copy, columns.shape = {view.dim(0), count};
  return columns;
}

QuantMatrix rows_of(const QuantMatrix& m, std::int64_t first, std::int64_t count) {
  QuantMatrix rows = m;
  rows.codes = rows_of(m.codes, first, count);
  rows.scales = rows_of(m.scales, first, count);
  if (m.has_bias()) rows.bias = {m.bias.as<float>() + first, DType::kFloat32, {count}};
  return rows;
}

QuantMatrix columns_of(const QuantMatrix& m, std::int64_t first, std::int64_t count,
                       ExpertStorage& storage) {
  QuantMatrix columns = m;
  if (m.has_bias() && first > 0) {  // Outputs of slices add up: the first one's has the bias.
    const auto bytes = m.bias.bytes();
    columns.bias.data = storage.copies.emplace_back(new std::byte[bytes]()).get();
  }
  columns.codes = columns_of(m.codes, first / 2, count / 2, storage);
  columns.scales = columns_of(m.scales, first / m.group_size, count / m.group_size, storage);
  return columns;
}

}  // namespace

ExpertWeights slice_experts(const ExpertWeights& experts, int slice, int num_slices) {
  const int intermediate = experts.geometry.intermediate;
  check_argument(num_slices >= 1 && intermediate % num_slices == 0 &&
                     intermediate / num_slices % kActivationGroup == 0,
                 "intermediate {} cut in {}: slices are multiples of {}", intermediate, num_slices,
                 kActivationGroup);
  check_argument(slice >= 0 && slice < num_slices, "slice {} is not in [0, {})", slice, num_slices);
  const std::int64_t count = intermediate / num_slices, first = slice * count;

  auto storage = std::make_unique<ExpertStorage>();
  if (const auto* deleter = std::get_deleter<ExpertStorageDeleter>(experts.storage)) {
    storage->files = deleter->storage->files;
  }
  storage->base = experts.storage;
  ExpertWeights sliced = experts;
  sliced.geometry.intermediate = static_cast<int>(count);
  sliced.geometry.model_intermediate = 0;  // Of the last slice alone would it be another number.
  for (Expert& expert : sliced.experts) {
    expert.gate = rows_of(expert.gate, first, count);
    expert.up = rows_of(expert.up, first, count);
    expert.down = columns_of(expert.down, first, count, *storage);
  }
  const ExpertStorage* const kept = storage.release();
  sliced.storage = std::shared_ptr<const void>(kept, ExpertStorageDeleter{kept});
  return sliced;
}

}  // namespace sluice
