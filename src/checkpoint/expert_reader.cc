#include "checkpoint/expert_reader.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "checkpoint/checkpoint_impl.h"
#include "core/fail.h"

namespace sluice {
namespace {

/// A matrix of this layout that is not there yet.
QuantMatrix without_data(const Format& format, const ExpertTensors& expert,
                         const MatrixLayout& layout) {
  QuantMatrix matrix;
  matrix.group_size = format.group_size();
  matrix.format = *format.weight_format();
  matrix.codes.dtype = code_dtype(matrix.format);
  matrix.codes.shape = {layout.padded_n, layout.padded_k / 2};
  matrix.scales.dtype = format.scale_dtype(expert, layout);
  matrix.scales.shape = {layout.padded_n, layout.padded_k / matrix.group_size};
  if (format.has_bias()) matrix.bias.shape = {layout.padded_n};
  return matrix;
}

/// Throws: kInvalidArgument.
std::vector<int> in_order(const CheckpointData& data, int layer, int first, int count) {
  (void)data.layer_tensors(layer);
  data.check_range(first, count);
  std::vector<int> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

}  // namespace

ExpertReader::ExpertReader(const Checkpoint& checkpoint, int layer, int first_expert,
                           int num_experts, std::size_t piece_bytes)
    : ExpertReader(checkpoint, layer, in_order(*checkpoint.impl_, layer, first_expert, num_experts),
                   piece_bytes) {}

ExpertReader::ExpertReader(const Checkpoint& checkpoint, int layer, std::vector<int> experts,
                           std::size_t piece_bytes)
    : data_(checkpoint.impl_.get()),
      experts_(std::move(experts)),
      layouts_(matrix_layouts(data_->geometry())),
      most_piece_bytes_(piece_bytes) {
  (void)data_->layer_tensors(layer);
  check_argument(!experts_.empty(), "no experts to read");
  for (const int e : experts_) data_->check_range(e, 1);
  const auto num_experts = static_cast<int>(experts_.size());
  data_->require_codes();
  data_->check_layer(layer);
  shapes_.layer = layer;
  shapes_.first_expert = experts_.front();
  shapes_.geometry = data_->geometry();
  shapes_.geometry.activation = checkpoint.activation(layer);
  shapes_.static_scales = checkpoint.static_scales(layer);
  shapes_.experts.resize(static_cast<std::size_t>(num_experts));
  seen_.resize(static_cast<std::size_t>(num_experts));
  for (std::size_t m = 0; m < layouts_.size(); ++m) {
    for (PartSpec& spec : data_->format->parts(layouts_[m])) {
      parts_[m].push_back(std::move(spec.name));
    }
    codes_parts_[m] = data_->format->codes_part(layouts_[m]);
  }
  for (std::size_t m = 0; m < layouts_.size(); ++m) {
    codes_bytes_ =
        std::max(codes_bytes_, static_cast<std::size_t>(layouts_[m].padded_n * row_bytes(m)));
    piece_bytes_ =
        std::max(piece_bytes_,
                 static_cast<std::size_t>(piece_rows(static_cast<MatrixRole>(m)) * row_bytes(m)));
  }
  for (int e = 0; e < num_experts; ++e) {
    Expert& shape = shapes_.experts[static_cast<std::size_t>(e)];
    QuantMatrix* const matrices[] = {&shape.gate, &shape.up, &shape.down};
    for (std::size_t m = 0; m < layouts_.size(); ++m) {
      *matrices[m] = without_data(*data_->format, expert(e), layouts_[m]);
      std::size_t beside_codes = data_->format->copied_bytes(layouts_[m]);
      for (const std::string& part : parts_[m]) {
        const TensorRef* const tensor = expert(e).find(part);
        if (tensor == nullptr) continue;  // An optional one.
        file_bytes_ += tensor->size();
        if (is_beside(part, m)) beside_codes += aligned_in_room(tensor->size());
      }
      if (layouts_[m].is_padded()) {
        beside_codes += aligned_in_room(matrices[m]->scales.bytes());
      }
      scales_bytes_ = std::max(scales_bytes_, beside_codes);
    }
  }
}

std::int64_t ExpertReader::row_bytes(std::size_t matrix) const noexcept {
  return layouts_[matrix].padded_k / 2;
}

/// What read_scales() reads.
bool ExpertReader::is_beside(const std::string& part, std::size_t matrix) const {
  return part != codes_parts_[matrix] && part != data_->format->bias_part(layouts_[matrix]);
}

std::int64_t ExpertReader::piece_rows(MatrixRole role) const noexcept {
  constexpr std::int64_t kRows = 16;
  const auto matrix = static_cast<std::size_t>(role);
  const std::int64_t n = layouts_[matrix].padded_n;
  const std::int64_t most = std::max(
      kRows, static_cast<std::int64_t>(most_piece_bytes_) / row_bytes(matrix) / kRows * kRows);
  const std::int64_t pieces = (n + most - 1) / most;
  return std::min(n, ((n + pieces - 1) / pieces + kRows - 1) / kRows * kRows);
}

const ExpertTensors& ExpertReader::expert(int index) const {
  const LayerTensors& layer = data_->layer_tensors(shapes_.layer);
  const int number = experts_[static_cast<std::size_t>(index)];
  return layer.experts[static_cast<std::size_t>(number)];
}

std::vector<TensorRef> ExpertReader::tensors(int index, MatrixRole role) const {
  std::vector<TensorRef> found;
  for (const std::string& part : parts_[static_cast<std::size_t>(role)]) {
    if (const TensorRef* const tensor = expert(index).find(part)) found.push_back(*tensor);
  }
  return found;
}

void ExpertReader::read(const TensorRef& tensor, std::uint64_t at, std::span<std::byte> bytes) {
  read_tensor(tensor, at, bytes);
  bytes_read_.fetch_add(bytes.size(), std::memory_order_relaxed);
}

TensorView ExpertReader::read_scales(int index, MatrixRole role, std::span<std::byte> memory) {
  SLUICE_ASSERT(memory.size() >= scales_bytes_);
  const auto matrix = static_cast<std::size_t>(role);
  ExpertTensors tensors;
  for (const std::string& part : parts_[matrix]) {
    const TensorRef* const in_file = expert(index).find(part);
    if (in_file == nullptr || !is_beside(part, matrix)) continue;
    TensorRef& tensor = tensors.parts.emplace_back(part, *in_file).tensor;
    const auto bytes = memory.first(tensor.size());
    read(tensor, 0, bytes);
    tensor.read_bytes = bytes.data();
    memory = memory.subspan(aligned_in_room(bytes.size()));
  }
  ExpertStorage storage{.files = {}, .copies = {}, .room = memory};
  data_->format->check_values(tensors, layouts_[matrix]);
  const MatrixLayout& layout = layouts_[matrix];
  const TensorView scales = data_->format->scales(tensors, layout, storage);
  if (!layout.is_padded()) return scales;
  return padded_scales(scales, layout.padded_n, layout.padded_k / data_->format->group_size(),
                       storage);
}

std::vector<float> ExpertReader::read_bias(int index, MatrixRole role) {
  const MatrixLayout& layout = layouts_[static_cast<std::size_t>(role)];
  const std::string part = data_->format->bias_part(layout);
  if (part.empty()) return {};
  TensorRef tensor = part_of(expert(index), part);
  std::vector<std::byte> bytes(tensor.size());
  read(tensor, 0, bytes);
  tensor.read_bytes = bytes.data();
  ExpertTensors tensors;
  tensors.parts.push_back({.name = part, .tensor = tensor});
  std::vector<float> bias = data_->format->bias(tensors, layout);
  bias.resize(static_cast<std::size_t>(layout.padded_n));  // With zeros.
  return bias;
}

/// Rows that have others between them in the file, or zeros behind them here: a half of `spare`
/// takes as many as it can hold of the file's, as often as it needs to.
void ExpertReader::read_scattered_rows(int index, std::size_t matrix, std::int64_t first_row,
                                       std::span<std::byte> rows, std::span<std::byte> spare) {
  const MatrixLayout& layout = layouts_[matrix];
  const RowStep step = data_->format->rows(layout);
  const TensorRef& codes = part_of(expert(index), codes_parts_[matrix]);
  const auto own = static_cast<std::size_t>(layout.k / 2);
  const auto width = static_cast<std::size_t>(row_bytes(matrix));
  const auto half = spare.size() / 2;
  const auto most = static_cast<std::int64_t>(half / own / 2 * 2) / step.step;
  SLUICE_ASSERT(most > 0);
  const std::int64_t last =
      std::min(layout.n, first_row + static_cast<std::int64_t>(rows.size() / width));
  std::byte* to = rows.data();
  for (std::int64_t row = first_row; row < last; row += most) {
    const std::int64_t count = std::min(most, last - row);
    const auto bytes = spare.first(static_cast<std::size_t>(count * step.step) * own);
    read(codes, static_cast<std::uint64_t>(row * step.step) * own, bytes);
    data_->format->make_canonical(bytes, layout, spare.subspan(half, bytes.size()));
    for (std::int64_t i = 0; i < count; ++i, to += width) {
      std::memcpy(to, bytes.data() + static_cast<std::size_t>(step.first + i * step.step) * own,
                  own);
      std::memset(to + own, 0, width - own);
    }
  }
  std::memset(to, 0, static_cast<std::size_t>(rows.data() + rows.size() - to));
}

void ExpertReader::read_rows(int index, MatrixRole role, std::int64_t first_row,
                             std::span<std::byte> rows, std::span<std::byte> spare) {
  const auto matrix = static_cast<std::size_t>(role);
  if (layouts_[matrix].is_padded() || data_->format->rows(layouts_[matrix]).step != 1) {
    read_scattered_rows(index, matrix, first_row, rows, spare.first(rows.size()));
  } else {
    const TensorRef& codes = part_of(expert(index), codes_parts_[matrix]);
    read(codes, static_cast<std::uint64_t>(first_row * row_bytes(matrix)), rows);
    data_->format->make_canonical(rows, layouts_[matrix], spare.first(rows.size()));
  }
  // E2m1 has no second way to store its nibbles that rows could be evidence of.
  if (first_row > 0 || data_->format->weight_format() != WeightFormat::kInt4) return;
  QuantMatrix view;
  view.codes = {rows.data(),
                DType::kPackedInt4,
                {static_cast<std::int64_t>(rows.size()) / row_bytes(matrix), row_bytes(matrix)}};
  judge(index, view);
}

void ExpertReader::judge(int index, const QuantMatrix& rows) {
  const NibbleEvidence nibbles = canonical_nibbles(rows);
  NibbleEvidence all;
  {
    const std::lock_guard lock(mutex_);
    Seen& seen = seen_[static_cast<std::size_t>(index)];
    seen.nibbles.add(nibbles);
    if (++seen.num_matrices < 3) return;
    all = seen.nibbles;
  }
  data_->check_nibbles(shapes_.layer, experts_[static_cast<std::size_t>(index)], all);
}

}  // namespace sluice
