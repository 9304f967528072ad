#include "repeated_calls.h"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "array_dtypes.h"

namespace sluice::python {

using namespace nb::literals;

namespace {

/// False for an array that no framework describes cheaply (framework.h) or that has more dimensions
/// than a call's tensors.
bool describe_tensor(nb::handle object, TensorForm& form, const std::byte*& data) {
  nb::dlpack::dltensor tensor;
  const Framework framework = Framework::of(object);
  if (!framework || !framework.import_again(object, tensor)) return false;
  if (tensor.ndim > TensorForm::kMaxRank || tensor.strides == nullptr) return false;
  data = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
  form.ndim = tensor.ndim;
  form.device_type = tensor.device.device_type;
  form.device_index = tensor.device.device_id;
  form.code = tensor.dtype.code;
  form.bits = tensor.dtype.bits;
  form.lanes = tensor.dtype.lanes;
  std::copy_n(tensor.shape, tensor.ndim, form.shape.begin());
  std::copy_n(tensor.strides, tensor.ndim, form.strides.begin());
  return true;
}

Shape shape_of(const TensorForm& form) {
  switch (form.ndim) {
    case 1:
      return {form.shape[0]};
    case 2:
      return {form.shape[0], form.shape[1]};
    default:
      return {form.shape[0], form.shape[1], form.shape[2]};
  }
}

MutableTensorView writable(const TensorView& view) {
  MutableTensorView y;
  y.data = const_cast<void*>(view.data), y.dtype = view.dtype;
  y.shape = view.shape, y.device = view.device;
  return y;
}

}  // namespace

LocalCall* RepeatedCalls::find(const CallId& id) {
  auto* const entry = calls_.find(id);
  if (entry == nullptr || !entry->value) return nullptr;
  ++num_repeated_;
  return &*entry->value;
}

const CallDtypes* RepeatedCalls::find(const CallForm& form) {
  auto* const entry = forms_.find(form);
  return entry == nullptr ? nullptr : &entry->value;
}

bool RepeatedCalls::came_before(const CallId& id) {
  if (calls_.find(id) != nullptr) return true;
  calls_.add(id, std::nullopt);
  return false;
}

void RepeatedCalls::keep(const CallId& id, LocalCall call) {
  if (auto* const entry = calls_.find(id)) entry->value.emplace(std::move(call));
}

void RepeatedCalls::keep(const CallForm& form, const CallDtypes& dtypes) {
  if (forms_.find(form) == nullptr) forms_.add(form, dtypes);
}

KnownCall::KnownCall(PyLocalExperts& self, const Array& x, const Array& routing,
                     const Array* weights, const std::optional<Array>& x_scale, int expected_m,
                     const std::optional<Array>& out)
    : self_(&self), framework_(Framework::of(x.object)), y_(out) {
  id_.form.expected_m = expected_m;
  if (!identify(kX, &x) || !identify(kRouting, &routing) || !identify(kWeights, weights) ||
      !identify(kScale, x_scale ? &*x_scale : nullptr)) {
    return;
  }
  if (!y_) make_result();
  is_identified_ = y_.has_value() && identify(kY, &*y_);
}

bool KnownCall::identify(CallTensor which, const Array* array) {
  return array == nullptr ||
         describe_tensor(array->object, id_.form.tensors[which], id_.data[which]);
}

void KnownCall::make_result() {
  const TensorForm& x = id_.form.tensors[kX];
  const Device device = self_->backend->device();
  const bool is_there = x.device_type == to_dlpack(device).device_type &&
                        x.device_index == to_dlpack(device).device_id;
  if (!is_there || x.ndim < 2) return;  // Refused later.
  const std::int64_t width = x.shape.at(x.ndim - 1);
  if (width != self_->hidden && (x.ndim > 2 || width != self_->token_width)) return;
  const std::vector<std::int64_t> dims(x.shape.begin(), x.shape.begin() + x.ndim);
  y_.emplace(framework_.allocate(export_dtype(DType::kBFloat16, false), dims, device));
}

bool KnownCall::run() {
  if (!is_identified_) return false;
  const BackendUse use(*self_->backend);
  return find_and_run();
}

bool KnownCall::run_in_one_of(const nb::list& experts) {
  if (!is_identified_) return false;
  PyBackend* const backend = self_->backend;
  const BackendUse use(*backend, std::try_to_lock);
  if (!use.is_held()) return false;
  for (const nb::handle one : experts) {
    self_ = &nb::cast<PyLocalExperts&>(one);
    if (self_->backend == backend && find_and_run()) return true;
  }
  return false;
}

bool KnownCall::find_and_run() {
  LocalCall* const call = self_->calls.find(id_);
  const CallDtypes* const dtypes = call == nullptr ? self_->calls.find(id_.form) : nullptr;
  if (call == nullptr && dtypes == nullptr) return false;
  const Stream stream = to_stream(std::nullopt, framework_, self_->backend->device());
  const Released released;
  if (call != nullptr) {
    call->run(stream);
  } else {
    run_form(*dtypes, stream);
  }
  return true;
}

TensorView KnownCall::view(CallTensor which, const CallDtypes& dtypes) const {
  const TensorForm& form = id_.form.tensors[which];
  if (form.ndim < 0) return {};
  return {id_.data[which], dtypes[which], shape_of(form), self_->backend->device()};
}

void KnownCall::run_form(const CallDtypes& dtypes, Stream stream) {
  LocalExperts& experts = *self_->experts;
  const TensorView x = view(kX, dtypes), scale = view(kScale, dtypes);
  const MutableTensorView y = writable(view(kY, dtypes));
  if (id_.form.tensors[kWeights].ndim < 0) {
    const ExpertBatch batch{.layout = Mode::kLowLatency,
                            .x = x,
                            .x_scale = scale,
                            .num_rows = view(kRouting, dtypes),
                            .row_begin = {},
                            .expected_m = id_.form.expected_m};
    experts.forward_batch(batch, y, stream);
    if (self_->calls.came_before(id_)) self_->calls.keep(id_, experts.keep_batch(batch, y));
  } else {
    const Routing routing{.topk_idx = view(kRouting, dtypes),
                          .topk_weights = view(kWeights, dtypes)};
    experts.forward(x, routing, y, stream, scale);
    if (self_->calls.came_before(id_)) {
      self_->calls.keep(id_, experts.keep(x, routing, y, scale));
    }
  }
}

void KnownCall::was_made(const TensorView& x, const Routing& routing, const TensorView& x_scale,
                         const MutableTensorView& y) {
  note({x.dtype, routing.topk_idx.dtype, routing.topk_weights.dtype, x_scale.dtype, y.dtype});
}

void KnownCall::was_made(const ExpertBatch& batch, const MutableTensorView& y) {
  note({batch.x.dtype, batch.num_rows.dtype, DType::kFloat32, batch.x_scale.dtype, y.dtype});
}

void KnownCall::note(const CallDtypes& dtypes) {
  if (!is_identified_) return;
  const BackendUse use(*self_->backend);
  self_->calls.keep(id_.form, dtypes);
  self_->calls.came_before(id_);
}

namespace {

using KnownExperts = nb::typed<nb::list, PyLocalExperts>;

using Argument = std::optional<Array>;  ///< A call without one is for others to refuse.

nb::object repeat(const KnownExperts& experts, const Argument& x, const Argument& routing,
                  const Array* weights, const Argument& x_scale, int expected_m,
                  const Argument& out) {
  if (experts.size() == 0 || !x || !routing) return nb::none();
  KnownCall known(nb::cast<PyLocalExperts&>(experts[0]), *x, *routing, weights, x_scale, expected_m,
                  out);
  return known.run_in_one_of(experts) ? known.y()->object : nb::none();
}

}  // namespace

void bind_repeated_calls(nb::module_& m) {
  m.def(
      "repeat_topk",
      [](const KnownExperts& experts, const Argument& x, const Argument& topk_idx,
         const Argument& topk_weights, const Argument& x_scale, const Argument& out) {
        return topk_weights ? repeat(experts, x, topk_idx, &*topk_weights, x_scale, 0, out)
                            : nb::none();
      },
      "experts"_a, "x"_a, "topk_idx"_a, "topk_weights"_a, "x_scale"_a = nb::none(),
      "out"_a = nb::none(),
      "LocalExperts.forward_topk() of the one among `experts`, which share a backend, that has\n"
      "made a call of the same shapes, strides and element types before. None if none has, or\n"
      "while another thread uses the backend: then make the call itself, which checks "
      "everything.\n\n"
      "Shapes as for LocalExperts.forward_topk().");
  m.def(
      "repeat_batch",
      [](const KnownExperts& experts, const Argument& x, const Argument& num_rows,
         const Argument& x_scale, int expected_m, const Argument& out) {
        return repeat(experts, x, num_rows, nullptr, x_scale, expected_m, out);
      },
      "experts"_a, "x"_a, "num_rows"_a, "x_scale"_a = nb::none(), "expected_m"_a = 0,
      "out"_a = nb::none(), "The same of LocalExperts.forward_batch(), and its shapes.");
}

}  // namespace sluice::python
