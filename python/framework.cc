#include "framework.h"

#include <memory>
#include <string>
#include <utility>

#include "gil.h"
#include "sluice/error.h"

namespace sluice::python {

using nb::dlpack::dltensor;

// The ABI of DLPack (dlpack.h 1.2 and later), under our names.
struct ManagedTensor {
  std::uint32_t major_version, minor_version;
  void* context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  dltensor tensor;
};
using SetError = void (*)(void* context, const char* kind, const char* message);
struct ExchangeApi {
  std::uint32_t major_version, minor_version;
  const ExchangeApi* previous;
  int (*allocate)(dltensor* prototype, ManagedTensor** out, void* context, SetError set_error);
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** object);
  int (*tensor_from_object)(void* object, dltensor* out);
  int (*current_stream)(int device_type, std::int32_t device_id, void** stream);
};

namespace {

constexpr std::uint32_t kMajorVersion = 1;

/// The API that a type offers, of a version that is understood here.
const ExchangeApi* find_api(nb::handle type) noexcept {
  nb::object capsule = nb::steal(PyObject_GetAttrString(type.ptr(), "__dlpack_c_exchange_api__"));
  const void* pointer = nullptr;
  if (capsule.is_valid() && PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  }
  PyErr_Clear();
  const auto* api = static_cast<const ExchangeApi*>(pointer);
  while (api != nullptr && api->major_version > kMajorVersion) api = api->previous;
  return api != nullptr && api->major_version == kMajorVersion && api->tensor_from_object != nullptr
             ? api
             : nullptr;
}

nb::object take(const ExchangeApi& api, ManagedTensor* tensor) {
  void* object = nullptr;
  if (api.object_from_managed(tensor, &object) != 0) throw nb::python_error();
  return nb::steal(static_cast<PyObject*>(object));
}

/// A tensor that is given away together with its shape and a reference to whose memory it is.
struct Wrapped {
  ManagedTensor managed{};
  std::int64_t shape[Shape::kMaxRank], strides[Shape::kMaxRank];
  nb::object owner;
};

void drop(ManagedTensor* tensor) {
  if (!nb::is_alive()) return;  // The interpreter is gone, and the owner with it.
  const Acquired lock;
  delete static_cast<Wrapped*>(tensor->context);  // NOLINT(cppcoreguidelines-owning-memory)
}

/// What a type of arrays has. `api` null: it is of no framework.
struct TypeFacts {
  PyTypeObject* type = nullptr;
  const ExchangeApi* api = nullptr;
  nb::object is_neg;  ///< Its method.
};

/// Of one type after the other: callers pass many arrays of the same one. The interpreter's lock
/// guards this; a type stays alive while it is remembered.
const TypeFacts& facts_of(nb::handle array) noexcept {
  static TypeFacts& last = *new TypeFacts;  // NOLINT: interpreters end before static objects do.
  PyTypeObject* const type = Py_TYPE(array.ptr());
  if (type == last.type) return last;
  // These may run code of Python, which may come here.
  const ExchangeApi* const api = find_api(array.type());
  nb::object is_neg = nb::steal(PyObject_GetAttrString(array.type().ptr(), "is_neg"));
  PyErr_Clear();
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  PyTypeObject* const before = std::exchange(last.type, type);
  last.api = api;
  std::swap(last.is_neg, is_neg);
  Py_XDECREF(reinterpret_cast<PyObject*>(before));
  return last;
}

bool may_be_part_of_complex(const nb::dlpack::dtype& dtype) noexcept {
  constexpr int kFloat = 2, kBfloat = 4, kComplex = 5;
  return dtype.code == kFloat || dtype.code == kBfloat || dtype.code == kComplex;
}

}  // namespace

nb::dlpack::device to_dlpack(Device device) {
  constexpr int kCpu = 1, kCuda = 2;
  return {device.kind == Device::Kind::kHost ? kCpu : kCuda, device.index};
}

Framework Framework::of(nb::handle array) noexcept {
  return Framework(facts_of(array).api);
}

bool Framework::import(nb::handle array, dltensor& tensor) const noexcept {
  return describe(array, tensor) && !is_negated(array);
}

bool Framework::import_again(nb::handle array, dltensor& tensor) const noexcept {
  return describe(array, tensor) && (!may_be_part_of_complex(tensor.dtype) || !is_negated(array));
}

bool Framework::describe(nb::handle array, dltensor& tensor) const noexcept {
  if (api_->tensor_from_object(array.ptr(), &tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

bool is_negated(nb::handle array) noexcept {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  PyObject* const arguments[] = {nullptr, array.ptr()};
  constexpr std::size_t kOne = 1 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  const TypeFacts& facts = facts_of(array);
  // Of no framework: it may pass on the attributes of an array that has one.
  const nb::object method = facts.api != nullptr ? facts.is_neg : nb::object();
  const nb::object answer =
      nb::steal(method.is_valid() ? PyObject_Vectorcall(method.ptr(), arguments + 1, kOne, nullptr)
                                  : PyObject_VectorcallMethod(name, arguments + 1, kOne, nullptr));
  if (!answer.is_valid()) PyErr_Clear();  // Of a framework that has nothing of the kind.
  return answer.ptr() == Py_True;
}

nb::object Framework::allocate(const nb::dlpack::dtype& dtype,
                               const std::vector<std::int64_t>& dims, Device device) const {
  std::vector<std::int64_t> shape = dims;
  dltensor prototype{.device = to_dlpack(device),
                     .ndim = static_cast<std::int32_t>(shape.size()),
                     .dtype = dtype,
                     .shape = shape.data()};
  ManagedTensor* tensor = nullptr;
  std::string said;
  const int status = api_->allocate(
      &prototype, &tensor, &said, [](void* context, const char* kind, const char* message) {
        *static_cast<std::string*>(context) = std::string(kind) + ": " + message;
      });
  if (status != 0) {
    PyErr_Clear();
    throw Error(ErrorCode::kOutOfMemory, "a new tensor for the result: " + said);
  }
  return take(*api_, tensor);
}

nb::object Framework::wrap(const TensorView& view, const nb::dlpack::dtype& dtype,
                           nb::handle owner) const {
  auto wrapped = std::make_unique<Wrapped>();
  std::int64_t stride = 1;
  for (int i = view.shape.rank(); i-- > 0;) {
    wrapped->shape[i] = view.shape[i];
    wrapped->strides[i] = stride;
    stride *= view.shape[i];
  }
  wrapped->owner = nb::borrow(owner);
  wrapped->managed = {.major_version = kMajorVersion,
                      .minor_version = 0,
                      .context = wrapped.get(),
                      .deleter = drop,
                      .flags = 0,
                      .tensor = {.data = const_cast<void*>(view.data),
                                 .device = to_dlpack(view.device),
                                 .ndim = view.shape.rank(),
                                 .dtype = dtype,
                                 .shape = wrapped->shape,
                                 .strides = wrapped->strides}};
  return take(*api_, &wrapped.release()->managed);
}

Stream Framework::current_stream(Device device) const {
  void* stream = nullptr;
  const nb::dlpack::device d = to_dlpack(device);
  if (api_->current_stream(d.device_type, d.device_id, &stream) != 0) {
    throw nb::python_error();
  }
  return {stream};
}

}  // namespace sluice::python
