#include "arrays.h"

#include <fmt/format.h>

#include <cstring>

#include "sluice/error.h"

namespace sluice::python {
namespace {

using Code = nb::dlpack::dtype_code;

/// Numbers of DLPack's devices.
enum DlDevice { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13 };

nb::dlpack::dtype make_dtype(Code code, int bits) {
  return {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
}

bool is_dtype(const nb::dlpack::dtype& seen, DType wanted) {
  const auto is = [&](Code code, int bits) { return seen == make_dtype(code, bits); };
  switch (wanted) {
    case DType::kUInt8:
      return is(Code::UInt, 8);
    case DType::kInt8:
      return is(Code::Int, 8);
    case DType::kInt32:
      return is(Code::Int, 32);
    case DType::kInt64:
      return is(Code::Int, 64);
    case DType::kFloat32:
      return is(Code::Float, 32);
    case DType::kFloat64:
      return is(Code::Float, 64);
    case DType::kBFloat16:
      return is(Code::Bfloat, 16) || is(Code::UInt, 16);
    case DType::kFloat8E4M3:
      return is(Code::Float8_E4M3FN, 8) || is(Code::UInt, 8);
    case DType::kPackedInt4:
      return is(Code::UInt, 8) || is(Code::Int, 8);
  }
  return false;
}

const char* describe(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "bfloat16 (or its bits as uint16)";
    case DType::kFloat8E4M3:
      return "e4m3 (as uint8)";
    case DType::kPackedInt4:
      return "packed int4 (as uint8 or int8)";
    default:
      return to_string(dtype);
  }
}

std::string describe(const nb::dlpack::dtype& dtype) {
  switch (static_cast<Code>(dtype.code)) {
    case Code::Int:
      return fmt::format("int{}", dtype.bits);
    case Code::UInt:
      return fmt::format("uint{}", dtype.bits);
    case Code::Float:
      return fmt::format("float{}", dtype.bits);
    case Code::Bfloat:
      return fmt::format("bfloat{}", dtype.bits);
    case Code::Complex:
      return fmt::format("complex{}", dtype.bits);
    case Code::Bool:
      return "bool";
    case Code::Float8_E4M3FN:
      return "float8_e4m3fn";
    default:
      return fmt::format("a type of {} bits that is none of ours", dtype.bits);
  }
}

template <class NdArray>
Device device_of_array(const NdArray& array, const char* name) {
  switch (array.device_type()) {
    case kDlCpu:
    case kDlCudaHost:
      return {Device::Kind::kHost, 0};
    case kDlCuda:
    case kDlCudaManaged:
      return {Device::Kind::kCuda, array.device_id()};
    default:
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{}: lives on a device of DLPack type {}, expected cpu or cuda", name,
                              array.device_type()));
  }
}

template <class NdArray>
std::string shape_text(const NdArray& array) {
  std::string text = "[";
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    text += fmt::format("{}{}", i ? ", " : "", array.shape(i));
  }
  return text + "]";
}

/// Row-major and dense, strides of dimensions of one element aside.
template <class NdArray>
bool is_contiguous(const NdArray& array) {
  if (array.size() == 0) return true;
  std::int64_t stride = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    const auto dim = static_cast<std::int64_t>(array.shape(i));
    if (dim != 1 && array.stride(i) != stride) return false;
    stride *= dim;
  }
  return true;
}

[[noreturn]] void refuse(const Expected& expected, const char* what, const std::string& wanted,
                         const std::string& seen) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected {} {}, got {}", expected.name, what, wanted, seen));
}

template <class NdArray>
DType checked_dtype(const NdArray& array, const Expected& expected) {
  std::string wanted;
  for (const DType dtype : expected.dtypes) {
    if (is_dtype(array.dtype(), dtype)) return dtype;
    wanted += (wanted.empty() ? "" : " or ") + std::string(describe(dtype));
  }
  refuse(expected, "dtype", wanted, describe(array.dtype()));
}

/// Fills a view of either kind. Throws: kInvalidArgument.
template <class NdArray, class View>
void check(const NdArray& array, const Expected& expected, View& view) {
  view.dtype = checked_dtype(array, expected);
  bool fits = array.ndim() == expected.dims.size();
  for (std::size_t i = 0; fits && i < array.ndim(); ++i) {
    fits = expected.dims[i] < 0 || expected.dims[i] == static_cast<std::int64_t>(array.shape(i));
  }
  if (!fits) refuse(expected, "shape", expected.shape, shape_text(array));
  view.device = device_of_array(array, expected.name);
  if (view.device != expected.device) {
    refuse(expected, "memory on", to_text(expected.device), to_text(view.device));
  }
  if (!is_contiguous(array)) {
    std::string strides;
    for (std::size_t i = 0; i < array.ndim(); ++i) {
      strides += fmt::format("{}{}", i ? ", " : "", array.stride(i));
    }
    refuse(expected, "C-contiguous memory,", "the last dimension densest",
           fmt::format("shape {} with strides [{}] in elements", shape_text(array), strides));
  }
  const auto dim = [&](std::size_t i) { return static_cast<std::int64_t>(array.shape(i)); };
  switch (array.ndim()) {
    case 0:
      view.shape = {};
      break;
    case 1:
      view.shape = {dim(0)};
      break;
    case 2:
      view.shape = {dim(0), dim(1)};
      break;
    case 3:
      view.shape = {dim(0), dim(1), dim(2)};
      break;
    default:
      view.shape = {dim(0), dim(1), dim(2), dim(3)};
  }
  view.data = array.data();
}

/// numpy arrays of ml_dtypes have neither DLPack nor a buffer: their bits have.
nb::object bits_of(nb::handle object) {
  const nb::object dtype = nb::getattr(object, "dtype", nb::none());
  if (dtype.is_none() || !nb::hasattr(object, "view")) return {};
  const std::string name = nb::str(dtype).c_str();
  const char* bits = name == "bfloat16" ? "uint16" : name == "float8_e4m3fn" ? "uint8" : nullptr;
  return bits ? nb::object(nb::borrow(object).attr("view")(bits)) : nb::object();
}

template <class NdArray>
bool try_import(nb::handle object, NdArray& array) {
  if (nb::try_cast(object, array)) return true;
  PyErr_Clear();
  const nb::object bits = bits_of(object);
  return bits.is_valid() && nb::try_cast(bits, array);
}

[[noreturn]] void refuse_object(const char* name, nb::handle object) {
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("{}: expected an array (DLPack or buffer protocol), got {}", name,
                          nb::str(nb::handle(object.type()).attr("__name__")).c_str()));
}

const char* numpy_name(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return "uint16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kInt8:
      return "int8";
    default:
      return "uint8";
  }
}

nb::dlpack::dtype export_dtype(DType dtype, bool host) {
  switch (dtype) {
    case DType::kBFloat16:
      return host ? make_dtype(Code::UInt, 16) : make_dtype(Code::Bfloat, 16);
    case DType::kInt8:
      return make_dtype(Code::Int, 8);
    case DType::kInt32:
      return make_dtype(Code::Int, 32);
    case DType::kInt64:
      return make_dtype(Code::Int, 64);
    case DType::kFloat32:
      return make_dtype(Code::Float, 32);
    case DType::kFloat64:
      return make_dtype(Code::Float, 64);
    default:
      return make_dtype(Code::UInt, 8);
  }
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
                                export_dtype(*expected.dtypes.begin(), false), kDlCuda,
                                expected.device.index));
}

}  // namespace

Input import_input(const Array& array, const Expected& expected) {
  Input input;
  if (!try_import(array.object, input.array)) refuse_object(expected.name, array.object);
  check(input.array, expected, input.view);
  return input;
}

Output import_output(const Array& array, const Expected& expected) {
  Output output{.object = array.object, .array = {}, .view = {}};
  if (!try_import(array.object, output.array)) {
    nb::ndarray<nb::ro> readable;
    if (!try_import(array.object, readable)) refuse_object(expected.name, array.object);
    refuse(expected, "memory that is", "writable", "a read-only array");
  }
  check(output.array, expected, output.view);
  return output;
}

Output output_or_new(const std::optional<Array>& out, const Expected& expected, Backend& backend) {
  if (out) return import_output(*out, expected);
  const bool host = expected.device.kind == Device::Kind::kHost;
  return import_output({host ? numpy_empty(expected.dims, *expected.dtypes.begin())
                             : device_empty(expected, backend)},
                       expected);
}

Device device_of(const Array& array, const char* name) {
  nb::ndarray<nb::ro> any;
  if (!try_import(array.object, any)) refuse_object(name, array.object);
  return device_of_array(any, name);
}

int rank_of(const Array& array, const char* name) {
  nb::ndarray<nb::ro> any;
  if (!try_import(array.object, any)) refuse_object(name, array.object);
  return static_cast<int>(any.ndim());
}

nb::object export_view(const TensorView& view, nb::handle owner) {
  if (view.empty()) return nb::none();
  const auto dims = extents(view.shape);
  if (view.device.kind == Device::Kind::kHost) {
    return nb::cast(nb::ndarray<nb::numpy, nb::ro>(view.data, dims.size(), dims.data(), owner,
                                                   nullptr, export_dtype(view.dtype, true)));
  }
  // DLPack of this generation has no read-only device memory.
  return nb::cast(nb::ndarray<>(const_cast<void*>(view.data), dims.size(), dims.data(), owner,
                                nullptr, export_dtype(view.dtype, false), kDlCuda,
                                view.device.index));
}

nb::object export_copy(const void* data, DType dtype, const Shape& shape) {
  std::vector<std::int64_t> dims;
  for (int i = 0; i < shape.rank(); ++i) dims.push_back(shape[i]);
  nb::object array = numpy_empty(dims, dtype);
  const auto target = nb::cast<nb::ndarray<>>(array);
  const std::size_t bytes = static_cast<std::size_t>(shape.num_elements()) * size_bytes(dtype);
  if (bytes > 0) std::memcpy(target.data(), data, bytes);
  return array;
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
