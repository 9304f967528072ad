#include "repeated_calls.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "array_dtypes.h"

namespace sluice::python {
namespace {

bool identify_tensor(nb::handle object, TensorId& id) {
  nb::dlpack::dltensor tensor;
  const Framework framework = Framework::of(object);
  if (!framework || !framework.import(object, tensor)) return false;
  if (tensor.ndim > TensorId::kMaxRank || tensor.strides == nullptr) return false;
  id.data = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
  id.ndim = tensor.ndim;
  id.device_type = tensor.device.device_type;
  id.device_index = tensor.device.device_id;
  id.code = tensor.dtype.code;
  id.bits = tensor.dtype.bits;
  id.lanes = tensor.dtype.lanes;
  std::copy_n(tensor.shape, tensor.ndim, id.shape.begin());
  std::copy_n(tensor.strides, tensor.ndim, id.strides.begin());
  return true;
}

}  // namespace

bool identify(const Array* array, TensorId& id) {
  id = {};
  return array == nullptr || identify_tensor(array->object, id);
}

RepeatedCalls::Entry* RepeatedCalls::entry_of(const CallId& id) {
  const auto found = std::ranges::find(entries_, id, &Entry::id);
  if (found == entries_.end() || found->last_use == 0) return nullptr;
  found->last_use = ++now_;
  return found;
}

LocalCall* RepeatedCalls::find(const CallId& id) {
  Entry* const entry = entry_of(id);
  if (entry == nullptr || !entry->call) return nullptr;
  ++num_repeated_;
  return &*entry->call;
}

bool RepeatedCalls::is_worth_keeping(const CallId& id) {
  if (entry_of(id) != nullptr) return true;
  Entry& oldest = *std::ranges::min_element(entries_, {}, &Entry::last_use);
  oldest.call.reset();
  oldest.id = id;
  oldest.last_use = ++now_;
  return false;
}

void RepeatedCalls::keep(const CallId& id, LocalCall call) {
  if (Entry* const entry = entry_of(id)) entry->call.emplace(std::move(call));
}

KnownCall::KnownCall(PyLocalExperts& self, const Array& x, const Array& routing,
                     const Array* weights, const std::optional<Array>& x_scale, int expected_m,
                     const std::optional<Array>& out)
    : self_(self), framework_(Framework::of(x.object)), y_(out) {
  id_.expected_m = expected_m;
  if (!identify(&x, id_.x) || !identify(&routing, id_.routing) || !identify(weights, id_.weights) ||
      !identify(x_scale ? &*x_scale : nullptr, id_.x_scale)) {
    return;
  }
  if (!y_) make_result();
  is_identified_ = y_.has_value() && identify(&*y_, id_.y);
}

void KnownCall::make_result() {
  const TensorId& x = id_.x;
  const Device device = self_.backend->device();
  const bool is_there = x.device_type == to_dlpack(device).device_type &&
                        x.device_index == to_dlpack(device).device_id;
  if (!is_there || x.ndim < 2) return;  // Refused later.
  const std::int64_t width = x.shape.at(x.ndim - 1);
  if (width != self_.hidden && (x.ndim > 2 || width != self_.token_width)) return;
  const std::vector<std::int64_t> dims(x.shape.begin(), x.shape.begin() + x.ndim);
  y_.emplace(framework_.allocate(export_dtype(DType::kBFloat16, false), dims, device));
}

bool KnownCall::run() {
  if (!is_identified_) return false;
  const Exclusive exclusive(*self_.backend);
  LocalCall* const call = self_.calls.find(id_);
  if (call == nullptr) return false;
  const Stream stream = to_stream(std::nullopt, framework_, self_.backend->device());
  const nb::gil_scoped_release released;
  call->run(stream);
  return true;
}

}  // namespace sluice::python
