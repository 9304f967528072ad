// whole.h - an argument that is a whole number of 32 bits, and knows its name.
//
// One that does not fit is refused by that name, as the library refuses one out of its range,
// and not by a TypeError with all signatures.
#pragma once

#include <fmt/format.h>
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>

#include "sluice/error.h"

namespace sluice::python {

template <std::size_t kSize>
struct ArgumentName {
  // NOLINTNEXTLINE(google-explicit-constructor): of a literal.
  constexpr ArgumentName(const char (&literal)[kSize]) { std::copy_n(literal, kSize, text); }
  char text[kSize] = {};
};

template <ArgumentName kName>
struct Whole {
  std::optional<int> value;
  std::string too_large;  ///< Its digits, where there is no value.

  /// Throws: kInvalidArgument naming the argument.
  operator int() const {  // NOLINT(google-explicit-constructor): stands where an int stood.
    if (!value) {
      throw Error(ErrorCode::kInvalidArgument,
                  fmt::format("{} {} does not fit into 32 bits", kName.text, too_large));
    }
    return *value;
  }
};

}  // namespace sluice::python

namespace nanobind::detail {

template <sluice::python::ArgumentName kName>
struct type_caster<sluice::python::Whole<kName>> {
  NB_TYPE_CASTER(sluice::python::Whole<kName>, const_name("int"))

  bool from_python(handle source, std::uint8_t flags, cleanup_list* cleanup) noexcept {
    make_caster<int> number;
    if (number.from_python(source, flags, cleanup)) {
      value.value = number.value;
      return true;
    }
    if (PyIndex_Check(source.ptr()) == 0) return false;
    PyObject* const digits = PyObject_Str(source.ptr());
    if (digits == nullptr) {  // More digits than Python prints.
      PyErr_Clear();
      value.too_large = "of very many digits";
      return true;
    }
    value.too_large = borrow<str>(digits).c_str();
    Py_DECREF(digits);
    return true;
  }
};

}  // namespace nanobind::detail
