#include "arrays.h"

#include <fmt/format.h>

#include <cstring>

#include "array_dtypes.h"
#include "sluice/error.h"

namespace sluice::python {
namespace {

/// Numbers of DLPack's devices.
enum DlDevice { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13 };

using nb::dlpack::dltensor;

template <class NdArray>
dltensor tensor_of(const NdArray& array) {
  return {.data = const_cast<void*>(static_cast<const void*>(array.data())),
          .device = {array.device_type(), array.device_id()},
          .ndim = static_cast<std::int32_t>(array.ndim()),
          .dtype = array.dtype(),
          .shape = const_cast<std::int64_t*>(array.shape_ptr()),
          .strides = const_cast<std::int64_t*>(array.stride_ptr())};
}

Device device_of_tensor(const dltensor& tensor, const char* name) {
  switch (tensor.device.device_type) {
    case kDlCpu:
    case kDlCudaHost:
      return {Device::Kind::kHost, 0};
    case kDlCuda:
    case kDlCudaManaged:
      return {Device::Kind::kCuda, tensor.device.device_id};
    default:
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: lives on a device of DLPack type {}, expected cpu or cuda", name,
                              tensor.device.device_type));
  }
}

std::string list_text(const std::int64_t* values, int num) {
  std::string text = "[";
  for (int i = 0; i < num; ++i) text += fmt::format("{}{}", i ? ", " : "", values[i]);
  return text + "]";
}

std::string shape_text(const dltensor& tensor) {
  return list_text(tensor.shape, tensor.ndim);
}

/// Row-major and dense, strides of dimensions of one element aside.
bool is_contiguous(const dltensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t stride = 1;
  bool dense = true;
  for (int i = tensor.ndim; i-- > 0;) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) dense = false;
    stride *= tensor.shape[i];
  }
  return dense;
}

[[noreturn]] void refuse(const Expected& expected, const char* what, const std::string& wanted,
                         const std::string& seen) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected {} {}, got {}", expected.name, what, wanted, seen));
}

DType checked_dtype(const dltensor& tensor, const Expected& expected) {
  std::string wanted;
  for (const DType dtype : expected.dtypes) {
    if (is_dtype(tensor.dtype, dtype)) return dtype;
    wanted += (wanted.empty() ? "" : " or ") + std::string(describe(dtype));
  }
  refuse(expected, "dtype", wanted, describe(tensor.dtype));
}

Shape shape_of(const dltensor& tensor) {
  const std::int64_t* d = tensor.shape;
  switch (tensor.ndim) {
    case 0:
      return {};
    case 1:
      return {d[0]};
    case 2:
      return {d[0], d[1]};
    case 3:
      return {d[0], d[1], d[2]};
    default:
      return {d[0], d[1], d[2], d[3]};
  }
}

/// Fills a view of either kind. Throws: kInvalidArgument.
template <class View>
void check(const dltensor& tensor, const Expected& expected, View& view) {
  view.dtype = checked_dtype(tensor, expected);
  bool fits = static_cast<std::size_t>(tensor.ndim) == expected.dims.size();
  for (std::size_t i = 0; fits && i < expected.dims.size(); ++i) {
    fits = expected.dims[i] < 0 || expected.dims[i] == tensor.shape[i];
  }
  if (!fits) refuse(expected, "shape", expected.shape, shape_text(tensor));
  view.device = device_of_tensor(tensor, expected.name);
  if (view.device != expected.device) {
    refuse(expected, "memory on", to_text(expected.device), to_text(view.device));
  }
  if (!is_contiguous(tensor)) {
    refuse(expected, "C-contiguous memory,", "the last dimension densest",
           fmt::format("shape {} with strides {} in elements", shape_text(tensor),
                       list_text(tensor.strides, tensor.ndim)));
  }
  view.shape = shape_of(tensor);
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
}

/// numpy arrays of ml_dtypes have neither DLPack nor a buffer: their bits have.
nb::object bits_of(nb::handle object) {
  const nb::object dtype = nb::getattr(object, "dtype", nb::none());
  if (dtype.is_none() || !nb::hasattr(object, "view")) return {};
  const std::string name = nb::str(dtype).c_str();
  const char* bits = name == "bfloat16" ? "uint16" : name == "float8_e4m3fn" ? "uint8" : nullptr;
  return bits ? nb::object(nb::borrow(object).attr("view")(bits)) : nb::object();
}

/// By DLPack or the buffer protocol, into `array`, which keeps the memory alive.
template <class NdArray>
bool import_by_protocol(nb::handle object, NdArray& array, dltensor& tensor) {
  bool done = nb::try_cast(object, array);
  if (!done) {
    PyErr_Clear();
    const nb::object bits = bits_of(object);
    done = bits.is_valid() && nb::try_cast(bits, array);
  }
  if (done) tensor = tensor_of(array);
  return done;
}

/// Throws: kInvalidArgument naming argument `name`, for an array whose memory is not what it holds.
template <class NdArray>
bool try_import(const char* name, nb::handle object, Framework framework, NdArray& array,
                dltensor& tensor) {
  if (framework && framework.import(object, tensor)) return true;
  // No tensor has a buffer, and no array of numpy is a view of negatives.
  if (PyObject_CheckBuffer(object.ptr()) == 0 && is_negated(object)) {
    throw Error(ErrorCode::kInvalidArgument,
                fmt::format("{}: a tensor with torch's negative bit set, whose memory holds the "
                            "negative of its values: pass {}.resolve_neg()",
                            name, name));
  }
  return import_by_protocol(object, array, tensor);
}

/// What `object` itself says of why it cannot be exported; "" if it says nothing.
std::string objection_of(nb::handle object) {
  const nb::object exporter = nb::getattr(object, "__dlpack__", nb::none());
  if (exporter.is_none()) return "";
  try {
    (void)exporter();
    return "";
  } catch (nb::python_error& error) {
    const std::string text = nb::str(error.value()).c_str();
    return text.substr(0, text.find('\n'));
  }
}

[[noreturn]] void refuse_object(const char* name, nb::handle object) {
  std::string text = nb::str(nb::handle(object.type()).attr("__name__")).c_str();
  const nb::object dtype = nb::getattr(object, "dtype", nb::none());
  if (!dtype.is_none()) text += fmt::format(" of {}", nb::str(dtype).c_str());
  if (const std::string objection = objection_of(object); !objection.empty()) {
    text += ": " + objection;
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected an array (DLPack or buffer protocol), got {}", name, text));
}

std::vector<std::size_t> extents(const Shape& shape) {
  std::vector<std::size_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(static_cast<std::size_t>(shape[i]));
  return dims;
}

/// numpy.empty(dims, dtype).
nb::object numpy_empty(const std::vector<std::int64_t>& dims, DType dtype) {
  // Never freed: interpreters end before static objects do.
  static const nb::object& empty =
      *new nb::object(nb::module_::import_("numpy").attr("empty"));  // NOLINT
  nb::object shape = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(dims.size())));
  for (std::size_t i = 0; i < dims.size(); ++i) {
    PyTuple_SetItem(shape.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(dims[i]));
  }
  return empty(shape, numpy_name(dtype));
}

nb::object device_empty(const Expected& expected, Backend& backend) {
  std::size_t bytes = size_bytes(*expected.dtypes.begin());
  std::vector<std::size_t> dims;
  for (const std::int64_t dim : expected.dims) {
    dims.push_back(static_cast<std::size_t>(dim));
    bytes *= static_cast<std::size_t>(dim);
  }
  std::unique_ptr<DeviceBuffer> buffer = backend.allocate(std::max<std::size_t>(bytes, 1));
  std::byte* const data = buffer->data();
  const nb::capsule owner(buffer.release(), [](void* p) noexcept {
    delete static_cast<DeviceBuffer*>(p);  // NOLINT(cppcoreguidelines-owning-memory)
  });
  return nb::cast(nb::ndarray<>(data, dims.size(), dims.data(), owner, nullptr,
                                export_dtype(*expected.dtypes.begin(), true), kDlCuda,
                                expected.device.index));
}

}  // namespace

Input import_input(const Array& array, const Expected& expected) {
  Input input;
  dltensor tensor;
  input.object = array.object;
  input.framework = Framework::of(array.object);
  if (!try_import(expected.name, array.object, input.framework, input.array, tensor)) {
    refuse_object(expected.name, array.object);
  }
  check(tensor, expected, input.view);
  return input;
}

Output import_output(const Array& array, const Expected& expected) {
  Output output{.object = array.object, .array = {}, .view = {}};
  dltensor tensor;
  if (!try_import(expected.name, array.object, Framework::of(array.object), output.array, tensor)) {
    nb::ndarray<nb::ro> readable;
    if (!import_by_protocol(array.object, readable, tensor)) {
      refuse_object(expected.name, array.object);
    }
    refuse(expected, "memory that is", "writable", "a read-only array");
  }
  check(tensor, expected, output.view);
  return output;
}

Output output_or_new(const std::optional<Array>& out, const Expected& expected, Framework framework,
                     Backend& backend) {
  if (out) return import_output(*out, expected);
  const DType dtype = *expected.dtypes.begin();
  const bool host = expected.device.kind == Device::Kind::kHost;
  return import_output(
      {framework ? framework.allocate(export_dtype(dtype, false), expected.dims, expected.device)
       : host    ? numpy_empty(expected.dims, dtype)
                 : device_empty(expected, backend)},
      expected);
}

Device device_of(const Array& array, const char* name) {
  nb::ndarray<nb::ro> any;
  dltensor tensor;
  if (!try_import(name, array.object, Framework::of(array.object), any, tensor)) {
    refuse_object(name, array.object);
  }
  return device_of_tensor(tensor, name);
}

int rank_of(const Array& array, const char* name) {
  nb::ndarray<nb::ro> any;
  dltensor tensor;
  if (!try_import(name, array.object, Framework::of(array.object), any, tensor)) {
    refuse_object(name, array.object);
  }
  return tensor.ndim;
}

nb::object export_view(const TensorView& view, nb::handle owner, Framework framework) {
  if (view.empty()) return nb::none();
  if (framework) return framework.wrap(view, export_dtype(view.dtype, false), owner);
  const auto dims = extents(view.shape);
  const nb::dlpack::dtype dtype = export_dtype(view.dtype, true);
  if (view.device.kind == Device::Kind::kHost) {
    return nb::cast(
        nb::ndarray<nb::numpy, nb::ro>(view.data, dims.size(), dims.data(), owner, nullptr, dtype));
  }
  // DLPack of this generation has no read-only device memory.
  return nb::cast(nb::ndarray<>(const_cast<void*>(view.data), dims.size(), dims.data(), owner,
                                nullptr, dtype, kDlCuda, view.device.index));
}

nb::object export_copy(const void* data, DType dtype, const Shape& shape, Framework framework) {
  std::vector<std::int64_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(shape[i]);
  nb::object array = framework ? framework.allocate(export_dtype(dtype, false), dims, Device{})
                               : numpy_empty(dims, dtype);
  nb::ndarray<> target;
  dltensor tensor;
  try_import("a new array", array, framework, target, tensor);
  const std::size_t bytes = static_cast<std::size_t>(shape.num_elements()) * size_bytes(dtype);
  if (bytes > 0) std::memcpy(tensor.data, data, bytes);
  return array;
}

Stream to_stream(const StreamArgument& stream, Framework framework, Device device) {
  if (device.kind == Device::Kind::kHost) return {};
  if (stream) return {reinterpret_cast<void*>(*stream)};
  return framework ? framework.current_stream(device) : Stream{};
}

std::string to_text(const Device& device) {
  return device.kind == Device::Kind::kHost ? "cpu" : fmt::format("cuda:{}", device.index);
}

Device parse_device(std::string_view text) {
  if (text == "cpu") return {};
  if (text == "cuda") return {Device::Kind::kCuda, 0};
  if (text.starts_with("cuda:") && text.size() > 5 && text.size() < 9) {
    int index = 0;
    for (const char c : text.substr(5)) {
      index = c >= '0' && c <= '9' && index >= 0 ? index * 10 + (c - '0') : -1;
    }
    if (index >= 0) return {Device::Kind::kCuda, index};
  }
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("device '{}' is not one of: cpu, cuda, cuda:INDEX", text));
}

}  // namespace sluice::python
