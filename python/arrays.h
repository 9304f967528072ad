// arrays.h - arrays of Python callers as views: imported through DLPack or the buffer protocol,
// checked, never copied.
//
// bf16 arrives as bfloat16 or as its bits in uint16; e4m3 as uint8 or float8_e4m3fn. A refusal
// names argument, expectation and what came.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "framework.h"
#include "sluice/backend.h"
#include "sluice/tensor.h"

namespace sluice::python {

/// An argument that has yet to be imported.
struct Array {
  nb::object object;
};

/// What an argument must be. A dimension of -1 may be anything; `shape` is its text.
struct Expected {
  const char* name;
  std::initializer_list<DType> dtypes;
  std::vector<std::int64_t> dims;
  const char* shape;
  Device device{};
};

/// A view together with the references that keep its memory alive.
struct Input {
  nb::object object;
  nb::ndarray<nb::ro> array;  ///< Empty where `object` itself is enough.
  TensorView view;
  Framework framework;
};
struct Output {
  nb::object object;  ///< What the caller gave, or a new array.
  nb::ndarray<> array;
  MutableTensorView view;
};

[[nodiscard]] Input import_input(const Array& array, const Expected& expected);
/// As above; the array must be writable.
[[nodiscard]] Output import_output(const Array& array, const Expected& expected);
/// `out` if there is one, else a new array: of `framework` if that is one, numpy's for the host, a
/// DLPack one of `backend` for its device. `expected` has one dtype and no dimension of -1.
[[nodiscard]] Output output_or_new(const std::optional<Array>& out, const Expected& expected,
                                   Framework framework, Backend& backend);

/// Of an array whose dtype and shape are not looked at yet.
[[nodiscard]] Device device_of(const Array& array, const char* name);
[[nodiscard]] int rank_of(const Array& array, const char* name);

/// Memory of somebody else as an array of `framework`, if that is one; `owner` is kept alive. Empty
/// views give None.
[[nodiscard]] nb::object export_view(const TensorView& view, nb::handle owner,
                                     Framework framework = {});
/// A copy of host memory as an array.
[[nodiscard]] nb::object export_copy(const void* data, DType dtype, const Shape& shape,
                                     Framework framework = {});

/// What a call's `stream` says: a handle, or None for the framework's current stream.
using StreamArgument = std::optional<std::uintptr_t>;
[[nodiscard]] Stream to_stream(const StreamArgument& stream, Framework framework, Device device);

[[nodiscard]] std::string to_text(const Device& device);
/// "cpu", "cuda" or "cuda:1". Throws: kInvalidArgument.
[[nodiscard]] Device parse_device(std::string_view text);

}  // namespace sluice::python

namespace nanobind::detail {
template <>
struct type_caster<sluice::python::Array> {
  NB_TYPE_CASTER(sluice::python::Array, const_name("sluice._array.Array"))
  bool from_python(handle source, std::uint8_t, cleanup_list*) noexcept {
    value.object = borrow(source);
    return !source.is_none();
  }
  static handle from_cpp(const sluice::python::Array& a, rv_policy, cleanup_list*) noexcept {
    return a.object.inc_ref();
  }
};
}  // namespace nanobind::detail
