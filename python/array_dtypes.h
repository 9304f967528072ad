// array_dtypes.h - the library's element types as DLPack and numpy name them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "framework.h"
#include "sluice/tensor.h"

namespace sluice::python {

/// True if an array of `seen` may stand for `wanted`: bf16 and e4m3 also as their bits.
[[nodiscard]] bool is_dtype(const nb::dlpack::dtype& seen, DType wanted);

/// What is_dtype() accepts, in words.
[[nodiscard]] const char* describe(DType dtype);
/// "int32", "bfloat16": what an array has.
[[nodiscard]] std::string describe(const nb::dlpack::dtype& dtype);

/// Of an array of numpy that holds such elements, or their bits.
[[nodiscard]] const char* numpy_name(DType dtype);
/// `plain`: bf16 and e4m3 as integers, for those who have no such types.
[[nodiscard]] nb::dlpack::dtype export_dtype(DType dtype, bool plain);

}  // namespace sluice::python
