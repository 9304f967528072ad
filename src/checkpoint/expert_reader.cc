#include "checkpoint/expert_reader.h"

#include <algorithm>

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
  matrix.codes.dtype = DType::kPackedInt4;
  matrix.codes.shape = {layout.n, layout.k / 2};
  matrix.scales.dtype = format.scale_dtype(expert, layout);
  matrix.scales.shape = {layout.n, layout.k / matrix.group_size};
  return matrix;
}

}  // namespace

ExpertReader::ExpertReader(const Checkpoint& checkpoint, int layer, int first_expert,
                           int num_experts)
    : data_(checkpoint.impl_.get()), layouts_(matrix_layouts(data_->geometry())) {
  (void)data_->layer_tensors(layer);
  data_->check_range(first_expert, num_experts);
  data_->require_int4();
  data_->check_layer(layer);
  shapes_.layer = layer;
  shapes_.first_expert = first_expert;
  shapes_.geometry = data_->geometry();
  shapes_.geometry.activation = checkpoint.activation(layer);
  shapes_.static_scales = checkpoint.static_scales(layer);
  shapes_.experts.resize(static_cast<std::size_t>(num_experts));
  seen_.resize(static_cast<std::size_t>(num_experts));
  for (std::size_t m = 0; m < layouts_.size(); ++m) {
    for (PartSpec& spec : data_->format->parts(layouts_[m])) {
      parts_[m].push_back(std::move(spec.name));
    }
  }
  for (int e = 0; e < num_experts; ++e) {
    Expert& shape = shapes_.experts[static_cast<std::size_t>(e)];
    QuantMatrix* const matrices[] = {&shape.gate, &shape.up, &shape.down};
    for (std::size_t m = 0; m < layouts_.size(); ++m) {
      *matrices[m] = without_data(*data_->format, expert(e), layouts_[m]);
      std::size_t slot = data_->format->copied_bytes(layouts_[m]);
      for (const TensorRef& tensor : tensors(e, static_cast<MatrixRole>(m))) {
        file_bytes_ += tensor.size();
        slot += aligned_in_room(tensor.size());
      }
      slot_bytes_ = std::max(slot_bytes_, slot);
    }
  }
}

const ExpertTensors& ExpertReader::expert(int index) const {
  const LayerTensors& layer = data_->layer_tensors(shapes_.layer);
  return layer.experts[static_cast<std::size_t>(shapes_.first_expert + index)];
}

std::vector<TensorRef> ExpertReader::tensors(int index, MatrixRole role) const {
  std::vector<TensorRef> found;
  for (const std::string& part : parts_[static_cast<std::size_t>(role)]) {
    if (const TensorRef* const tensor = expert(index).find(part)) found.push_back(*tensor);
  }
  return found;
}

QuantMatrix ExpertReader::read(int index, MatrixRole role, std::span<std::byte> slot) {
  SLUICE_ASSERT(slot.size() >= slot_bytes_);
  ExpertTensors tensors;
  for (const std::string& part : parts_[static_cast<std::size_t>(role)]) {
    const TensorRef* const in_file = expert(index).find(part);
    if (in_file == nullptr) continue;  // An optional one.
    TensorRef& tensor = tensors.parts.emplace_back(part, *in_file).tensor;
    const auto bytes = slot.first(tensor.size());
    const std::size_t got = tensor.file->read(tensor.data_begin + tensor.entry.begin, bytes);
    bytes_read_.fetch_add(got, std::memory_order_relaxed);
    if (got < bytes.size()) {
      fail(ErrorCode::kCorruptFile,
           "{}: {} of its {} bytes are left in the file, which has been cut since it was opened",
           place(tensor), got, bytes.size());
    }
    tensor.read_bytes = bytes.data();
    slot = slot.subspan(aligned_in_room(bytes.size()));
  }
  ExpertStorage storage{.files = {}, .copies = {}, .room = slot};
  const MatrixLayout& layout = layouts_[static_cast<std::size_t>(role)];
  data_->format->check_values(tensors, layout);
  const QuantMatrix matrix = data_->format->load(tensors, layout, storage);
  judge(index, matrix);
  return matrix;
}

void ExpertReader::judge(int index, const QuantMatrix& matrix) {
  const NibbleEvidence nibbles = canonical_nibbles(matrix);
  NibbleEvidence all;
  {
    const std::lock_guard lock(mutex_);
    Seen& seen = seen_[static_cast<std::size_t>(index)];
    seen.nibbles.add(nibbles);
    if (++seen.num_matrices < 3) return;
    all = seen.nibbles;
  }
  data_->check_nibbles(shapes_.layer, shapes_.first_expert + index, all);
}

}  // namespace sluice
