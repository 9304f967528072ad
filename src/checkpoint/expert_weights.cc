#include <optional>
#include <span>

#include "checkpoint/expert_storage.h"
#include "sluice/checkpoint.h"

namespace sluice {
namespace {

template <class Function>
void for_each_view(const Expert& expert, Function&& function) {
  for (const QuantMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
    function(matrix->codes);
    function(matrix->scales);
    if (matrix->has_bias()) function(matrix->bias);
  }
}

}  // namespace

std::size_t ExpertWeights::bytes() const noexcept {
  std::size_t sum = 0;
  for (const Expert& expert : experts) {
    for_each_view(expert, [&](const TensorView& view) { sum += view.bytes(); });
  }
  return sum;
}

void ExpertWeights::release_pages(int index) const noexcept {
  const auto* const deleter = std::get_deleter<ExpertStorageDeleter>(storage);
  if (!deleter || index < 0 || static_cast<std::size_t>(index) >= experts.size()) return;
  for_each_view(experts[static_cast<std::size_t>(index)], [&](const TensorView& view) {
    for (const auto& file : deleter->storage->files) {
      if (file->contains(view.data, view.bytes())) {
        MappedFile::release({view.as<std::byte>(), view.bytes()});
      }
    }
  });
}

std::optional<MappedState> find_mapped(const void* address) noexcept {
  const auto [file, bytes_now] = MappedFile::find(address);
  if (file == nullptr) return std::nullopt;
  return MappedState{
      .path = file->path().c_str(), .bytes_mapped = file->bytes().size(), .bytes_now = bytes_now};
}

}  // namespace sluice
